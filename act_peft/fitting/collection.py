"""Running the models and keeping what the fit needs of the inputs of their modules."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import nn

from act_peft.batches.answer_tokens import AnswerTokens, find_answer_tokens
from act_peft.batches.forward import Batch, forward, over_batches
from act_peft.channels.kinds import kind_of, norm_epsilon, normalize, weight_of
from act_peft.errors import ActValueError
from act_peft.fitting.elements import ElementMoments
from act_peft.fitting.moments import InputMoments
from act_peft.fitting.pair import FittedPair, double_device
from act_peft.fitting.tokens import TokenCounts
from act_peft.localization.comparison import select_rows, tap_outputs
from act_peft.localization.vocabulary import CommonVocabulary


class Positions(Enum):
    """Which tokens' inputs are counted: all that are not padding, or those that the loss counts (the answer)."""

    ALL = "all"
    ANSWER = "answer"


@dataclass(frozen=True)
class Moments:
    """The inputs of some modules on the data of every donor and on those to keep.

    Attributes:
        linear: name of a linear module -> its inputs; modules with the same input have the same object.
        elements: name of a norm -> its normalized inputs.
        tokens: name of an embedding -> how often each row is its input.
        num_tokens: counted tokens of every donor's data, and last of the data to keep.
    """

    linear: dict[str, InputMoments]
    elements: Mapping[str, ElementMoments]
    tokens: Mapping[str, TokenCounts]
    num_tokens: tuple[int, ...]


def counted_tokens(batch: Batch, positions: Positions) -> AnswerTokens:
    """The tokens of a batch whose inputs count.

    Raises:
        ActTypeError, ActValueError: as `find_answer_tokens`.
    """
    if positions is Positions.ANSWER or not isinstance(batch, Mapping):
        return find_answer_tokens(batch)
    return find_answer_tokens({name: value for name, value in batch.items() if name != "labels"})


def shared_inputs(model: nn.Module, batch: Batch, modules: Mapping[str, nn.Module]) -> dict[str, str]:
    """Which modules are called with the very same tensor, as q/k/v are, found by running the model once.

    Args:
        model: the model, in evaluation mode.
        batch: what it is run on.
        modules: name -> module of the model.

    Returns:
        Name of a module -> name of the first module that was called with its input, itself as a rule.

    Raises:
        ActValueError: a module did not run.
    """
    leaders: dict[str, str] = {}
    seen: dict[int, tuple[weakref.ref[torch.Tensor], int, str]] = {}

    def note(name: str, args: tuple[Any, ...], output: Any) -> None:
        given = args[0] if args else None
        if name in leaders or not isinstance(given, torch.Tensor):
            leaders.setdefault(name, name)
            return
        # The address of a tensor that is gone may be another's; one that was written to is another input.
        found = seen.get(id(given))
        if found is not None and found[0]() is given and found[1] == given._version:
            leaders[name] = found[2]
        else:
            leaders[name] = name
            seen[id(given)] = (weakref.ref(given), given._version, name)

    with tap_outputs(modules, note):
        forward(model, batch)
    idle = [name for name in modules if name not in leaders]
    if idle:
        raise ActValueError(
            f"{idle[0]}: did not run, expected every module to run on every batch ({len(idle)} of {len(modules)} "
            f"modules; leave them out with exclude_modules)"
        )
    return leaders


