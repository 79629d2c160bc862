"""Reading the outputs of modules while a model runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

OnOutput = Callable[[str, tuple[Any, ...], Any], None]


@contextmanager
def tap_outputs(modules: Mapping[str, nn.Module], on_output: OnOutput) -> Iterator[None]:
    """Inside the context, every call of one of the modules also calls `on_output(name, args, output)`.

    Exactly the hooks that were registered here are removed at the end, also after an exception or Ctrl-C; other hooks
    stay, and those registered earlier have run when `on_output` sees the output. The output itself is not changed.
    """
    handles: list[RemovableHandle] = []
    try:
        for name, module in modules.items():
            handles.append(module.register_forward_hook(partial(_forward, on_output, name)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _forward(on_output: OnOutput, name: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    on_output(name, args, output)
