"""Names and configuration of a LoRA adapter, as PEFT reads them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from peft import LoraConfig

from act_peft.doors import OUTER
from act_peft.errors import ActValueError


def factor_keys(module: str, *, is_embedding: bool = False) -> tuple[str, str]:
    """The keys of A `[r, I]` and B `[O, r]` of a module; for an embedding A is `[r, V]` and B `[H, r]`."""
    if is_embedding:
        return f"{OUTER}{module}.lora_embedding_A", f"{OUTER}{module}.lora_embedding_B"
    return f"{OUTER}{module}.lora_A.weight", f"{OUTER}{module}.lora_B.weight"


def bias_key(module: str) -> str:
    """The key of the bias `[O]` that goes with B, with `lora_bias`."""
    return f"{OUTER}{module}.lora_B.bias"


def whole_key(module: str, part: str) -> str:
    """The key of the "weight" or "bias" of a module that is saved as a whole."""
    return f"{OUTER}{module}.{part}"


def module_of(key: str) -> str:
    """The module that a key of an adapter's file belongs to."""
    return re.split(r"\.(?:lora_|modules_to_save|token_adapter|weight$|bias$)", key.removeprefix(OUTER))[0]


def lora_config(
    ranks: Mapping[str, int],
    *,
    known: Iterable[str],
    whole: Iterable[str] = (),
    modules_to_save: Iterable[str] = (),
    **settings: Any,
) -> LoraConfig:
    """The configuration of an adapter with alpha = rank, which means these modules and no others.

    Args:
        ranks: module name -> rank.
        known: names of the base's modules, as far as they are known.
        whole: names of modules that are saved as a whole.
        modules_to_save: entries of the same kind that the user chose.
        settings: others of `LoraConfig`.

    Raises:
        ActValueError: PEFT would take the name of a whole module for another one too.
    """
    known, whole = list(known), list(whole)
    # To PEFT an entry of `modules_to_save` is the end of a name ...
    for name in whole:
        also_meant = [other for other in known if other != name and other.endswith(name)]
        if also_meant:
            raise ActValueError(
                f"{name}: cannot be saved as a whole, because PEFT would save {also_meant[0]} too (merge the "
                "adapter with merge_checkpoint or merge_and_unload)"
            )
    # ... and an entry of `target_modules` is a name or its dotted end. It matches a pattern with the end of a name
    # unless it begins with "^".
    excluded = [n for n in known if n not in ranks and any(n.endswith(f".{target}") for target in ranks)]
    top = max(ranks.values())
    pattern = {f"^{re.escape(name)}": rank for name, rank in ranks.items() if rank != top}
    config = LoraConfig(
        inference_mode=True,
        r=top,
        lora_alpha=top,
        rank_pattern=pattern,
        alpha_pattern=dict(pattern),
        target_modules=list(ranks),
        exclude_modules="|".join(map(re.escape, excluded)) or None,
        lora_dropout=0.0,
        bias="none",
        modules_to_save=[*modules_to_save, *whole] or None,
        **settings,
    )
    config.target_modules = sorted(ranks)  # LoraConfig makes a set, whose order changes from run to run
    return config
