"""Training and merging with parameters in parts, in two real processes; LoRA beside it in the same harness.

accelerate refuses FSDP and DeepSpeed on a CPU. The harness takes this one check away, everything else is as on GPUs.
DeepSpeed is tested where it is installed.
"""

from __future__ import annotations

import importlib.util
import math

import pytest
import torch
from safetensors.torch import load_file

from tests.support.processes import run_in_processes

needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed"
)
SETTINGS = {
    "fsdp2": {"fsdp": True, "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}},
    "zero3": {
        "deepspeed": {
            "zero_optimization": {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True},
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto",
            "train_batch_size": "auto",
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        }
    },
}
KINDS = ["fsdp2", pytest.param("zero3", marks=needs_deepspeed)]

TRAIN = """
from accelerate.state import PartialState
from accelerate.utils import DistributedType

SETTINGS, ADAPTER, DTYPE, HEAD, EARLY, STEPS, OPTIMIZER, CALLBACK = {options!r}
if WORLD > 1:
    PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_GPU)
    PartialState.set_device = lambda self: setattr(self, "device", torch.device("cpu"))
    if "deepspeed" in SETTINGS:
        import deepspeed

        sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # it would compile code

from peft import LoraConfig, get_peft_model
from transformers import LlamaForCausalLM
from trl import SFTTrainer
from act_peft import ActConfig, ScaleSparsityCallback
from tests.support.tiny_data import build_tokenizer, prompt_completion, training_settings
from tests.support.tiny_models import build_relatives, random_mask


def train(name, resume=None):
    def settings():
        return training_settings(
            f"{{FOLDER}}/{{name}}.{{WORLD}}", max_steps=STEPS, per_device_train_batch_size=4 // WORLD, optim=OPTIMIZER,
            lr_scheduler_type="constant", max_grad_norm=0.0, save_strategy="steps", save_steps=2,
            **({{}} if WORLD == 1 else {{"use_cpu": False, **SETTINGS}}),
        )

    args = settings() if EARLY else None  # with ZeRO 3 models are spread while they are loaded from then on
    base = LlamaForCausalLM.from_pretrained(f"{{FOLDER}}/base", dtype=getattr(torch, DTYPE))
    if ADAPTER == "lora":
        torch.manual_seed(0)
        config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    else:
        mask = random_mask(build_relatives("llama")[0], 0.3)
        left_out = ("embed_tokens",) if HEAD else ("embed_tokens", "lm_head")
        config = ActConfig(
            channels={{n: mask[n].tolist() for n in mask if not n.endswith(left_out)}}, trainable=ADAPTER,
            donor=f"{{FOLDER}}/donor", transfer_scale=0.4, task_type="CAUSAL_LM",
        )
    trainer = SFTTrainer(
        get_peft_model(base, config), args=args or settings(), train_dataset=prompt_completion(16),
        processing_class=build_tokenizer(), callbacks=[ScaleSparsityCallback(l1=1.0)] if CALLBACK else [],
    )
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model(f"{{FOLDER}}/{{name}}.{{WORLD}}/final")
    return trainer


train("run")
{after}
"""

RESUME = """
torch.distributed.barrier()
train("resumed", f"{FOLDER}/run.2/checkpoint-2")
"""

IN_PARTS = """
from torch.distributed.fsdp import FSDPModule, fully_shard
from peft import get_peft_model
from act_peft import ActConfig, initialize_from_donor, prune_channels
from tests.support.tiny_models import batch, build_relatives, random_mask

torch.distributed.init_process_group("gloo")
ids = batch()


def in_parts(model):
    for layer in model.model.layers:
        fully_shard(layer)
    return fully_shard(model)


def whole(model):
    found = {n: p.full_tensor() if hasattr(p, "full_tensor") else p for n, p in model.named_parameters()}
    return {n: p.detach().clone() for n, p in found.items() if "act_delta" not in n}


base, donor = build_relatives("qwen2")
mask = random_mask(base, 0.3)
config = {"channels": mask, "transfer_scale": 0.5, "task_type": "CAUSAL_LM"}
plain = get_peft_model(base, ActConfig(**config))
initialize_from_donor(plain, donor)
expected = plain(ids).logits.detach()

for theirs in (in_parts(build_relatives("qwen2")[1]), donor):
    base = in_parts(build_relatives("qwen2")[0])
    model = get_peft_model(base, ActConfig(**config))
    initialize_from_donor(model, theirs)
    assert model.peft_config["default"].adapted_modules == plain.peft_config["default"].adapted_modules
    for name, tensor in plain.state_dict().items():
        if "act_delta" in name:
            assert torch.equal(model.state_dict()[name], tensor), name
    before = whole(base)
    assert torch.equal(model(ids).logits, expected)
    model.merge_adapter(safe_merge=True)
    torch.testing.assert_close(model(ids).logits, expected)
    for module in base.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # what FSDP2 has gathered is read anew from the parts
    torch.testing.assert_close(model(ids).logits, expected)
    model.unmerge_adapter()
    after = whole(base)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(ids).logits, expected)

model = get_peft_model(in_parts(build_relatives("qwen2")[0]), ActConfig(**config, trainable="scales"))
initialize_from_donor(model, donor)
prune_channels(model, threshold=0.1)
torch.testing.assert_close(model(ids).logits, expected)

model = get_peft_model(in_parts(build_relatives("gemma")[0]), ActConfig(channels={"embed_tokens": [0, 1]}))
try:
    model.merge_adapter()
except ValueError as error:
    assert "shares its weight" in str(error), error
else:
    raise AssertionError("not refused")
"""


@pytest.fixture
def checkpoints(tmp_path):
    """Folders of a base and a donor, in a dtype."""
    from tests.support.tiny_models import build_relatives

    def write(dtype):
        for name, model in zip(("base", "donor"), build_relatives("llama", dtype=getattr(torch, dtype)), strict=True):
            model.save_pretrained(tmp_path / name)
        return tmp_path

    return write


def script(
    kind, adapter, *, dtype="float32", head=False, early=True, steps=3, optimizer="sgd", callback=False, after=""
):
    options = (SETTINGS[kind], adapter, dtype, head, early, steps, optimizer, callback)
    return TRAIN.format(options=options, after=after)


def adapter_of(folder):
    return load_file(folder / "final" / "adapter_model.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("adapter", "changes"),
    [
        ("lora", {}),
        ("deltas", {}),
        ("deltas", {"dtype": "bfloat16"}),
        ("deltas", {"head": True}),
        ("deltas", {"early": False}),
        ("scales", {}),
    ],
    ids=str,
)
def test_two_processes_train_in_parts_what_one_trains(checkpoints, kind, adapter, changes):
    folder = checkpoints(changes.get("dtype", "float32"))
    for processes in (2, 1):
        run_in_processes(script(kind, adapter, **changes), folder, processes=processes)
    found, expected = adapter_of(folder / "run.2"), adapter_of(folder / "run.1")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        error = float((found[name].double() - tensor.double()).abs().max())
        assert error <= (1e-2 if "dtype" in changes else 1e-5) * float(tensor.double().abs().max()), name


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("adapter", ["lora", "deltas", "scales"])
def test_a_training_in_parts_resumes_exactly(checkpoints, kind, adapter):
    folder = checkpoints("float32")
    run_in_processes(script(kind, adapter, steps=4, optimizer="adamw_torch", after=RESUME), folder)
    found, expected = adapter_of(folder / "resumed.2"), adapter_of(folder / "run.2")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert any(not torch.equal(adapter_at(folder, 2)[n], t) for n, t in expected.items())


def adapter_at(folder, step):
    return load_file(folder / "run.2" / f"checkpoint-{step}" / "adapter_model.safetensors")


@pytest.mark.slow
def test_the_penalty_of_scales_works_in_parts(checkpoints):
    folder = checkpoints("float32")
    for processes in (2, 1):
        run_in_processes(script("fsdp2", "scales", callback=True), folder, processes=processes)
    found, expected = adapter_of(folder / "run.2"), adapter_of(folder / "run.1")
    scales = [name for name in expected if "channel_scale" in name]
    for name in scales:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-7)
    mean = sum(float(expected[name].sum()) for name in scales) / sum(expected[name].numel() for name in scales)
    assert math.isclose(mean, 0.4 - 3 * 0.01, abs_tol=2e-3)  # three proximal steps


@pytest.mark.slow
def test_an_adapter_on_a_base_that_is_in_parts_already(tmp_path):
    run_in_processes(IN_PARTS, tmp_path)
