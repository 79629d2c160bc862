"""Two real processes train one adapter with DistributedDataParallel over gloo."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = """
import copy, os, sys
sys.path.insert(0, {tests!r})
import torch
from peft import get_peft_model
from tests.support.tiny_data import build_tokenizer, prompt_completion
from tests.support.tiny_models import batch, build_relatives, random_mask, state_bytes
from trl import SFTConfig, SFTTrainer
from act_peft import ActConfig, DonorCallback, KeepCallback, ScaleSparsityCallback, initialize_from_donor

torch.set_num_threads(1)
base, donor = build_relatives("llama")
before = state_bytes(base)
config = ActConfig(
    channels=random_mask(base, 0.3), trainable={trainable!r}, offload_deltas={offload!r}, task_type="CAUSAL_LM"
)
model = get_peft_model(base, config)
callbacks = []
if config.trainable == "scales":
    initialize_from_donor(model, donor)
    callbacks.append(ScaleSparsityCallback(l1=1.0))
    world, rank = (int(os.environ.get(name, default)) for name, default in (("WORLD_SIZE", 1), ("RANK", 0)))
    part = batch(rows=4).chunk(world)[rank]  # each process keeps answers of its own
    callbacks.append(KeepCallback([{{"input_ids": part, "labels": part}}], weight=50.0))
    shown = batch(rows=4, seed=1).chunk(world)[rank]  # and is shown answers of its own
    callbacks.append(DonorCallback(donor, [{{"input_ids": shown, "labels": shown}}], weight=5.0))
args = SFTConfig(
    output_dir={folder!r}, max_steps=2, per_device_train_batch_size=4 // int(os.environ.get("WORLD_SIZE", 1)),
    learning_rate=1e-2, lr_scheduler_type="constant", report_to="none", save_strategy="no", use_cpu=True, bf16=False,
    gradient_checkpointing=False, disable_tqdm=True, seed=0, optim="sgd", max_grad_norm=0.0,
)
trainer = SFTTrainer(
    model, args=args, train_dataset=prompt_completion(8), processing_class=build_tokenizer(), callbacks=callbacks
)
trainer.train()
model = trainer.accelerator.unwrap_model(trainer.model)
assert state_bytes(model.get_base_model()) == before
state = {{n: t for n, t in model.state_dict().items() if "act_delta_" in n}}
torch.save(state, {folder!r} + f"/rank{{os.environ.get('RANK', 'alone')}}.pt")
"""


@pytest.mark.slow
@pytest.mark.parametrize(("trainable", "offload"), [("deltas", False), ("scales", False), ("scales", True)])
def test_two_processes_train_what_one_trains(tmp_path, trainable, offload):
    script = tmp_path / "train.py"
    settings = {"trainable": trainable, "offload": offload}
    script.write_text(SCRIPT.format(tests=str(Path(__file__).parents[1]), folder=str(tmp_path), **settings))
    launch = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "torch.distributed.run",
        "--nproc_per_node=2",
        "--master_port=29517",
    ]
    subprocess.run([*launch, str(script)], check=True, timeout=300)
    subprocess.run([sys.executable, "-W", "ignore", str(script)], check=True, timeout=300)
    first, second, alone = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in ("0", "1", "alone"))
    assert any(tensor.is_floating_point() and tensor.abs().max() > 0 for tensor in alone.values())
    if trainable == "scales":
        scales = torch.cat([tensor for name, tensor in alone.items() if "channel_scale" in name])
        assert float(scales.max()) < 0.4  # two proximal steps of 0.01 from 0.4, and two small gradients
        assert len(scales.unique()) > 10
    for name, tensor in first.items():
        assert torch.equal(second[name], tensor), name
        torch.testing.assert_close(
            alone[name], tensor, rtol=1e-3, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )
