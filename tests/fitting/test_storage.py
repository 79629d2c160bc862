from __future__ import annotations

import dataclasses

import pytest
import torch

from act_peft import FittedTransfer
from act_peft.channels.kinds import ChannelKind
from act_peft.channels.origin import ModelRecord, Origin
from act_peft.disk import tensorfile
from act_peft.errors import ActValueError
from act_peft.fitting.module import FitRecord, FittedModule
from act_peft.fitting.settings import FitSettings
from act_peft.fitting.storage import KIND

RECORD = FitRecord(FitSettings(), (5, 4), base="org/base", donors=("org/donor",), task_type="CAUSAL_LM")


def linear(**changes) -> FittedModule:
    module = FittedModule(
        names=("layer",),
        head=None,
        kind=ChannelKind.LINEAR,
        delta=torch.arange(6.0).view(2, 3),
        bias=torch.tensor([1.0, 2.0]),
        gains=torch.tensor([0.5, 2.0], dtype=torch.float64),
        directions=torch.eye(2),
        strengths=torch.tensor([2.0, 0.5], dtype=torch.float64),
        token_metric=None,
        token_weights=None,
        fingerprint="0123456789abcdef",
    )
    return dataclasses.replace(module, **changes)


def saved(tmp_path, module: FittedModule | None = None, **metadata):
    path = tmp_path / "fitted.safetensors"
    FittedTransfer({"layer": module or linear()}, RECORD).save(path)
    if metadata:
        tensors, found = tensorfile.read(path, KIND, 1)
        tensorfile.write(path, KIND, 1, tensors, {**found, **metadata})
    return path


def test_the_format_is_this(tmp_path) -> None:
    tensors, metadata = tensorfile.read(saved(tmp_path), "fitted transfer", 1)
    assert sorted(tensors) == [f"layer:{part}" for part in ("bias", "delta", "directions", "gains", "strengths")]
    assert metadata == {
        "base": "org/base",
        "donors": ["org/donor"],
        "modules": [
            {"fingerprint": "0123456789abcdef", "head": None, "kind": "linear", "name": "layer", "names": ["layer"]}
        ],
        "num_tokens": [5, 4],
        "settings": {"keep_weight": 1.0, "prior_scale": 0.0, "ridge": 0.03},
        "task_type": "CAUSAL_LM",
    }


def test_bfloat16_stays(tmp_path) -> None:
    again = FittedTransfer.load(saved(tmp_path, linear(delta=torch.ones(2, 3, dtype=torch.bfloat16))))
    assert again.modules["layer"].delta.dtype is torch.bfloat16
    assert again.record == RECORD


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"settings": {"ridge": -1.0}}, "ridge: got -1.0, expected a finite number above 0"),
        ({"settings": {"mu": 1.0}}, "its metadata is not that of a fitted transfer"),
        ({"num_tokens": [1]}, "its metadata is not that of a fitted transfer .num_tokens"),
        ({"num_tokens": [-1, 2]}, "its metadata is not that of a fitted transfer"),
        ({"base": 3}, "its metadata is not that of a fitted transfer .base, donors and task_type are names"),
        ({"modules": [{"name": "layer"}]}, "its metadata is not that of a fitted transfer"),
        ({"modules": []}, "got the tensor 'layer:bias', expected those of the modules that the metadata lists"),
        (
            {"modules": [{"name": "layer", "names": [], "head": None, "kind": "linear", "fingerprint": ""}]},
            "its metadata is not that of a fitted transfer .'layer': names and fingerprint",
        ),
        (
            {
                "modules": [
                    {"name": "layer", "names": ["layer"], "head": None, "kind": "convolution", "fingerprint": ""}
                ]
            },
            "its metadata is not that of a fitted transfer",
        ),
        (
            {"modules": [{"name": "other", "names": ["other"], "head": None, "kind": "linear", "fingerprint": ""}]},
            "other: got no tensor 'delta', expected one",
        ),
    ],
)
def test_damaged_metadata(tmp_path, metadata, message: str) -> None:
    with pytest.raises(ActValueError, match=message):
        FittedTransfer.load(saved(tmp_path, **metadata))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"delta": torch.ones(2, 3, 1)}, r"layer: delta is torch.float32 of shape \[2, 3, 1\], expected"),
        ({"delta": torch.ones(2, 3, dtype=torch.int64)}, r"layer: delta is torch.int64 of shape \[2, 3\], expected"),
        ({"delta": torch.ones(2, 3).to(torch.float8_e4m3fn)}, r"layer: delta is torch.float8_e4m3fn .*, expected"),
        ({"directions": torch.tensor(1.0)}, r"layer: directions is .* of shape \[\], expected .* \[2, 0\]"),
        ({"bias": torch.ones(3)}, r"layer: bias is torch.float32 of shape \[3\], expected .* of shape \[2\]"),
        ({"gains": torch.ones(2)}, r"layer: gains is torch.float32 of shape \[2\], expected float64 of shape \[2\]"),
        ({"directions": torch.ones(2, 5)}, r"layer: directions is .* of shape \[2, 5\], expected .* \[2, 2\]"),
        ({"strengths": torch.ones(3).double()}, r"layer: strengths is .* of shape \[3\], expected .* \[2\]"),
        ({"delta": torch.full((2, 3), float("nan"))}, "layer: delta has values that are not finite"),
        ({"kind": ChannelKind.RMS_NORM}, r"layer: delta is .* of shape \[2, 3\], expected .* \[2, 1\]"),
    ],
)
def test_damaged_tensors(tmp_path, changes, message: str) -> None:
    with pytest.raises(ActValueError, match=message):
        FittedTransfer.load(saved(tmp_path, linear(**changes)))


def test_origins_are_kept_and_raise_the_version(tmp_path) -> None:
    FittedTransfer({"layer": linear()}, RECORD).save(tmp_path / "old")
    assert tensorfile.read(tmp_path / "old", KIND, 1)
    origin = Origin(ModelRecord("org/base", {"layer": "a"}), ModelRecord("org/donor", {"layer": "b"}))
    record = dataclasses.replace(RECORD, origins=(origin,))
    FittedTransfer({"layer": linear()}, record).save(tmp_path / "new")
    loaded = FittedTransfer.load(tmp_path / "new")
    assert loaded.record == record
    assert loaded.gains.origin == origin
    tensors, metadata = tensorfile.read(tmp_path / "new", KIND, 2)
    for damaged in ("x", [1], [{"base": None, "donor": None}], 3):
        tensorfile.write_large(tmp_path / "bad", KIND, 2, tensors, {**metadata, "origins": damaged})
        with pytest.raises(ActValueError, match=r"origin|metadata is not that of a fitted transfer"):
            FittedTransfer.load(tmp_path / "bad")


def test_other_files(tmp_path) -> None:
    with pytest.raises(ActValueError, match=r"no such file, expected a file of kind 'fitted transfer'"):
        FittedTransfer.load(tmp_path / "none.safetensors")
    tensorfile.write(tmp_path / "mask", "channel mask", 1, {"a": torch.ones(1)}, {})
    with pytest.raises(ActValueError, match="got a file of kind 'channel mask', expected 'fitted transfer'"):
        FittedTransfer.load(tmp_path / "mask")
    tensorfile.write(tmp_path / "new", KIND, 3, {"a": torch.ones(1)}, {})
    with pytest.raises(ActValueError, match="got version 3 of kind 'fitted transfer', expected at most 2"):
        FittedTransfer.load(tmp_path / "new")
    with pytest.raises(ActValueError, match="got a folder"):
        FittedTransfer({"layer": linear()}, RECORD).save(tmp_path)
