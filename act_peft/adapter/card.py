"""The model card of a saved adapter: its base, its donor, and how to load it."""

from __future__ import annotations

import json
import os
import shlex
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from act_peft.disk.atomic import write_file
from act_peft.plain import in_markdown, model_name

BEGIN = "<!-- act_peft: begin -->"
END = "<!-- act_peft: end -->"
_BLANK = "[More Information Needed]"
_PUSHED = "This is the model card of a 🤗 transformers model"  # what `push_to_hub` fills in
_DEEPEST = 7  # deeper than any heading


def write_model_card(folder: str, config: dict[str, Any]) -> None:
    """Create or update `README.md` in an adapter's folder. The user's text around our section stays.

    Args:
        folder: the adapter's folder.
        config: the adapter's configuration as a dict.
    """
    path = Path(folder) / "README.md"
    empty = ModelCard.from_template(ModelCardData(), template_str=_EMPTY)
    card = ModelCard.load(path) if path.exists() else empty
    card.data["library_name"] = "peft"
    # PEFT names the base in a tag, which ends with a colon if it has no name.
    tags = {tag for tag in card.data.get("tags") or [] if model_name(tag) and not tag.endswith(":")}
    card.data["tags"] = sorted({*tags, "peft", "act"})
    card.data["base_model"] = model_name(card.data.get("base_model")) or model_name(config["base_model_name_or_path"])
    card.text = _with_section(without_blanks(card.text), _section(config))
    write_file(path, str(card).encode())


def add_to_card(folder: str | os.PathLike[str], name: str, text: str) -> None:
    """Add a section to the card of an adapter's folder, in place of an older one of the same name.

    Args:
        folder: the adapter's folder, with a card.
        name: of the section; a word.
        text: Markdown.
    """
    path = Path(folder) / "README.md"
    begin, end = f"<!-- act_peft {name}: begin -->", f"<!-- act_peft {name}: end -->"
    card = path.read_text(encoding="utf-8")
    before, _, rest = card.partition(begin)
    after = rest.rpartition(end)[2] if rest else ""
    write_file(path, f"{before.rstrip()}\n\n{begin}\n{text}{end}\n{after.lstrip()}".encode())


_EMPTY = "---\n{{ card_data }}\n---\n"


def _with_section(text: str, section: str) -> str:
    if BEGIN in text and END in text:
        before, _, rest = text.partition(BEGIN)
        return before + section + rest.partition(END)[2]
    return f"\n{section}\n\n{text.lstrip()}"


def without_blanks(text: str) -> str:
    """A card's text without the sections of the Hub's template that nobody has filled in."""
    if _BLANK not in text:
        return text
    template = set(ModelCard.from_template(ModelCardData()).text.splitlines())
    kept: list[str] = []
    below, in_code = 0, False  # a heading of the template stays if something of a deeper level stays below it
    for line in reversed(text.splitlines()):
        in_code ^= line.startswith("```")
        level = 0 if in_code else len(line) - len(line.lstrip("#"))
        is_ours = _BLANK not in line and line not in template and not line.startswith(_PUSHED)
        if not line.strip():
            if kept and kept[-1].strip():
                kept.append("")
        elif is_ours or 0 < level < below:
            kept.append(line)
            below = (0 if is_ours else level) if level else _DEEPEST
    return "\n".join(reversed(kept)).strip("\n") + "\n"


def _section(config: dict[str, Any]) -> str:
    base = config["base_model_name_or_path"] or "BASE"
    donor = in_markdown(config["donor"] or "none (trained from zero, or a donor in memory)")
    revision = f" (revision {in_markdown(config['donor_revision'])})" if config["donor_revision"] else ""
    modules = config["adapted_modules"] or {}
    selected = sum(entry["selected"] for entry in modules.values())
    scale = "transfer scale λ" if config["trainable"] == "deltas" else "learned scales, which started at"
    density = "unknown" if config["density"] is None else f"{config['density']:.4g}"
    name = model_name(base) or "BASE"
    return f"""{BEGIN}
## ACT adapter

This adapter changes {selected} channels in {len(modules)} modules of its base model and nothing else
([ACT](https://arxiv.org/abs/2601.09398): localize, select, transfer, make compatible). Three ways to load it:

**With act_peft** (`pip install act-peft`):

```python
import act_peft  # registers the method with PEFT; without it loading ends with KeyError: 'ACT'
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained({json.dumps(name, ensure_ascii=False)})
model = PeftModel.from_pretrained(base, "path or Hub id of this adapter")
```

{_AS_LORA_INSIDE if config["lora_twin"] else _AS_LORA_EXPORTED}

**As an ordinary model**, for programs that load no adapters:

```sh
act-peft merge --base {shlex.quote(name)} --adapter THIS_FOLDER --output merged
```

| | |
|---|---|
| base | {in_markdown(base)} |
| donor | {donor}{revision} |
| density | {density} |
| {scale} | {config["transfer_scale"]} |
{END}"""


_AS_LORA_INSIDE = """**As an ordinary LoRA adapter**, in the folder `lora` inside, for programs without act_peft:

```python
model = PeftModel.from_pretrained(base, "path or Hub id of this adapter", subfolder="lora")
```"""

_AS_LORA_EXPORTED = """**As an ordinary LoRA adapter**, for programs without act_peft (for engines add `--target`):

```sh
act-peft export-lora THIS_FOLDER --output lora
```"""
