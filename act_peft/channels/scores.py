"""One score for every channel, with its meaning and its arithmetic."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch

from act_peft.channels.contrast import contrast, mean_of_all
from act_peft.channels.masks import ChannelMask
from act_peft.channels.origin import HasOrigin, check_same_pair, join
from act_peft.channels.score_file import StoredScores, read_progress, read_scores, write_scores
from act_peft.channels.score_kinds import ScoreKind
from act_peft.channels.score_sums import checked_comparable, checked_sums, count_text
from act_peft.channels.selection import Normalization, Scope, dominance_text, select_channels
from act_peft.channels.spread import Spread
from act_peft.checks import MOST, member_of, whole_number
from act_peft.errors import ActError, ActTypeError, ActValueError, ActWarning


@dataclass(frozen=True, init=False, eq=False, repr=False)
class ChannelScores(HasOrigin, Mapping[str, torch.Tensor]):
    """One score for every channel: module name -> float64 tensor `[C]` on the CPU.

    By default the mean absolute activation difference. Equation of the paper (arXiv 2601.09398), with T the answer
    tokens of all samples:

        score_i = (1 / |T|) * sum over t in T of | a_donor[i, t] - a_base[i, t] |

    The object stores the sums and the number of tokens separately. So `a + b` of two runs of the same pair of models
    equals one run over the data of both: sums and numbers are added, then divided once. Modules are in the model's
    order. The object is immutable; every access returns a new tensor.

    Scores by contrast hold the sums on the ability and, as `keep`, the scores by activation on the data to keep. They
    are divided when a score is read. So `a + b` pools both sides honestly.

    The channels of an output layer are tokens. If one model has more tokens than the other, only the first ones, which
    both have, are comparable. The rest have the score 0, and `top` never selects them.

    Args:
        sums: module name -> sum of the scores over the tokens, floating `[C]`. Only attributions may be negative.
        num_tokens: number of tokens |T| in the sums, at least 1; 0 for scores by weight and gains, which are no
            means over tokens. There the sums are the scores.
        kind: a `ScoreKind` or its value.
        num_comparable: module name -> number of its first channels that are comparable, from 1 to C. In modules
            without an entry all channels are comparable.
        keep: for scores by contrast, the scores by activation of the same channels on the data to keep.
        spread: for scores by activation, how they vary from sample to sample, for `standard_errors`.

    Raises:
        ActTypeError: a sum that is no floating 1-D tensor, a name that is no str, a count that is no int.
        ActValueError: no module, a number of tokens that does not fit the kind, a sum that is not finite, a negative
            sum that is no attribution, a sum other than 0 for a channel that is not comparable; `keep` is missing,
            not wanted, of another kind or of other channels, or 0 everywhere; a spread that does not fit.

    Example:
        >>> sums = {"q_proj": torch.tensor([6.0, 2.0]), "up_proj": torch.tensor([4.0, 0.0])}
        >>> scores = ChannelScores(sums, num_tokens=2)
        >>> scores["q_proj"]
        tensor([3., 1.], dtype=torch.float64)
        >>> (scores + scores).num_tokens
        4
    """

    _sums: dict[str, torch.Tensor]
    _num_tokens: int
    _kind: ScoreKind
    _num_comparable: dict[str, int]  # of the modules that have fewer than C
    _keep: ChannelScores | None
    _spread: Spread | None

    def __init__(
        self,
        sums: Mapping[str, torch.Tensor],
        num_tokens: int,
        *,
        kind: str | ScoreKind = ScoreKind.ACTIVATION,
        num_comparable: Mapping[str, int] | None = None,
        keep: ChannelScores | None = None,
        spread: Spread | None = None,
    ) -> None:
        kind = member_of(ScoreKind, kind, "kind")
        num_tokens = whole_number(num_tokens, "num_tokens", least=1 if kind.is_mean else 0, most=MOST)
        if not kind.is_mean and num_tokens != 0:
            raise ActValueError(f"num_tokens: got {num_tokens}, expected 0 (scores by {kind.value} are no mean)")
        if not sums:
            raise ActValueError("sums: got no module, expected at least one")
        checked = {
            name: checked_sums(name, values, signed=kind is ScoreKind.ATTRIBUTION) for name, values in sums.items()
        }
        object.__setattr__(self, "_sums", checked)
        object.__setattr__(self, "_num_tokens", num_tokens)
        object.__setattr__(self, "_kind", kind)
        object.__setattr__(self, "_num_comparable", checked_comparable(checked, num_comparable or {}))
        object.__setattr__(self, "_keep", keep)
        self._check_keep()
        if spread is not None and kind is not ScoreKind.ACTIVATION:
            raise ActValueError(f"spread: got one for scores by {kind.value}, expected it for scores by activation")
        object.__setattr__(self, "_spread", None if spread is None else spread.checked(self.num_channels))

    def __getitem__(self, name: str) -> torch.Tensor:
        means = self._sums[name] / max(self._num_tokens, 1)
        if self._keep is None:
            return means
        keep, comparable = self._keep[name], self.num_comparable
        typical = float(keep[: comparable[name]].mean()) or mean_of_all(self._keep, comparable)
        return contrast(means, keep, typical=typical)

    def __iter__(self) -> Iterator[str]:
        return iter(self._sums)

    def __len__(self) -> int:
        return len(self._sums)

    def __contains__(self, name: object) -> bool:
        return name in self._sums

    def __repr__(self) -> str:
        total = sum(self.num_channels.values())
        text = f"{total} channels in {len(self)} modules, {self._num_tokens} tokens"
        return f"ChannelScores({text}{'' if self._kind is ScoreKind.ACTIVATION else f', by {self._kind.value}'})"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ChannelScores):
            return NotImplemented
        return (
            (self._num_tokens, self._kind, self._num_comparable, self._keep, self._spread)
            == (other._num_tokens, other._kind, other._num_comparable, other._keep, other._spread)
            and self._sums.keys() == other._sums.keys()
            and all(torch.equal(values, other._sums[name]) for name, values in self._sums.items())
        )

    def __add__(self, other: ChannelScores) -> ChannelScores:
        if not isinstance(other, ChannelScores):
            return NotImplemented
        if self._kind is not other._kind or not self._kind.is_mean:
            raise ActValueError(
                f"got scores by {self._kind.value} on the left and by {other._kind.value} on the right, expected two "
                "runs over data with the same kind of score (scores by weight and gains are no means over tokens)"
            )
        left, right = self.num_comparable, other.num_comparable
        differing = [name for name in {**left, **right} if left.get(name) != right.get(name)]
        if differing:
            name = differing[0]
            raise ActValueError(
                f"{name}: got {count_text(left.get(name))} on the left and {count_text(right.get(name))} on the "
                f"right, expected two runs of the same pair of models ({len(differing)} of {len({**left, **right})} "
                "modules differ; use the same target_modules and exclude_modules)"
            )
        check_same_pair(self._origin, other._origin)
        sums = {name: values + other._sums[name] for name, values in self._sums.items()}
        return ChannelScores(
            sums,
            self._num_tokens + other._num_tokens,
            kind=self._kind,
            num_comparable=self._num_comparable,
            keep=None if self._keep is None or other._keep is None else self._keep + other._keep,
            spread=None if self._spread is None or other._spread is None else self._spread + other._spread,
        ).with_origin(join(self._origin, other._origin))

    def _check_keep(self) -> None:
        """Refuse data to keep that do not belong to these scores.

        Raises:
            ActTypeError: `keep` is no `ChannelScores`.
            ActValueError: it is missing, not wanted, of another kind or of other channels, or 0 everywhere.
        """
        keep, by_contrast = self._keep, self._kind is ScoreKind.CONTRAST
        if keep is not None and not isinstance(keep, ChannelScores):
            raise ActTypeError(f"keep: got {type(keep).__name__}, expected ChannelScores (of the data to keep)")
        if by_contrast != (keep is not None):
            raise ActValueError(
                f"keep: got {'None' if keep is None else 'scores'} for scores by {self._kind.value}, expected "
                f"{'scores by activation on the data to keep' if by_contrast else 'None'} (scores by contrast need "
                "them, others have no place for them)"
            )
        if keep is None:
            return
        if keep._kind is not ScoreKind.ACTIVATION:
            raise ActValueError(f"keep: got scores by {keep._kind.value}, expected scores by activation")
        if self.num_comparable != keep.num_comparable or self.num_channels != keep.num_channels:
            raise ActValueError(
                "keep: got scores of other channels, expected those of the same modules (use the same pair of models, "
                "target_modules and exclude_modules)"
            )
        if any(values.any() for values in self._sums.values()) and not any(v.any() for v in keep._sums.values()):
            raise ActValueError(
                "keep: got 0 for every channel, expected differences to divide by (base and donor answer alike on the "
                "data to keep; take other data, or score='activation')"
            )

    @property
    def num_tokens(self) -> int:
        """Number of tokens N in the mean; 0 for scores by weights."""
        return self._num_tokens

    @property
    def sums(self) -> Mapping[str, torch.Tensor]:
        """Module name -> sums over the tokens, float64 `[C]`; copies."""
        return {name: values.clone() for name, values in self._sums.items()}

    @property
    def kind(self) -> ScoreKind:
        """The meaning of the scores."""
        return self._kind

    @property
    def keep(self) -> ChannelScores | None:
        """The scores by activation on the data to keep; None unless the scores are by contrast."""
        return self._keep

    @property
    def spread(self) -> Spread | None:
        """How the scores vary from sample to sample; None where it is not known, as in files of old versions."""
        return self._spread

    @property
    def num_samples(self) -> int | None:
        """Number of samples (rows of batches) in the mean; None where it is not known, as in files of old versions."""
        return None if self._spread is None else self._spread.num_samples

    @property
    def standard_errors(self) -> dict[str, torch.Tensor] | None:
        """Module name -> standard error of every score, float64 `[C]`; tokens of one sample count as dependent.

        None where it is not known: for fewer than two samples, for scores that are not by activation, for files of
        old versions, and for a sum with such scores.
        """
        spread = self._spread
        if spread is None or spread.num_samples < 2:
            return None
        return {name: spread.standard_error(name, self[name], self._num_tokens) for name in self._sums}

    @property
    def num_channels(self) -> Mapping[str, int]:
        """Module name -> number of channels C; read-only."""
        return MappingProxyType({name: values.numel() for name, values in self._sums.items()})

    @property
    def num_comparable(self) -> Mapping[str, int]:
        """Module name -> number of its first channels that both models have; read-only."""
        return MappingProxyType({**self.num_channels, **self._num_comparable})

    def top(
        self,
        density: float,
        *,
        scope: str | Scope = Scope.GLOBAL,
        normalize: str | Normalization = Normalization.NONE,
        max_channels: int | None = None,
    ) -> ChannelMask:
        """Select the channels with the highest scores.

        The number of selected channels is k = round(density * number of comparable channels), with Python's `round`
        (an exact half goes to the even number). Among equal scores the first module wins, then the lower channel.
        Negative scores (attributions: channels that would do harm) rank last, but a high density selects them too.

        Args:
            density: share of the channels to select, from 0 to 1.
            scope: `"global"` ranks the channels of all modules together (the paper), `"module"` selects the same
                share of every module.
            normalize: `"none"` ranks the scores themselves (the paper). `"rms"` first divides the scores of a module
                by their root mean square, so that modules with large activations do not take all the places. The
                order within a module stays the same, so with `scope="module"` this has no effect.
            max_channels: the most channels to select of one module, a whole number from 1. With `scope="global"` the
                places that become free go to the next best channels of other modules; with `scope="module"` they stay
                empty. Default: no limit.

        Returns:
            A mask over all modules of the scores.

        Raises:
            ActTypeError: `density` is not a number, `max_channels` not an integer.
            ActValueError: `density` is outside 0 to 1, `max_channels` below 1, or an unknown `scope` or `normalize`.

        Warns:
            ActWarning: with `scope="global"`, if one kind of module (the last part of the name, such as `down_proj`)
                holds more than half of a mask of at least ten channels, and at least twice its share of all channels.

        Example:
            >>> sums = {"q_proj": torch.tensor([6.0, 5.0]), "up_proj": torch.tensor([4.0, 0.0])}
            >>> scores = ChannelScores(sums, num_tokens=2)
            >>> scores.top(0.5)["q_proj"]
            tensor([0, 1])
            >>> scores.top(0.5, scope="module")["up_proj"]
            tensor([0])
        """
        scope = member_of(Scope, scope, "scope")
        comparable = self.num_comparable
        mask = select_channels(self, comparable, density, scope=scope, normalize=normalize, max_channels=max_channels)
        text = dominance_text(mask, comparable) if scope is Scope.GLOBAL else None
        if text is not None:
            warnings.warn(f"top: {text}", ActWarning, stacklevel=2)
        return mask.with_origin(self._origin)

    def save(self, path: str | os.PathLike[str], *, progress: tuple[str, int, str] | None = None) -> None:
        """Write the scores to one safetensors file, whole or not at all.

        Layout: one float64 tensor `[C]` per module under the module's name, the sum over the tokens, and in the
        metadata `modules: [name, ...]` in order and `num_tokens`. Version 2, which is written only if needed, has
        also `score: "activation" | "weight" | "attribution" | "gain"` and `num_comparable: {name: count}` with the
        modules that have fewer comparable channels than channels. Version 3, only for `score: "contrast"`, has
        tensors `[2, C]` (sums on the ability, sums on the data to keep) and also `num_keep_tokens`. Version 4 adds
        `origin`, as in the file of a mask, where it is known; and for scores with a spread the metadata of version 2,
        `num_samples` and `token_squares`, and tensors `[3, C]`: sums, and of the spread squares and products.

        Args:
            path: the file.
            progress: of a run that is not at its end: digest of its models and settings, number of batches so far,
                digest of these.

        Raises:
            ActValueError: `path` is a folder or lies in a folder that does not exist.
        """
        keep = None if self._keep is None else (self._keep._sums, self._keep.num_tokens)
        stored = StoredScores(
            self._sums, self._num_tokens, self._kind, self._num_comparable, keep, self._spread, self._origin
        )
        write_scores(path, stored, progress=progress)

    @staticmethod
    def read_progress(path: str | os.PathLike[str]) -> tuple[str, int, str]:
        """The `progress` that `save` wrote.

        Raises:
            ActValueError: the file is missing or damaged, or holds scores without it.
        """
        return read_progress(path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ChannelScores:
        """Read scores that `save` wrote.

        Raises:
            ActValueError: the file is missing, damaged, holds no scores, or is of a newer version.
        """
        stored = read_scores(path)
        try:
            keep = None if stored.keep is None else cls(*stored.keep, num_comparable=stored.num_comparable)
            scores = cls(
                stored.sums,
                stored.num_tokens,
                kind=stored.kind,
                num_comparable=stored.num_comparable,
                keep=keep,
                spread=stored.spread,
            )
        except ActError as error:
            raise ActValueError(f"{path}: {error}") from error
        return scores.with_origin(stored.origin)
