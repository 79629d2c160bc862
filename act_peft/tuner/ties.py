"""A merged model whose tied weights have parted: what its configuration says, and what is saved of it."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from transformers import PreTrainedModel

from act_peft.disk.ties import FLAG, can_say_untied, parts_with_flag


def part_ties_(model: nn.Module, *, tied_before: bool) -> None:
    """Let the configuration tell the truth after merging, so that `save_pretrained` and loading give the same model.

    Where tied weights differ now, the configuration says that nothing is tied, and every weight that it untied is a
    tensor of its own. In architectures in which this word would change what the model computes (T5), it stays as it
    was: transformers does not tie two stored tensors that differ.

    Args:
        model: the merged model, without adapters.
        tied_before: what its configuration said before merging.
    """
    if not isinstance(model, PreTrainedModel) or not tied_before:
        return
    pairs = list(_pairs(model))
    if all(first is second for _, _, first, second in pairs):
        return
    model.config.tie_word_embeddings = True
    if not can_say_untied(model):
        return
    for part in parts_with_flag(model.config):
        setattr(part, FLAG, False)
    for module, name, first, second in pairs:
        if first is second:
            setattr(module, name, nn.Parameter(first.detach().clone(), requires_grad=first.requires_grad))


def _pairs(model: PreTrainedModel) -> Iterator[tuple[nn.Module, str, nn.Parameter, nn.Parameter]]:
    """The owner and name of every parameter that transformers ties, the parameter, and what it is tied to."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for target, source in model.all_tied_weights_keys.items():
        if target in parameters and source in parameters:
            owner, _, name = target.rpartition(".")
            yield model.get_submodule(owner), name, parameters[target], parameters[source]
