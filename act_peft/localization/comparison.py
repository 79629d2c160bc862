"""The differences between two models on one batch."""

from __future__ import annotations

import os
import re
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from act_peft.batches.answer_tokens import AnswerTokens
from act_peft.channels.names import matches
from act_peft.errors import ActValueError
from act_peft.localization.candidates import Candidates
from act_peft.localization.sums import sum_absolute_difference
from act_peft.localization.turns import Turns


class BatchComparison:
    """Stores the outputs of the base at the answer tokens, and subtracts the outputs of the donor one by one.

    Run the base once inside `reading_base()`, then the donor once inside `reading_donor()`, then ask for `sums()`.
    Or let `take_turns` run both.

    Args:
        candidates: the compared modules.
        tokens: the answer tokens of the batch.
    """

    def __init__(self, candidates: Candidates, tokens: AnswerTokens) -> None:
        self._turns: Turns | None = None
        self._room = 0  # bytes for outputs of the base, while the models take turns
        self._candidates = candidates
        self._tokens = tokens
        self._num_comparable = candidates.num_comparable
        self._kept: dict[str, deque[torch.Tensor]] = {
            name: deque() for name in candidates.base
        }  # one [N * R, C] a call
        self._sums: dict[str, list[torch.Tensor]] = {name: [] for name in candidates.base}  # one [B, C] a call

    @contextmanager
    def reading_base(self) -> Iterator[None]:
        """Run the base inside this context.

        Raises:
            ActValueError: a candidate did not run, or its output has no row for every token.
        """
        with tap_outputs(self._candidates.base, self._keep):
            yield
        self._check_all([name for name, calls in self._kept.items() if not calls], "did not run in the base")

    @contextmanager
    def reading_donor(self) -> Iterator[None]:
        """Run the donor inside this context.

        Raises:
            ActValueError: a candidate ran more or less often than in the base, or its output has no row for every
                token.
        """
        with tap_outputs(self._candidates.donor, self._subtract):
            yield
        self._check_all([name for name, calls in self._kept.items() if calls], "ran less often in the donor")

    def take_turns(self, run_base: Callable[[], object], run_donor: Callable[[], object], *, max_bytes: int) -> None:
        """Run both models, each once, so that the base's outputs take at most about `max_bytes`.

        The modules of the two models must be different objects.

        Raises:
            ActValueError: as `reading_base` and `reading_donor`.
        """

        def read_base() -> None:
            with tap_outputs(self._candidates.base, self._keep):
                run_base()

        self._room, self._turns = max_bytes, Turns(read_base)
        with self._turns.running(), tap_outputs(self._candidates.donor, self._subtract):
            run_donor()
        self._turns = None
        idle = [name for name, calls in self._sums.items() if not calls and not self._kept[name]]
        self._check_all(idle, "did not run in the base")
        self._check_all([name for name, calls in self._kept.items() if calls], "ran less often in the donor")

    def kept(self) -> dict[str, list[torch.Tensor]]:
        """Module name -> what was kept of the base's outputs, one `[N * R, C]` for each call."""
        return {name: list(calls) for name, calls in self._kept.items()}

    def restore(self, kept: Mapping[str, Iterable[torch.Tensor]]) -> None:
        """Put back what `kept` of the same batch gave, in place of `reading_base`."""
        for name, calls in self._kept.items():
            calls.extend(rows[:, : self._num_comparable[name]] for rows in kept[name])

    def sums(self) -> dict[str, torch.Tensor]:
        """Module name -> sums of the absolute differences over the answer tokens of each sample, `[B, C]`.

        One for every comparable channel. For a module with several calls it is the mean over the calls.
        """
        return {name: torch.stack(calls).mean(0) for name, calls in self._sums.items()}

    def _rows(self, name: str, args: tuple[Any, ...], output: Any, channels: int) -> torch.Tensor:
        candidates = self._candidates
        try:
            rows = select_rows(
                output, args, self._tokens, channels=channels, positional=name in candidates.embeddings
            )  # [N * R, C]
            return rows[:, : self._num_comparable[name]]
        except ActValueError as error:
            raise ActValueError(f"{name}: {error} ({_leave_out([name], candidates.base)})") from error

    def _keep(self, name: str, args: tuple[Any, ...], output: Any) -> None:
        rows = self._rows(name, args, output, self._candidates.num_channels[name])
        self._kept[name].append(rows)
        if self._turns is not None:
            self._room -= rows.nbytes
            if self._room < 0:
                self._turns.pause()

    def _subtract(self, name: str, args: tuple[Any, ...], output: Any) -> None:
        rows = self._rows(name, args, output, self._candidates.donor_channels[name])
        while not self._kept[name] and self._turns is not None and self._turns.more():
            pass
        if not self._kept[name]:
            self._check_all([name], "ran more often in the donor")
        base_rows = self._kept[name].popleft()  # this frees memory for the donor's next modules
        self._room += base_rows.nbytes
        if base_rows.shape != rows.shape:
            raise ActValueError(
                f"{name}: donor gave {len(rows)} rows, the base {len(base_rows)}, expected the same number "
                f"({_leave_out([name], self._sums)})"
            )
        tokens = self._tokens
        repeats = len(rows) // len(tokens)  # R
        samples = tokens.samples.repeat_interleave(repeats)
        self._sums[name].append(sum_absolute_difference(rows, base_rows, samples, tokens.batch_size) / repeats)

    def _check_all(self, failing: list[str], what: str) -> None:
        if failing:
            raise ActValueError(
                f"{failing[0]}: {what}, expected every candidate to run on every batch, equally often in both models "
                f"({len(failing)} of {len(self._sums)} candidates; {_leave_out(failing, self._sums)})"
            )


