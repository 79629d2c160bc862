"""A merged model whose tied weights have parted: what its configuration says, and what is saved of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import PreTrainedModel

from act_peft.disk.ties import FLAG, can_say_untied, parts_with_flag
from act_peft.errors import ActValueError
from act_peft.layers.lookup import act_layers, shared_parameters
from act_peft.offloading import keeps_elsewhere, values_of
from act_peft.shards import is_shared_out


@contextmanager
def configuration_of_ties(model: nn.Module) -> Iterator[None]:
    """Let the configuration tell the truth after merging, so that `save_pretrained` and loading give the same model.

    Where tied weights differ then, the configuration says that nothing is tied, and every weight that this unties is a
    tensor of its own. In architectures in which it would change what the model computes (T5), the configuration stays
    as it was: transformers does not tie two stored tensors that differ.

    Args:
        model: the model; its adapters are merged and removed inside the context.
    """
    tied_before = isinstance(model, PreTrainedModel) and getattr(model.config, FLAG, False)
    yield
    if not tied_before or not isinstance(model, PreTrainedModel):
        return
    pairs = list(_pairs(model))
    if all(same for *_, same in pairs):
        return
    model.config.tie_word_embeddings = True  # PEFT has changed it
    if not can_say_untied(model):
        return
    for part in parts_with_flag(model.config):
        setattr(part, FLAG, False)
    for module, name, first, same in pairs:
        if same and first.device.type != "meta":
            setattr(module, name, nn.Parameter(first.detach().clone(), requires_grad=first.requires_grad))


def check_ties_in_parts(model: nn.Module) -> None:
    """Check that no adapted module shares a weight that is spread over processes: merging would make a new one.

    Raises:
        ActValueError: one does.
    """
    shared = shared_parameters(model)
    for name, layer in act_layers(model).items():
        weight = layer.get_base_layer().weight
        if id(weight) in shared and is_shared_out(weight):
            raise ActValueError(
                f"{name}: shares its weight with another module and is spread over processes, expected a weight of "
                "its own for merging (save the adapter and merge it with merge_checkpoint)"
            )


def _pairs(model: PreTrainedModel) -> Iterator[tuple[nn.Module, str, nn.Parameter, bool]]:
    """Every parameter that transformers ties: its owner and name, the parameter, and whether it is tied still."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for target, source in model.all_tied_weights_keys.items():
        if target in parameters and source in parameters:
            (owner, name), (other, its) = (_owner(model, tied) for tied in (target, source))
            same = parameters[target] is parameters[source]
            if keeps_elsewhere(owner) and keeps_elsewhere(other):  # their parameters are never the same
                same = torch.equal(values_of(owner, name), values_of(other, its))
            yield owner, name, parameters[target], same


def _owner(model: nn.Module, parameter: str) -> tuple[nn.Module, str]:
    owner, _, name = parameter.rpartition(".")
    return model.get_submodule(owner), name
