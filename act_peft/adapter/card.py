"""The model card of a saved adapter: its base, its donor, and how to load it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from act_peft.disk.atomic import write_file

BEGIN = "<!-- act_peft: begin -->"
END = "<!-- act_peft: end -->"


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
    tags = {tag for tag in card.data.get("tags") or [] if not tag.endswith(":")}  # PEFT's tag for an unnamed base
    card.data["tags"] = sorted({*tags, "peft", "act"})
    card.data["base_model"] = card.data.get("base_model") or config["base_model_name_or_path"]
    card.text = _with_section(card.text, _section(config))
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
    after = rest.partition(end)[2] if rest else ""
    write_file(path, f"{before.rstrip()}\n\n{begin}\n{text}{end}\n{after.lstrip()}".encode())


_EMPTY = "---\n{{ card_data }}\n---\n"


def _with_section(text: str, section: str) -> str:
    if BEGIN in text and END in text:
        before, _, rest = text.partition(BEGIN)
        return before + section + rest.partition(END)[2]
    return f"\n{section}\n\n{text.lstrip()}"


def _section(config: dict[str, Any]) -> str:
    base = config["base_model_name_or_path"] or "BASE"
    donor = config["donor"] or "none (trained from zero, or a donor in memory)"
    revision = f" (revision {config['donor_revision']})" if config["donor_revision"] else ""
    modules = config["adapted_modules"] or {}
    selected = sum(entry["selected"] for entry in modules.values())
    scale = "transfer scale λ" if config["trainable"] == "deltas" else "learned scales, which started at"
    density = "unknown" if config["density"] is None else f"{config['density']:.4g}"
    return f"""{BEGIN}
## ACT adapter

This adapter changes {selected} channels in {len(modules)} modules of its base model and nothing else
([ACT](https://arxiv.org/abs/2601.09398): localize, select, transfer, make compatible).

| | |
|---|---|
| base | {base} |
| donor | {donor}{revision} |
| density | {density} |
| {scale} | {config["transfer_scale"]} |

```python
import act_peft  # registers the method with PEFT; without it loading ends with KeyError: 'ACT'
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained("{base}")
model = PeftModel.from_pretrained(base, "path or Hub id of this adapter")
merged = model.merge_and_unload()  # an ordinary model again, if you want one
```
{END}"""
