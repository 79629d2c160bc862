"""Text from strangers on terminals, in errors and in model cards."""

from __future__ import annotations

import json
import pickle
import sys
import warnings

import pytest
import torch
from huggingface_hub import ModelCard
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from act_peft import ActConfig, ActLoadError, ActWarning, combine, export_lora
from act_peft.cli import _Printable, main
from act_peft.plain import in_markdown, one_line, without_controls
from act_peft.tables import aligned
from tests.support.tiny_models import build, random_mask

# Sequences for a terminal, lines of their own, the other direction of writing, markup, code.
HOSTILE = (
    "\x1b]0;owned\x07\x1b[2J\u202eevil\u2066\x85\u2028\nbase: trusted/model\r\x9b31m"
    '|\n---\nlicense: evil\n---\n<script>alert(1)</script>\n# Trusted\n")\n'
    'import os; os.system("x")  # `[a](http://b) ```\n'
)


def is_plain(text: str) -> bool:
    return all(char.isprintable() or char == "\n" for char in text)


def test_one_line():
    assert one_line("a\n  b\tc\r\nd") == "a b c d"
    assert one_line("\x1b[31m\u202e\ud800\x7f") == "\\x1b[31m\\u202e\\ud800\\x7f"
    assert one_line("Ä 漢字 λ 🙂") == "Ä 漢字 λ 🙂"
    assert one_line(HOSTILE).isprintable()
    assert without_controls("a\nb\x1b", keep="\n") == "a\nb\\x1b"


def test_in_markdown():
    assert in_markdown("org/my_model-v1.5") == "org/my_model-v1.5"
    assert in_markdown("<b>|[x](y)`*# !") == "&lt;b&gt;\\|\\[x\\](y)\\`\\*\\# \\!"


@pytest.mark.parametrize("kind", [ActLoadError, ActWarning])
def test_errors_and_warnings_are_one_printable_line(kind):
    error = kind(f"{HOSTILE}: got that")
    assert str(error).isprintable()
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        warnings.warn(HOSTILE, ActWarning, stacklevel=1)
    assert str(seen[0].message).isprintable()


def test_tables_and_streams(capsys):
    assert all(line.isprintable() for line in aligned([(HOSTILE, "1"), ("b", HOSTILE)]))
    stream = _Printable(sys.stdout)
    print(f"bar\r{HOSTILE}", file=stream)
    stream.flush()
    assert is_plain(capsys.readouterr().out.replace("\r", "").replace("\t", ""))


@pytest.fixture
def hostile(tmp_path):
    """An adapter whose configuration describes itself in a hostile way."""
    model = get_peft_model(build("llama"), ActConfig(channels=random_mask(build("llama"), 0.2), init_weights=False))
    model.save_pretrained(tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    config = json.loads(path.read_text())
    texts = dict.fromkeys(("donor", "donor_revision", "base_model_name_or_path", "revision"), HOSTILE)
    path.write_text(json.dumps({**config, **texts, "task_type": "CAUSAL_LM"}))
    return tmp_path / "adapter"


@pytest.mark.filterwarnings("ignore:Could not find a config file:UserWarning")  # PEFT looks for the base
@pytest.mark.parametrize("make", ["load and save", "combine", "export_lora"])
def test_a_card_shows_it_as_text(hostile, tmp_path, make):
    if make == "load and save":
        PeftModel.from_pretrained(build("llama"), hostile).save_pretrained(tmp_path / "out")
    elif make == "combine":
        combine([hostile], tmp_path / "out")
    else:
        build("llama").save_pretrained(tmp_path / "base")
        export_lora(hostile, tmp_path / "out", biases="modules_to_save", base=tmp_path / "base")
    card = ModelCard.load(tmp_path / "out" / "README.md")
    lines = card.content.splitlines()
    assert is_plain(card.content)
    assert "license" not in card.data.to_dict()
    assert card.data.base_model is None
    assert "<script" not in card.content
    for line in ("# Trusted", "license: evil", "base: trusted/model"):
        assert line not in lines
    if "```python" in lines:
        code = "\n".join(lines[lines.index("```python") + 1 : lines.index("```", lines.index("```python") + 1)])
        compile(code, "card", "exec")
        assert not [line for line in code.splitlines() if line.startswith("import os")]


def test_commands_show_it_as_text(hostile, capsys):
    assert main(["inspect", str(hostile)]) == 0
    shown = capsys.readouterr().out
    assert is_plain(shown)
    assert "base: trusted/model" not in shown.splitlines()
    assert main(["inspect", str(hostile), "--json"]) == 0
    assert is_plain(capsys.readouterr().out)
    tensors = load_file(hostile / "adapter_model.safetensors")
    tensors[f"base_model.model.{HOSTILE}.act_delta_index"] = torch.zeros(1, dtype=torch.int64)
    save_file(tensors, hostile / "adapter_model.safetensors")
    assert main(["merge", "--base", str(hostile), "--adapter", str(hostile), "--output", str(hostile / "x")]) == 1
    shown = capsys.readouterr().err
    assert is_plain(shown)
    assert len(shown.splitlines()) == 1
