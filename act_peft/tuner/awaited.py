"""An adapter whose layers are in the model and whose tensors are not checked yet.

PEFT and torch show the tensors to `ActModel` or to a layer before they copy them. transformers' `load_adapter` calls
nothing of ours after the layers are there: it casts the tensors to the dtypes of the placeholders and assigns them one
by one. So `Awaited` stands before the method of the model that it reads files with, until the adapter is loaded.
Before the layers run or are merged they ask whether it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from act_peft.adapter.state import INDEX, check_state
from act_peft.adapter.stored import read_deltas
from act_peft.disk.shard import Shard
from act_peft.doors import HAS_ADAPTERS, READS_FILES
from act_peft.errors import ActError, ActLoadError
from act_peft.layers import ActLayer
from act_peft.layers.lookup import act_layers
from act_peft.tuner.loading import check_base
from act_peft.tuner.plan import withdraw


class Awaited:
    """An adapter that is being loaded.

    Args:
        model: the base model with the adapter's layers in it.
        adapter_name: name of the adapter.
        configs: adapter name -> configuration, of the model's adapters.
        trainable: the parameters that trained before the adapter was injected.
    """

    def __init__(
        self, model: nn.Module, adapter_name: str, configs: dict[str, Any], trainable: list[nn.Parameter]
    ) -> None:
        self._model, self._name, self._configs, self._trainable = model, adapter_name, configs, trainable
        self._was_whole = False
        for layer in self._layers().values():
            layer.await_tensors(adapter_name, self)
        if hasattr(type(model), READS_FILES):
            vars(model)[READS_FILES] = self._read_files

    def _layers(self) -> dict[str, ActLayer]:
        return act_layers(self._model, self._name)

    def _read_files(self, *args: Any, checkpoint_files: Any = None, **settings: Any) -> Any:
        """The method of transformers, with a check of the files before and one of what has arrived after it."""
        vars(self._model).pop(READS_FILES, None)
        with self.removed_if_refused():
            for path in checkpoint_files or ():
                if str(path).endswith(".safetensors"):
                    with Shard(path) as shard:
                        read_deltas(shard, str(path))
        result = getattr(type(self._model), READS_FILES)(*args, checkpoint_files=checkpoint_files, **settings)
        self.settle()
        return result

    @torch.compiler.disable
    def settle(self) -> None:
        """Check what has arrived, and the base. An adapter that does not fit is removed from the model.

        Raises:
            ActLoadError: the tensors do not fit, or nothing has arrived.

        Warns:
            ActWarning: the adapter was made for a base with other weights.
        """
        layers = self._layers()
        states = {name: layer.arrived(self._name) for name, layer in layers.items()}
        if not any(states.values()):
            raise ActLoadError(
                f"adapter {self._name!r}: its tensors are not loaded, expected them before it is used (load it with "
                "PeftModel.from_pretrained or model.load_adapter)"
            )
        with self.removed_if_refused():
            for name, layer in layers.items():
                check_state(layer.expected_state(self._name), states[name], name)
        self.accepted({name: state[INDEX] for name, state in states.items()})

    def seen_whole(self) -> None:
        """All tensors were there when PEFT read them. What it leaves out afterwards is the user's wish."""
        self._was_whole = True

    def is_complete(self, states: Mapping[str, Mapping[str, torch.Tensor]]) -> bool:
        """Whether nothing more is to come after these tensors.

        Args:
            states: module name -> tensors that are about to be loaded.
        """
        needed = {name: {INDEX, *layer.expected_state(self._name).shapes} for name, layer in self._layers().items()}
        return self._was_whole or all(names <= states[name].keys() for name, names in needed.items())

    @contextmanager
    def removed_if_refused(self) -> Iterator[None]:
        """Around a check: if it fails, the adapter is taken out of the model, which is then as it was."""
        try:
            yield
        except ActError:
            self._stop()
            withdraw(self._model, self._name, self._trainable)
            self._configs.pop(self._name, None)
            if not self._configs:
                for name in ("peft_config", HAS_ADAPTERS):
                    self._model.__dict__.pop(name, None)
            raise

    def accepted(self, indices: Mapping[str, torch.Tensor]) -> None:
        """The tensors fit: end the waiting, and compare the base.

        Args:
            indices: module name -> channels, int64 `[K]`.

        Warns:
            ActWarning: the adapter was made for a base with other weights.
        """
        layers = self._layers()
        self._stop()
        check_base(self._configs[self._name], self._name, layers, indices)

    def _stop(self) -> None:
        for layer in self._layers().values():
            layer.stop_waiting(self._name)
        if vars(self._model).get(READS_FILES) == self._read_files:
            del vars(self._model)[READS_FILES]
