"""The modules of base and donors that are fitted, and their differences, block by block."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from act_peft.channels.kinds import ChannelKind, features, is_quantized, kind_of, weight_of
from act_peft.channels.names import Patterns
from act_peft.errors import ActValueError
from act_peft.localization.candidates import find_candidates
from act_peft.shards import is_shared_out

_EVERY_MODULE = r".*"  # named, so that output layer and token embedding are candidates as well


@dataclass(frozen=True)
class FittedPair:
    """A module of the base and the same one of every donor, or several that share one weight.

    Attributes:
        name: name of the first of them, under which the result stands.
        names: all of them; more than one for tied embeddings.
        kind: of the module; `EMBEDDING` for tied ones.
        base: module of the base.
        donors: that of each donor.
        head: name of the output layer among `names`, None without one.
    """

    name: str
    names: tuple[str, ...]
    kind: ChannelKind
    base: nn.Module
    donors: tuple[nn.Module, ...]
    head: str | None = None

    @property
    def is_embedding(self) -> bool:
        """Whether the rows are tokens."""
        return self.kind is ChannelKind.EMBEDDING

    @property
    def linear(self) -> str | None:
        """Name of the linear module whose inputs count: the module itself, or the output layer of tied ones."""
        return self.head if self.is_embedding else None if self.kind.is_norm else self.name

    @property
    def width(self) -> int:
        """Number of inputs I of a linear module, of channels C of others."""
        return features(self.base)[1 if self.kind.is_norm or self.is_embedding else 0]

    @property
    def num_rows(self) -> int:
        """Number of rows that are fitted: channels, or tokens of an embedding."""
        return int(weight_of(self.base).shape[0]) if self.is_embedding else features(self.base)[1]

    @property
    def has_bias(self) -> bool:
        """Whether the base's module has a bias; that of a tied output layer is not fitted."""
        return getattr(self.base, "bias", None) is not None

    def differences(self, rows: slice) -> list[torch.Tensor]:
        """Donor minus base of some rows, with the bias's as a last column; zero for rows that a donor does not have.

        Args:
            rows: a range of channels; of tokens for an embedding.

        Returns:
            float64 `[r, I]`, or `[r, I + 1]`, for each donor, on the device of the base's module.

        Raises:
            ActValueError: weights that are not finite.
        """
        mine = self._rows(self.base, rows)
        found = []
        for donor in self.donors:
            theirs = self._rows(donor, rows).to(mine.device)
            found.append(nn.functional.pad(theirs - mine[: len(theirs)], (0, 0, 0, len(mine) - len(theirs))))
        if not all(bool(torch.isfinite(difference).all()) for difference in found):
            raise ActValueError(
                f"{self.name}: base or donor has weights that are not finite, expected finite numbers (NaN or "
                "infinite: is a checkpoint damaged?)"
            )
        return found

    def _rows(self, module: nn.Module, rows: slice) -> torch.Tensor:
        weight = weight_of(module).detach()
        if self.kind.is_norm:
            weight = weight[:, None]
        elif self.kind is ChannelKind.CONV1D:
            weight = weight.T
        part = weight[rows].to(double_device(weight.device), torch.float64)  # [r, I]
        if not self.has_bias:
            return part
        bias = getattr(module, "bias").detach()[rows].to(part)  # noqa: B009 (typed too loosely as an attribute)
        return torch.cat((part, bias[:, None]), dim=1)


def find_pairs(
    base: nn.Module,
    donors: Sequence[nn.Module],
    *,
    target_modules: Patterns = None,
    exclude_modules: Patterns = None,
) -> list[FittedPair]:
    """The modules that are fitted, in the base's order; modules that share a weight are one.

    Args:
        base: the base, without adapters in it.
        donors: the donors, likewise.
        target_modules: as in `localize`; by default every module that has channels, output layer and embeddings
            included.
        exclude_modules: as in `localize`.

    Raises:
        ActValueError: nothing is left; models that differ in structure; quantized weights or weights without data;
            a weight that is shared in another way than between embeddings and one output layer.
    """
    targets = _EVERY_MODULE if target_modules is None else target_modules
    found = [find_candidates(base, donor, target_modules=targets, exclude_modules=exclude_modules) for donor in donors]
    modules = found[0].base
    for number, one in enumerate(found):
        _check_weights("base", one.base)
        _check_weights(f"donor {number}" if len(donors) > 1 else "donor", one.donor)
    by_weight: dict[int, list[str]] = {}
    for name, module in modules.items():
        by_weight.setdefault(id(module.weight), []).append(name)
    return [_pair(names, modules, [one.donor for one in found]) for names in by_weight.values()]


def _pair(
    names: Sequence[str], base: Mapping[str, nn.Module], donors: Sequence[Mapping[str, nn.Module]]
) -> FittedPair:
    kinds = {name: kind_of(base[name]) for name in names}
    for donor in donors:
        for name in names:
            has_bias = [getattr(module[name], "bias", None) is not None for module in (base, donor)]
            if has_bias[0] != has_bias[1]:
                words = ["a bias" if one else "no bias" for one in has_bias]
                raise ActValueError(
                    f"{name}: the base has {words[0]}, the donor {words[1]}, expected two models of the same "
                    f"structure (leave it out with exclude_modules=[{name!r}])"
                )
        if len({id(donor[name].weight) for name in names}) > 1:
            raise ActValueError(
                f"{names[0]}: shares its weight with {names[1]} in the base, but not in the donor, expected two "
                f"models that both tie them (leave one out with exclude_modules=[{names[1]!r}])"
            )
    embeddings = [name for name in names if kinds[name] is ChannelKind.EMBEDDING]
    others = [name for name in names if name not in embeddings]
    if len(names) > 1 and (not embeddings or len(others) > 1 or kinds[others[0] if others else names[0]].is_norm):
        raise ActValueError(
            f"{names[0]}: shares its weight with {names[1]}, expected that only of embeddings and one output layer "
            f"(leave them out with exclude_modules={list(names)})"
        )
    first = embeddings[0] if embeddings else names[0]
    return FittedPair(
        name=first,
        names=(*embeddings, *others),
        kind=kinds[first],
        base=base[first],
        donors=tuple(donor[first] for donor in donors),
        head=others[0] if embeddings and others else None,
    )


def _check_weights(where: str, modules: Mapping[str, nn.Module]) -> None:
    quantized = [name for name, module in modules.items() if is_quantized(module)]
    if quantized:
        raise ActValueError(
            f"{quantized[0]}: the {where}'s weight is quantized, expected plain numbers, which the change is taken "
            f"from ({len(quantized)} of {len(modules)} modules are quantized; load the original model)"
        )
    parts = [name for name, module in modules.items() if is_shared_out(weight_of(module))]
    if parts:
        raise ActValueError(
            f"{parts[0]}: the {where}'s weight is spread over processes, expected a model in one piece ({len(parts)} "
            f"of {len(modules)} modules; fit before FSDP or ZeRO 3 wraps it)"
        )
    empty = [name for name, module in modules.items() if weight_of(module).device.type == "meta"]
    if empty:
        raise ActValueError(
            f"{empty[0]}: the {where}'s weight has no data in memory (device meta), expected a loaded model "
            f"({len(empty)} of {len(modules)} modules; load it without offloading to CPU memory or disk)"
        )


def double_device(device: torch.device) -> torch.device:
    """The device, or the CPU where it has no float64."""
    return torch.device("cpu") if device.type == "mps" else device