def _leave_out(names: list[str], candidates: Iterable[str]) -> str:
    """Advice to exclude exactly these modules: by their common parent, by their last names, or one by one."""
    common = os.path.commonprefix(names)  # noqa: RUF071, names are no paths
    parent = common[: common.rfind(".") + 1]
    last = sorted({name.rpartition(".")[2] for name in names})
    if len(names) == 1:
        what = repr(names)
    elif parent and all(name in names for name in candidates if name.startswith(parent)):
        what = f'r"{re.escape(parent)}.*"'
    elif all(name in names for name in candidates if matches(name, last)):
        what = repr(last)
    else:
        what = f"[{names[0]!r}, {names[1]!r}, ...]"
    return f"leave them out with exclude_modules={what}"


def select_rows(
    output: torch.Tensor, args: tuple[Any, ...], tokens: AnswerTokens, *, channels: int, positional: bool
) -> torch.Tensor:
    """Copy the rows of the answer tokens out of a module's output; arguments and errors as in `locate_rows`.

    Returns:
        `[N * R, C]`, a copy; R rows for every token.
    """
    view, index = locate_rows(output, args, tokens, channels=channels, positional=positional)
    return view.index_select(0, *index) if len(index) == 1 else view[index].flatten(0, 1)


def locate_rows(
    output: torch.Tensor, args: tuple[Any, ...], tokens: AnswerTokens, *, channels: int, positional: bool
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """Where the rows of the answer tokens lie in a module's output.

    | output | rows |
    |---|---|
    | `[B, T, C]`, `[B*T, C]` | one per token |
    | `[B, T, heads, C]`, `[B, heads, T, C]` (query and key norms) | `heads` per token |
    | `[1, T, C]`, `[T, C]` of an embedding (positions, the same for every sample) | one per token |

    Args:
        output: the output of the module.
        args: its arguments. They decide between the two layouts with heads if there are as many heads as tokens.
        tokens: the N answer tokens of the batch `[B, T]`.
        channels: C.
        positional: whether an output without a batch axis may be repeated for every sample.

    Returns:
        The output in a different shape, and an index: `view[index]` is `[N, C]`, or `[N, heads, C]`. The view shares
        the memory of a contiguous output.

    Raises:
        ActValueError: the output has no row for every token.
    """
    size, length = tokens.batch_size, tokens.length
    if not isinstance(output, torch.Tensor):
        raise ActValueError(f"got an output of type {type(output).__name__}, expected a tensor")
    shape = tuple(output.shape)
    index = tokens.index_on(output.device)
    if shape in ((size, length, channels), (size * length, channels)):
        return output.reshape(size * length, channels), (index,)
    if positional and shape in ((1, length, channels), (length, channels)):
        return output.reshape(length, channels), (index % length,)
    if len(shape) == 4 and shape[0] == size and shape[3] == channels and length in shape[1:3]:
        by_token = output.transpose(1, 2) if _heads_first(shape, args, length) else output
        return by_token, (index // length, index % length)
    raise ActValueError(
        f"got an output of shape {list(shape)}, expected one row of {channels} channels for each of the "
        f"{size} x {length} tokens"
    )


def _heads_first(shape: tuple[int, ...], args: tuple[Any, ...], length: int) -> bool:
    if shape[1] != shape[2]:
        return shape[2] == length
    # As many heads as tokens. Heads come from the last axis of [B, T, heads * C], so their stride is smaller than that
    # of the tokens.
    first = args[0] if args and isinstance(args[0], torch.Tensor) else None
    return first is not None and first.dim() == 4 and first.stride(1) < first.stride(2)


class _Eager:
    """Inside the context no compiled code runs. torch has one such switch for all threads: the last one resets it."""

    def __init__(self) -> None:
        self._lock, self._users, self._switch = threading.Lock(), 0, ExitStack()

    @contextmanager
    def __call__(self) -> Iterator[None]:
        with self._lock:
            if not self._users:
                self._switch.enter_context(torch.compiler.set_stance("force_eager"))
            self._users += 1
        try:
            yield
        finally:
            with self._lock:
                self._users -= 1
                if not self._users:
                    self._switch.close()


_eager = _Eager()
OnOutput = Callable[[str, tuple[Any, ...], Any], Any]


@contextmanager
def tap_outputs(modules: Mapping[str, nn.Module], on_output: OnOutput, *, replace: bool = False) -> Iterator[None]:
    """Inside the context, every call of one of the modules also calls `on_output(name, args, output)`.

    At the end, also after an exception or Ctrl-C, exactly these hooks are removed; all other hooks stay. Hooks that
    were registered earlier have already run when `on_output` sees the output. The output is not changed, unless
    `replace` says that what `on_output` returns takes its place.
    """
    forward = _replace if replace else _forward
    handles: list[RemovableHandle] = []
    try:
        for name, module in modules.items():
            handles.append(module.register_forward_hook(partial(forward, on_output, name)))
        with _eager():  # compiled code does not call these hooks
            yield
    finally:
        for handle in handles:
            handle.remove()


def _forward(on_output: OnOutput, name: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    on_output(name, args, output)


def _replace(on_output: OnOutput, name: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    return on_output(name, args, output)
