"""Which channels: by activation, weight, attribution, contrast or chance, and what moves when they are selected."""

from __future__ import annotations

from typing import Any

import torch
from study import Study
from torch import nn

from act_peft import ChannelMask, ChannelScores, localize

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
EVERYTHING = [*LINEAR, "input_layernorm", "post_attention_layernorm", "model.norm", "embed_tokens", "lm_head"]


def scores(study: Study, kind: str) -> ChannelScores:
    """Scores of the linear layers' channels."""
    ability = study.batches(study.ability())
    settings: dict[str, Any] = {"target_modules": LINEAR, "show_progress": False}
    if kind == "activation":
        return localize(study.base(), study.donor, ability, **settings)
    if kind == "weight":
        return localize(study.base(), study.donor, score="weight", **settings)
    kept = study.batches(study.kept())
    return localize(study.base(), study.donor, ability, score=kind, keep_dataloader=kept, **settings)


def random_mask(study: Study, density: float) -> ChannelMask:
    """The same share of every linear layer, drawn at random."""
    generator = torch.Generator().manual_seed(study.seed)
    sizes = {name: module.out_features for name, module in linear_layers(study.reference)}
    chosen = {name: torch.randperm(size, generator=generator)[: round(density * size)] for name, size in sizes.items()}
    return ChannelMask.from_dict(chosen, sizes)


def linear_layers(model: nn.Module) -> list[tuple[str, nn.Linear]]:
    """Those within the transformer's layers."""
    return [(name, module) for name, module in model.named_modules() if name.rpartition(".")[2] in LINEAR]


def linear_only(mask: ChannelMask) -> ChannelMask:
    """The part of a mask that lies in linear layers."""
    names = [name for name in mask if name.rpartition(".")[2] in LINEAR]
    return ChannelMask.from_dict(
        {name: mask[name] for name in names}, {name: mask.num_channels[name] for name in names}
    )


def select(study: Study, kind: str, density: float) -> ChannelMask:
    """The same share of every linear layer."""
    if kind == "random":
        return random_mask(study, density)
    return scores(study, kind).top(density, scope="module")


def paper_scores(study: Study) -> ChannelScores:
    """As the paper has it: of all modules, output layer and embedding among them, for one ranking."""
    ability = study.batches(study.ability())
    return localize(study.base(), study.donor, ability, target_modules=EVERYTHING, show_progress=False)


@torch.no_grad()
def moved(study: Study, mask: ChannelMask, scale: float) -> Any:
    """The base with λ of the difference in the selected channels (rows; columns of the embedding)."""
    model = study.base()
    inner = dict(model.named_modules())
    theirs = dict(study.donor.named_modules())
    if "lm_head" in mask:
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.clone())  # unlike the embedding's, its rows move
    for name, channels in mask.items():
        ours, other = inner[name].weight, theirs[name].weight
        if isinstance(inner[name], nn.Embedding):
            ours, other = ours.T, other.T
        ours[channels] += scale * (other[channels] - ours[channels])
    return model.requires_grad_(False)


def numbers(study: Study, mask: ChannelMask) -> int:
    """How many weights belong to the selected channels."""
    modules = dict(study.reference.named_modules())
    return sum(
        len(channels) * (modules[name].weight.numel() // mask.num_channels[name]) for name, channels in mask.items()
    )
