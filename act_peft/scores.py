"""How differently two models answer, per channel, and the selection of the top channels."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from types import MappingProxyType

import torch

from act_peft import tensorfile
from act_peft.choices import member_of
from act_peft.errors import ActError, ActTypeError, ActValueError
from act_peft.masks import ChannelMask

_KIND = "channel scores"
_VERSION = 1


class Scope(Enum):
    """Among which channels `ChannelScores.top` ranks: all modules together (the paper), or each module by itself."""

    GLOBAL = "global"
    MODULE = "module"


class Normalization(Enum):
    """What `ChannelScores.top` does to the scores of a module before it ranks them."""

    NONE = "none"
    RMS = "rms"


@dataclass(frozen=True, init=False, eq=False, repr=False)
class ChannelScores(Mapping[str, torch.Tensor]):
    """Mean absolute activation difference of every channel: module name -> float64 tensor `[C]` on the CPU.

    Equation of the paper (arXiv 2601.09398), with T the answer tokens of all samples:

        score_i = (1 / |T|) * sum over t in T of | a_donor[i, t] - a_base[i, t] |

    The sums and the number of tokens are kept apart, so `a + b` pools two runs of the same pair of models exactly as
    one run over the data of both would: sums and counts are added, and divided once. Modules are in the model's
    order. The object is immutable; every access hands out a new tensor.

    Args:
        sums: module name -> sum of the absolute differences over the tokens, floating `[C]`.
        num_tokens: number of tokens |T| that were summed, at least 1.

    Raises:
        ActTypeError: sums that are not floating 1-D tensors, names that are no str, `num_tokens` that is no int.
        ActValueError: no module, no token, a negative or non-finite sum.
    """

    _sums: dict[str, torch.Tensor]
    _num_tokens: int

    def __init__(self, sums: Mapping[str, torch.Tensor], num_tokens: int) -> None:
        if not isinstance(num_tokens, int) or isinstance(num_tokens, bool):
            raise ActTypeError(f"num_tokens: got {num_tokens!r}, expected an int")
        if num_tokens < 1:
            raise ActValueError(f"num_tokens: got {num_tokens}, expected at least 1")
        if not sums:
            raise ActValueError("sums: got no module, expected at least one")
        object.__setattr__(self, "_sums", {name: _checked_sums(name, values) for name, values in sums.items()})
        object.__setattr__(self, "_num_tokens", num_tokens)

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._sums[name] / self._num_tokens

    def __iter__(self) -> Iterator[str]:
        return iter(self._sums)

    def __len__(self) -> int:
        return len(self._sums)

    def __contains__(self, name: object) -> bool:
        return name in self._sums

    def __repr__(self) -> str:
        total = sum(self.num_channels.values())
        return f"ChannelScores({total} channels in {len(self)} modules, {self._num_tokens} tokens)"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ChannelScores):
            return NotImplemented
        return (
            self._num_tokens == other._num_tokens
            and self._sums.keys() == other._sums.keys()
            and all(torch.equal(values, other._sums[name]) for name, values in self._sums.items())
        )

    def __add__(self, other: ChannelScores) -> ChannelScores:
        if not isinstance(other, ChannelScores):
            return NotImplemented
        mine, theirs = self.num_channels, other.num_channels
        differing = [name for name in {**mine, **theirs} if mine.get(name) != theirs.get(name)]
        if differing:
            name = differing[0]
            raise ActValueError(
                f"{name}: got {_in_words(mine.get(name))} on the left and {_in_words(theirs.get(name))} on the right, "
                f"expected two runs of the same pair of models ({len(differing)} of {len({**mine, **theirs})} modules "
                "differ; use the same target_modules and exclude_modules)"
            )
        sums = {name: values + other._sums[name] for name, values in self._sums.items()}
        return ChannelScores(sums, self._num_tokens + other._num_tokens)

    @property
    def num_tokens(self) -> int:
        """Number of answer tokens N that the scores are a mean over."""
        return self._num_tokens

    @property
    def num_channels(self) -> Mapping[str, int]:
        """Module name -> number of channels C; read-only."""
        return MappingProxyType({name: values.numel() for name, values in self._sums.items()})

    def top(
        self,
        density: float,
        *,
        scope: str | Scope = Scope.GLOBAL,
        normalize: str | Normalization = Normalization.NONE,
    ) -> ChannelMask:
        """Select the channels with the highest scores.

        k = round(density * number of channels) channels are taken; an exact half is rounded to the even k, as by
        Python's `round`. Among equal scores, the module that comes first wins, then the lower channel.

        Args:
            density: share of the channels to select, from 0 to 1.
            scope: `"global"` ranks the channels of all modules together (the paper), `"module"` takes the share of
                every module by itself.
            normalize: `"none"` ranks the scores themselves (the paper), `"rms"` divides the scores of a module by
                their root mean square first, so that modules with large activations do not crowd out the others. The
                order within a module stays, so it changes nothing with `scope="module"`.

        Returns:
            A mask over all modules of the scores.

        Raises:
            ActTypeError: `density` is not a number.
            ActValueError: `density` is outside 0 to 1, or an unknown `scope` or `normalize`.
        """
        density = _checked_density(density)
        select = _SELECTIONS[member_of(Scope, scope, "scope")]
        rescale = _NORMALIZATIONS[member_of(Normalization, normalize, "normalize")]
        ranked = {name: rescale(scores) for name, scores in self.items()}
        return ChannelMask(select(ranked, density), self.num_channels)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the scores to one safetensors file, whole or not at all.

        Layout: one float64 tensor `[C]` per module under the module's name, the sum over the tokens, and in the
        metadata `modules: [name, ...]` in order and `num_tokens`.

        Raises:
            ActValueError: `path` is a folder or lies in a folder that does not exist.
        """
        metadata = {"modules": list(self._sums), "num_tokens": self._num_tokens}
        tensorfile.write(path, _KIND, _VERSION, self._sums, metadata)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ChannelScores:
        """Read scores that `save` wrote.

        Raises:
            ActValueError: the file is missing, damaged, holds no scores, or is of a newer version.
        """
        tensors, metadata = tensorfile.read(path, _KIND, _VERSION)
        modules = metadata.get("modules")
        if not isinstance(modules, list) or sorted(map(str, modules)) != sorted(tensors):
            raise ActValueError(
                f"{path}: got tensors for {len(tensors)} modules, expected exactly those that its metadata lists "
                "(save the scores again)"
            )
        try:
            return cls({name: tensors[name] for name in modules}, metadata.get("num_tokens"))  # type: ignore[arg-type]
        except ActError as error:
            raise ActValueError(f"{path}: {error}") from error


def _checked_sums(name: str, values: torch.Tensor) -> torch.Tensor:
    """A private float64 copy `[C]` of one module's sums."""
    if not isinstance(name, str):
        raise ActTypeError(f"{name!r}: got {type(name).__name__} as a module name, expected a str")
    if not isinstance(values, torch.Tensor) or not values.is_floating_point():
        got = values.dtype if isinstance(values, torch.Tensor) else type(values).__name__
        raise ActTypeError(f"{name}: got {got}, expected a floating point tensor [C]")
    if values.dim() != 1 or values.numel() == 0:
        raise ActTypeError(f"{name}: got sums of shape {list(values.shape)}, expected [C]")
    values = values.detach().to(device="cpu", dtype=torch.float64, copy=True)
    wrong = (~torch.isfinite(values) | (values < 0)).nonzero()
    if wrong.numel():
        channel = int(wrong[0])
        raise ActValueError(
            f"{name}: got {float(values[channel])} for channel {channel}, expected finite sums of absolute "
            f"differences ({len(wrong)} of {values.numel()} channels are wrong)"
        )
    return values


def _checked_density(density: float) -> float:
    if isinstance(density, (bool, str)):
        raise ActTypeError(f"density: got {density!r}, expected a number from 0 to 1")
    try:
        value = float(density)
    except (TypeError, ValueError) as error:
        raise ActTypeError(f"density: got {density!r}, expected a number from 0 to 1") from error
    if not 0 <= value <= 1:  # also false for NaN
        raise ActValueError(f"density: got {density}, expected a number from 0 to 1 (5% is 0.05)")
    return value


def _in_words(count: int | None) -> str:
    return "no such module" if count is None else f"{count} channels"


def _top_indices(values: torch.Tensor, density: float) -> torch.Tensor:
    """Indices `[K]` of the highest values; the sort is stable, so the lower index wins among equals."""
    return values.sort(descending=True, stable=True).indices[: round(density * values.numel())]


def _select_global(scores: Mapping[str, torch.Tensor], density: float) -> dict[str, torch.Tensor]:
    everything = torch.cat(list(scores.values()))
    selected = torch.zeros(everything.numel(), dtype=torch.bool)
    selected[_top_indices(everything, density)] = True
    parts = selected.split([values.numel() for values in scores.values()])
    return {name: part.nonzero().flatten() for name, part in zip(scores, parts, strict=True)}


def _select_per_module(scores: Mapping[str, torch.Tensor], density: float) -> dict[str, torch.Tensor]:
    return {name: _top_indices(values, density) for name, values in scores.items()}


def _divide_by_rms(scores: torch.Tensor) -> torch.Tensor:
    largest = float(scores.max())
    if largest == 0:
        return scores
    scores = scores / largest  # before squaring, so that neither huge nor tiny scores leave the range of float64
    return scores / math.sqrt(float(scores.square().mean()))


_SELECTIONS: dict[Scope, Callable[[Mapping[str, torch.Tensor], float], dict[str, torch.Tensor]]] = {
    Scope.GLOBAL: _select_global,
    Scope.MODULE: _select_per_module,
}

_NORMALIZATIONS: dict[Normalization, Callable[[torch.Tensor], torch.Tensor]] = {
    Normalization.NONE: lambda scores: scores,
    Normalization.RMS: _divide_by_rms,
}
