"""A language model without its backbone: from last hidden states to logits, the way the model itself goes."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from transformers.utils import ModelOutput

from act_peft.batches.evaluation import evaluation
from act_peft.batches.forward import forward
from act_peft.batches.predictions import Predictions, logits_of
from act_peft.layers.lookup import output_head
from act_peft.peft_modules import _WRAPPERS, plain_layer, without_wrapper
from act_peft.training.answer_logits import only_at, same_logits

logger = logging.getLogger(__name__)

_DEEPEST = 2  # `model`, `transformer`; or `model.decoder`
# What a model says to a backbone that returns nothing but its last hidden states.
_NOT_SO = (AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError)


class HeadOnly:
    """A shallow copy of a language model. In place of its backbone it has the hidden states that it is given.

    All that follows the backbone is the model's own: the output layer, a scale, soft-capping. The copy shares these
    modules with the model and holds nothing of the backbone.

    Args:
        root: the language model, without PEFT's wrapper around it.
        path: name of the backbone in it.
        output_class: class of the backbone's output.
        plain: whether adapters on what follows the backbone are left out.
    """

    def __init__(self, root: nn.Module, path: str, output_class: type[ModelOutput], *, plain: bool) -> None:
        self._path = path
        self._copy, self._stub = _without_backbone(root, path, output_class)
        if plain:
            for name, child in self._copy._modules.items():
                if child is not None:
                    self._copy._modules[name] = plain_layer(child)
        self._autocast: tuple[str, torch.dtype | None, bool] = ("cpu", None, False)
        self._device = torch.device("cpu")

    @property
    def is_fixed(self) -> bool:
        """Whether nothing in it trains. Ask while the adapters of the model are on."""
        return not any(parameter.requires_grad for parameter in self._copy.parameters())

    @property
    def is_plain(self) -> bool:
        """Whether it holds no adapter."""
        return not any(isinstance(module, _WRAPPERS) for module in self._copy.modules())

    def ask(self, model: nn.Module, batch: Predictions) -> torch.Tensor:
        """Run the model for its last hidden states at the answer tokens, `[N, H]`.

        The output layer gets one token: its logits are not needed.
        """
        root = without_wrapper(model)
        found: list[torch.Tensor] = []

        def keep(module: nn.Module, args: Any, output: Any) -> None:
            hidden = output.last_hidden_state
            kind = hidden.device.type
            self._device = hidden.device
            self._autocast = (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
            found.append(hidden.flatten(0, 1).index_select(0, batch.positions.to(hidden.device)))

        with ExitStack() as stack:
            handle = root.get_submodule(self._path).register_forward_hook(keep)
            stack.callback(handle.remove)
            head = output_head(root)
            if head is not None:
                stack.enter_context(only_at(head, batch.positions[:1], batch.shape))
            forward(model, batch.inputs)
        return found[-1]

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits `[N, V]` of hidden states `[N, H]`."""
        kind, dtype, enabled = self._autocast
        hidden = hidden.to(self._device)
        self._stub["hidden"] = hidden[None]
        try:
            with evaluation(self._copy), torch.autocast(kind, dtype=dtype, enabled=enabled):
                tokens = torch.zeros((1, len(hidden)), dtype=torch.int64, device=self._device)
                return self._copy(input_ids=tokens).logits[0]
        finally:
            self._stub.clear()


def find_head_only(model: nn.Module, batch: Predictions, *, plain: bool) -> HeadOnly | None:
    """Find the backbone of a model and check that the rest of it, run alone, gives the model's logits.

    Args:
        model: a language model, in evaluation mode, its adapters off if `plain`.
        batch: a batch to check with.
        plain: whether adapters on what follows the backbone are left out.

    Returns:
        None if the model cannot be taken apart so. Ask it for every batch then.
    """
    root = without_wrapper(model)
    with _backbones(root, batch.shape) as seen:
        full = logits_of(model, batch)
    expected = full.index_select(0, batch.positions.to(full.device))
    if not seen:
        return None
    path, output_class = min(reversed(seen), key=lambda found: found[0].count("."))
    head = HeadOnly(root, path, output_class, plain=plain)
    try:
        found = head(head.ask(model, batch))
    except _NOT_SO as error:
        logger.info("%s cannot be run without %s: %s", type(root).__name__, path, error)
        return None
    if (plain and not head.is_plain) or not same_logits(found, expected):
        logger.info("%s without %s gives other logits: it is asked for every batch", type(root).__name__, path)
        return None
    return head


@contextmanager
def _backbones(root: nn.Module, shape: tuple[int, int]) -> Iterator[list[tuple[str, type[ModelOutput]]]]:
    """Note which modules near the top return last hidden states of all tokens, in the order in which they end."""
    seen: list[tuple[str, type[ModelOutput]]] = []

    def watch(name: str) -> Any:
        def note(module: nn.Module, args: Any, output: Any) -> None:
            hidden = getattr(output, "last_hidden_state", None)
            if isinstance(output, ModelOutput) and isinstance(hidden, torch.Tensor) and hidden.shape[:2] == shape:
                seen.append((name, type(output)))

        return note

    with ExitStack() as stack:
        for name, module in root.named_modules():
            if name and name.count(".") < _DEEPEST:
                stack.callback(module.register_forward_hook(watch(name)).remove)
        yield seen


def _shallow(module: nn.Module) -> nn.Module:
    """The same module once more, with a table of children of its own.

    A `forward` that somebody has put on the module (TRL's trainers and accelerate do that) is bound to the original,
    so the copy has the class's own.
    """
    copied = object.__new__(type(module))
    vars(copied).update(vars(module))
    vars(copied)["_modules"] = dict(module._modules)
    for name in ("forward", "_original_forward"):
        vars(copied).pop(name, None)
    return copied


def _without_backbone(
    root: nn.Module, path: str, output_class: type[ModelOutput]
) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    given: dict[str, torch.Tensor] = {}
    copied = parent = _shallow(root)
    *outer, last = path.split(".")
    for part in outer:
        child = _shallow(parent.get_submodule(part))
        parent._modules[part] = child
        parent = child
    stub = _shallow(parent.get_submodule(last))
    for table in ("_modules", "_parameters", "_buffers", "_forward_hooks", "_forward_pre_hooks"):
        vars(stub)[table] = {}
    vars(stub)["forward"] = lambda *args, **kwargs: output_class(last_hidden_state=given["hidden"])
    parent._modules[last] = stub
    return copied, given
