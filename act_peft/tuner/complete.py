"""What is saved of an adapter is all of it, also if its parameters are spread over processes.

Under ZeRO 3 a Trainer hands over what it has gathered: the trained parameters. Frozen differences are missing there,
and only one process saves, so nothing can be gathered then. They do not change, so that process keeps a copy of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import nn

from act_peft.doors import CHECKPOINTED, COMPILED_MODULE, FLATTENED
from act_peft.errors import ActValueError
from act_peft.layers import ActLayer
from act_peft.layers.lookup import act_layers
from act_peft.processes import process_index
from act_peft.shards import is_partitioned, is_shared_out, whole

_WRAPPED = (FLATTENED, CHECKPOINTED, COMPILED_MODULE)


def frozen_copies(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of the frozen parameters of adapters that ZeRO 3 has spread, in the process that saves.

    All processes must call this.

    Args:
        model: the base model with adapters in it.

    Returns:
        Name of the parameter in the model -> its values on the CPU.
    """
    copies = {}
    for name, layer in act_layers(model).items():
        for part, parameter in _parameters(layer):
            if is_partitioned(parameter) and not parameter.requires_grad:
                values = whole(parameter)
                if not process_index():
                    copies[f"{name}.{part}"] = values.cpu()
    return copies


def complete_state(
    model: nn.Module, adapter_name: str, tensors: Mapping[str, torch.Tensor], copies: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The tensors of an adapter that is being saved, with frozen ones that were left out.

    Args:
        model: the model, in PEFT's and perhaps further wrappers.
        adapter_name: name of the adapter.
        tensors: those of the adapter among the tensors that were handed over, by their names in the model.
        copies: as `frozen_copies` gives them.

    Raises:
        ActValueError: a tensor is missing, or is only a part.
    """
    if not tensors and process_index():  # this process does not save
        return {}
    complete, broken = dict(tensors), {}
    for name, layer in act_layers(model, adapter_name).items():
        prefix = ".".join(part for part in name.split(".") if part not in _WRAPPED)
        shapes = layer.state_shapes(adapter_name)
        for part, parameter in [*_parameters(layer), (f"act_delta_index.{adapter_name}", None)]:
            container, _, of_adapter = part.partition(".")
            if of_adapter != adapter_name:
                continue
            key, shape = f"{prefix}.{part}", shapes[container]
            if key not in complete and parameter is not None and not parameter.requires_grad:
                frozen = next((t for n, t in copies.items() if key.endswith(f".{n}")), None)
                if frozen is None and not is_shared_out(parameter):
                    frozen = parameter.detach()
                if frozen is not None:
                    complete[key] = frozen
            if key not in complete or tuple(complete[key].shape) != shape:
                broken[key] = list(complete[key].shape) if key in complete else "nothing"
    if broken:
        key, got = next(iter(broken.items()))
        raise ActValueError(
            f"{key}: {got} of it is there to be saved, expected the whole tensor ({len(broken)} tensors of adapter "
            f"{adapter_name!r} are missing or in parts; save with the Trainer's save_model, or gather the state dict "
            "in all processes; with ZeRO 3 set stage3_gather_16bit_weights_on_model_save)"
        )
    return complete


def _parameters(layer: ActLayer) -> Iterator[tuple[str, nn.Parameter]]:
    for container in layer.adapter_layer_names:
        for adapter_name, parameter in getattr(layer, container).items():
            yield f"{container}.{adapter_name}", parameter
