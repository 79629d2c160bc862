"""The configuration of an adapter from a stranger, before PEFT acts on it: expressions and numbers."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from act_peft.disk.shard import Shard
from act_peft.errors import ActValueError
from act_peft.patterns import KeyPatterns, LinearPattern

_ALL_LINEAR = "all-linear"  # PEFT's word for every linear module, no expression
_NAME = re.compile(r"[\w.-]*")
_MORE_PATTERNS = 100  # keys of a pattern beyond one for each module


def check_foreign_config_(config: Any, modules: Sequence[str], shard: Shard) -> None:
    """Put names of modules in the place of expressions, and refuse ranks that no tensor has.

    PEFT matches expressions with `re`, which can take for ever, and creates what a rank asks for before it reads the
    tensors.

    Args:
        config: the configuration of a PEFT adapter, changed in place.
        modules: names of the modules of the base.
        shard: the adapter's tensors.

    Raises:
        ActValueError: an expression that cannot be matched in linear time, or such a rank.
    """
    largest = max((size for info in shard.tensors.values() for size in info.shape), default=0)
    for name, value in list(vars(config).items()):
        if name.endswith("modules") and isinstance(value, str) and value.lower() != _ALL_LINEAR:
            pattern = LinearPattern(value)
            setattr(config, name, {module for module in modules if pattern.matches(module)})
        elif name.endswith("_pattern") and isinstance(value, Mapping):
            keys = KeyPatterns(value, most=len(modules) + _MORE_PATTERNS)
            found = {module: keys.first(module) for module in modules}
            setattr(config, name, {f"^{re.escape(m)}": value[key] for m, key in found.items() if key is not None})
        elif name in ("modules_to_save", "layers_pattern") and value is not None:
            bad = [one for one in ([value] if isinstance(value, str) else value) if not _NAME.fullmatch(str(one))]
            if bad:
                raise ActValueError(f"{name}: got {str(bad[0])[:80]!r}, expected names of modules (write their names)")
        if name == "r" or "rank" in name:
            for rank in getattr(config, name).values() if name.endswith("_pattern") and value else [value]:
                if type(rank) is int and rank > largest:
                    raise ActValueError(
                        f"{name}: got {rank}, expected at most {largest}, the largest size of the adapter's tensors "
                        "(adapter_config.json does not belong to the tensors)"
                    )
