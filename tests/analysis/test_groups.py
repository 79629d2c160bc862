import pytest

from act_peft.analysis.groups import Grouping, groups_of

ONE = ["model.embed_tokens", "model.layers.0.self_attn.q_proj", "model.layers.10.mlp.experts.3.up_proj", "lm_head"]
TWO = ["encoder.block.0.layer.0.q", "encoder.block.1.layer.0.q", "decoder.block.0.layer.1.q", "lm_head"]
DEEP = ["model.visual.blocks.0.qkv", "model.language_model.layers.0.qkv"]


def test_kinds():
    assert list(groups_of(ONE, Grouping.KIND).values()) == ["embed_tokens", "q_proj", "up_proj", "lm_head"]


@pytest.mark.parametrize(
    ("names", "layers"),
    [
        (ONE, ["embed_tokens", "layer 0", "layer 10", "lm_head"]),
        (TWO, ["encoder 0", "encoder 1", "decoder 0", "lm_head"]),
        (DEEP, ["visual.blocks 0", "language_model.layers 0"]),
        (["0.up", "12.up"], ["layer 0", "layer 12"]),
        (["a.b", "c"], ["b", "c"]),
        (["layers.0.a", "layers.layers.0.a"], ["layers 0", "layers 0"]),
        ([], []),
    ],
)
def test_layers(names, layers):
    assert list(groups_of(names, Grouping.LAYER).values()) == layers
