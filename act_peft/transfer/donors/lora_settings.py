"""The `adapter_config.json` of a LoRA adapter: which settings can be read as rows, and what its file must hold."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from act_peft.channels.names import suffixes
from act_peft.checks import finite_number, whole_number
from act_peft.errors import ActLoadError, ActTypeError, ActValueError
from act_peft.patterns import KeyPatterns

MERGE_IT = "merge the adapter with model.merge_and_unload(), save the model and name its folder as donor"
# Settings that do not change what a trained adapter adds to the base, or that its tensors show.
_WITHOUT_EFFECT = {
    *("auto_mapping", "base_model_name_or_path", "exclude_modules", "fan_in_fan_out", "inference_mode"),
    *("layers_pattern", "layers_to_transform", "lora_dropout", "megatron_core", "peft_type", "peft_version"),
    *("qalora_group_size", "revision", "target_modules", "task_type"),
    *("corda_config", "eva_config", "loftq_config", "lora_ga_config"),  # of the initialization, which is read
}
_READ = {
    *("alpha_pattern", "bias", "init_lora_weights", "lora_alpha", "lora_bias", "modules_to_save"),
    *("r", "rank_pattern", "use_dora", "use_rslora"),
}
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # initializations that change the base
_BIASES = ("none", "all", "lora_only")
_MORE_PATTERNS = 100  # entries of a pattern beyond one for each tensor


@dataclass(frozen=True)
class LoraSettings:
    """What the configuration of a LoRA adapter says.

    Attributes:
        where: the adapter, for messages.
        content: the content of the file.
        use_rslora, use_dora, lora_bias: as in PEFT.
        bias: "none", "all" or "lora_only".
        modules_to_save: ends of the names of modules that are saved as a whole.
        patterns: "rank_pattern" and "alpha_pattern" -> its keys.
    """

    where: str
    content: Mapping[str, Any]
    use_rslora: bool
    use_dora: bool
    lora_bias: bool
    bias: str
    modules_to_save: tuple[str, ...]
    patterns: Mapping[str, KeyPatterns]

    def rank_and_alpha(self, module: str) -> tuple[int, float]:
        """Rank and alpha of a module."""
        rank, alpha = (
            self._for_module(module, pattern, general)
            for pattern, general in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha"))
        )
        try:
            return whole_number(rank, f"rank of {module}", least=1), finite_number(alpha, f"lora_alpha of {module}")
        except (ActTypeError, ActValueError) as error:
            raise ActValueError(f"{self.where}: adapter_config.json: {error}") from error

    def _for_module(self, module: str, pattern: str, general: str) -> Any:
        key = self.patterns[pattern].first(module)
        return self.content.get(general) if key is None else self.content[pattern][key]

    def check_parts(self, name: str, parts: Collection[str], *, has_bias: bool) -> None:
        """Check that a module has the tensors that the configuration says.

        Args:
            name: the module.
            parts: of its tensors in the file: a, b, b_bias, magnitude, weight, bias.
            has_bias: whether the base's module has a bias.

        Raises:
            ActLoadError: one is missing, or there is one that is not wanted.
        """
        factors = "a" in parts or "b" in parts
        wanted = {
            "a": factors,
            "b": factors,
            "magnitude": factors and self.use_dora,
            "b_bias": factors and self.lora_bias,
        }
        for part, is_wanted in wanted.items():
            if is_wanted != (part in parts):
                raise ActLoadError(
                    f"{self.where}: {name} has {'no' if is_wanted else 'a'} {_WORDS[part]}, expected "
                    f"{'one' if is_wanted else 'none'} by its adapter_config.json and its other tensors (the file is "
                    "incomplete, or belongs to a different configuration)"
                )
        if self.bias == "lora_only" and factors and has_bias and "bias" not in parts:
            raise ActLoadError(f"{self.where}: {name} has no bias, expected one with bias='lora_only' (incomplete)")

    def check_modules(self, found: Mapping[str, Collection[str]], base: Sequence[str]) -> None:
        """Check that no module is missing in the file, as far as its configuration and the base can tell.

        Args:
            found: module -> its parts in the file, by the base's names.
            base: names of the base's parameters.

        Raises:
            ActLoadError: one is missing.
        """
        modules = {name.rpartition(".")[0] for name in base if name.endswith(".weight")}
        factored = {name for name, parts in found.items() if "b" in parts}
        lost = [f"modules_to_save has {end!r}" for end in self.modules_to_save if not _any_like(found, end, "weight")]
        targets = self.content.get("target_modules")
        if isinstance(targets, (list, str)) and all(isinstance(each, str) for each in targets):
            listed = targets if isinstance(targets, list) else []
            lost += [f"target_modules has {end!r}" for end in listed if not _any_like(found, end, "b")]
            if not any(self.content.get(name) for name in ("exclude_modules", "layers_to_transform")):
                kinds = {_unnumbered(name) for name in factored}
                wanted = {n for n in modules if _unnumbered(n) in kinds and set(suffixes(n)) & set(listed)}
                lost += [f"the base has {name}" for name in sorted(wanted - factored)]
        if self.bias == "all":
            biases = [name.rpartition(".")[0] for name in base if name.endswith(".bias")]
            lost += [
                f"bias='all' and the base has {name}.bias" for name in biases if "bias" not in found.get(name, ())
            ]
        if lost:
            raise ActLoadError(
                f"{self.where}: {lost[0]}, expected its tensors in the file too ({len(lost)} are missing; the file is "
                "incomplete)"
            )


_WORDS = {"a": "lora_A", "b": "lora_B", "magnitude": "lora_magnitude_vector", "b_bias": "lora_B.bias"}


def _any_like(found: Mapping[str, Collection[str]], end: str, part: str) -> bool:
    return any(part in parts and f".{name}".endswith(f".{end}") for name, parts in found.items())


def _unnumbered(name: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "#", name)


def lora_settings(where: str, content: Mapping[str, Any], *, most_patterns: int) -> LoraSettings:
    """Read the configuration of a LoRA adapter.

    Args:
        where: the adapter, for messages.
        content: of its `adapter_config.json`.
        most_patterns: about as many entries of a pattern are read.

    Raises:
        ActValueError: a variant of LoRA whose difference has no such rows, or a setting that is not known here; a
            value of a wrong type.
    """
    unsupported = [
        name for name, value in content.items() if name not in _WITHOUT_EFFECT | _READ and value not in _NOTHING
    ]
    start = str(content.get("init_lora_weights")).lower()
    if start.startswith(_CHANGES_BASE):
        unsupported.append(f"init_lora_weights={start[:40]!r}")
    if unsupported:
        raise ActValueError(
            f"{where}: the adapter uses {', '.join(unsupported)[:300]}, expected plain LoRA, rsLoRA or DoRA "
            f"({MERGE_IT})"
        )
    flags = {name: content.get(name, False) for name in ("use_rslora", "use_dora", "lora_bias")}
    wrong = [name for name, value in flags.items() if not isinstance(value, bool)]
    if wrong:
        raise ActValueError(
            f"{where}: adapter_config.json: {wrong[0]} is {str(flags[wrong[0]])[:40]}, expected true or false"
        )
    bias, saved = content.get("bias", "none"), content.get("modules_to_save") or []
    if bias not in _BIASES:
        raise ActValueError(f"{where}: adapter_config.json: bias is {str(bias)[:40]}, expected one of {_BIASES}")
    if not isinstance(saved, list) or not all(isinstance(name, str) for name in saved):
        raise ActValueError(f"{where}: adapter_config.json: modules_to_save is {str(saved)[:80]}, expected names")
    patterns = {name: _patterns(where, content, name, most_patterns) for name in ("rank_pattern", "alpha_pattern")}
    return LoraSettings(where, content, bias=bias, modules_to_save=tuple(saved), patterns=patterns, **flags)


def _patterns(where: str, content: Mapping[str, Any], name: str, most: int) -> KeyPatterns:
    patterns = content.get(name) or {}
    if not isinstance(patterns, dict):
        raise ActValueError(
            f"{where}: adapter_config.json: {name} is {str(patterns)[:80]}, expected names of modules with numbers"
        )
    try:
        return KeyPatterns(patterns, most=most + _MORE_PATTERNS)
    except ActValueError as error:
        raise ActValueError(f"{where}: adapter_config.json: {name}: {error}") from error


_NOTHING: Iterable[Any] = (None, False, {}, [], "")
