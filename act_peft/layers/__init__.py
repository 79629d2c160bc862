"""The layers that wrap target modules, one file a kind of module."""

from act_peft.channels.kinds import ChannelKind
from act_peft.channels.rows import ChannelRows
from act_peft.layers.base import ActLayer, remove_adapter
from act_peft.layers.conv1d import Conv1D
from act_peft.layers.embedding import Embedding
from act_peft.layers.linear import Linear
from act_peft.layers.norm import LayerNorm, RMSNorm

LAYER_CLASSES: dict[ChannelKind, type[ActLayer]] = {
    layer_class.kind: layer_class for layer_class in (Linear, Conv1D, Embedding, LayerNorm, RMSNorm)
}

__all__ = [
    "LAYER_CLASSES",
    "ActLayer",
    "ChannelRows",
    "Conv1D",
    "Embedding",
    "LayerNorm",
    "Linear",
    "RMSNorm",
    "remove_adapter",
]