class Collector:
    """Collects the inputs of some pairs of modules.

    Args:
        pairs: the modules.
        leaders: as `shared_inputs` gives them.
        num_donors: number of donors J.
        positions: which tokens count.
    """

    def __init__(
        self,
        pairs: Sequence[FittedPair],
        leaders: Mapping[str, str],
        *,
        num_donors: int,
        positions: Positions,
    ) -> None:
        self._positions = positions
        self._linear: dict[str, InputMoments] = {}
        self._elements: dict[str, ElementMoments] = {}
        self._tokens: dict[str, TokenCounts] = {}
        self._leaders: dict[str, InputMoments] = {}  # name of the module that is tapped -> what it fills
        self._num_tokens = [0] * (num_donors + 1)
        shared: dict[tuple[str, bool], InputMoments] = {}
        for pair in pairs:
            if pair.is_embedding:
                counts = TokenCounts(pair.name, pair.num_rows, num_donors=num_donors)
                self._tokens |= {name: counts for name in pair.names if name != pair.head}
            elif pair.kind.is_norm:
                self._elements[pair.name] = ElementMoments(
                    pair.name, pair.width, num_donors=num_donors, has_bias=pair.has_bias
                )
            if pair.linear is not None:
                has_bias = pair.has_bias and not pair.is_embedding
                key = (leaders[pair.linear], has_bias)
                if key not in shared:
                    shared[key] = InputMoments(
                        pair.linear,
                        pair.width,
                        num_donors=num_donors,
                        has_bias=has_bias,
                        device=double_device(weight_of(pair.base).device),
                    )
                    self._leaders[pair.linear] = shared[key]
                self._linear[pair.linear] = shared[key]

    def read(
        self,
        model: nn.Module,
        source: int,
        batches: Iterable[Batch],
        vocabulary: CommonVocabulary,
        *,
        argument: str,
        show_progress: bool,
    ) -> None:
        """Run a model on its data.

        Args:
            model: donor number `source`, or the base for the data to keep.
            source: number of the donor, or J.
            batches: the data.
            vocabulary: the tokens that all models know.
            argument: where the data came in, for messages.
            show_progress: show a progress bar if the error stream is a terminal.

        Raises:
            ActTypeError, ActValueError: batches as `localize` refuses them; a module whose input has no row for every
                token.
        """
        named = dict(model.named_modules())
        tapped = {name: named[name] for name in (*self._leaders, *self._elements, *self._tokens)}

        def read(batch: Batch) -> None:
            tokens = counted_tokens(batch, self._positions)
            vocabulary.check(batch)
            with tap_outputs(tapped, lambda name, args, _: self._note(source, name, tapped[name], args, tokens)):
                forward(model, batch)
            self._num_tokens[source] += len(tokens)

        over_batches(batches, read, argument=argument, show_progress=show_progress, description="fit")

    def moments(self) -> Moments:
        """What was collected."""
        return Moments(self._linear, self._elements, self._tokens, tuple(self._num_tokens))

    def _note(self, source: int, name: str, module: nn.Module, args: tuple[Any, ...], tokens: AnswerTokens) -> None:
        given = args[0] if args else None
        try:
            if name in self._tokens:
                self._tokens[name].add_(source, _select_ids(given, tokens))
            elif name in self._elements:
                kind = kind_of(module)
                rows = _select_rows(given, args, tokens)
                self._elements[name].add_(source, normalize(rows, kind, norm_epsilon(module)))
            else:
                self._leaders[name].add_(source, _select_rows(given, args, tokens))
        except ActValueError as error:
            raise ActValueError(f"{name}: {error} (leave it out with exclude_modules=[{name!r}])") from error


def _select_rows(given: Any, args: tuple[Any, ...], tokens: AnswerTokens) -> torch.Tensor:
    """The inputs of the counted tokens, `[N * R, I]`, a copy."""
    if not isinstance(given, torch.Tensor):
        raise ActValueError(f"got an input of type {type(given).__name__}, expected a tensor as its first argument")
    try:
        return select_rows(given, args, tokens, channels=given.shape[-1], positional=False)
    except ActValueError as error:
        raise ActValueError(str(error).replace("an output", "an input").replace("channels", "inputs")) from error


def _select_ids(given: Any, tokens: AnswerTokens) -> torch.Tensor:
    """The ids of the counted tokens, `[N]`; positions may be the same for every sample."""
    size, length = tokens.batch_size, tokens.length
    if not isinstance(given, torch.Tensor) or given.shape not in ((size, length), (1, length), (length,)):
        got = list(given.shape) if isinstance(given, torch.Tensor) else type(given).__name__
        raise ActValueError(f"got an input {got}, expected one id for each of the {size} x {length} tokens")
    index = tokens.index_on(given.device)
    flat = given.reshape(-1)
    return flat[index] if flat.numel() == size * length else flat[index % length]
