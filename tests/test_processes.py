"""Two real processes: they hold the same channels, and score their data together."""

from __future__ import annotations

import pytest
import torch

from act_peft import ChannelScores, FittedTransfer
from tests.support.processes import run_in_processes

AGREEMENT = """
import time, warnings
import pytest
from peft import PeftModel, get_peft_model
from torch.nn.parallel import DistributedDataParallel
from act_peft import ActConfig, ActWarning, localize, processes
from act_peft.tuner import agreement
from tests.support.tiny_models import batch, build_relatives, random_mask

torch.distributed.init_process_group("gloo")
agreement._CREATION_PATIENCE = processes._PATIENCE = 1.0
mask = random_mask(build_relatives("llama")[0], 0.3)
other = random_mask(build_relatives("llama")[0], 0.3, seed=RANK)


def adapted(mask):
    return get_peft_model(build_relatives("llama")[0], ActConfig(channels=mask, task_type="CAUSAL_LM"))


# The same in both is fine, different channels of equal number are refused in both, before the model is touched.
model = adapted(mask)
base = build_relatives("llama")[0]
with pytest.raises(ValueError, match="model.embed_tokens: process 1 has other channels than process 0"):
    get_peft_model(base, ActConfig(channels=other, task_type="CAUSAL_LM"))
assert not any("act_delta" in name for name, _ in base.named_parameters())

# Where only one process has the weights, rows cannot be read.
os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "true"
with pytest.raises(ValueError, match="only one process has the base's weights"):
    adapted(mask)
del os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"]

# An adapter that is loaded is compared in the first training step, although DistributedDataParallel has made its
# buffers equal by then; inference does not wait for anybody.
torch.distributed.barrier()
agreement.check_channels, kept = (lambda indices: None), agreement.check_channels
import act_peft.tuner.model
act_peft.tuner.model.check_channels = agreement.check_channels
adapted(other).save_pretrained(f"{FOLDER}/adapter{RANK}")
act_peft.tuner.model.check_channels = kept
loaded = PeftModel.from_pretrained(build_relatives("llama")[0], f"{FOLDER}/adapter{RANK}", is_trainable=True)
if RANK == 0:
    with torch.no_grad():
        loaded(batch())
with pytest.raises(ValueError, match="process 1 has other channels than process 0"):
    DistributedDataParallel(loaded)(batch())
DistributedDataParallel(model)(batch()).logits.sum().backward()

# One process alone: nothing hangs, and later all of them meet again.
if RANK == 0:
    adapted(mask)
    base, donor = build_relatives("llama")
    data = [{"input_ids": batch()}]
    with pytest.warns(ActWarning, match="not all 2 processes have called it"):
        alone = localize(base, donor, data, show_progress=False)
    assert alone.num_tokens == 18
torch.distributed.barrier()
base, donor = build_relatives("llama")
with warnings.catch_warnings():
    warnings.simplefilter("error")
    processes._PATIENCE = 60.0
    assert localize(base, donor, [{"input_ids": batch(seed=RANK)}], show_progress=False).num_tokens == 36
with pytest.raises(ValueError, match="expected the same models and settings in all processes"):
    localize(base, donor, [{"input_ids": batch()}], target_modules=["q_proj", "k_proj"][RANK:], show_progress=False)
"""

SCORES = """
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset
from act_peft import fit, localize
from tests.support.tiny_data import build_tokenizer, prompt_completion, training_settings
from tests.support.tiny_models import build_relatives
from trl import SFTTrainer

base, donor = build_relatives("llama")
trainer = SFTTrainer(
    base, args=training_settings(FOLDER), train_dataset=prompt_completion(13), processing_class=build_tokenizer()
)
quiet = {"show_progress": False}


def batches():
    return trainer.get_train_dataloader()


class Stream(IterableDataset):
    def __iter__(self):
        return iter(trainer.train_dataset)


found = {
    "activation": localize(base, donor, batches(), **quiet),
    "contrast": localize(base, donor, batches(), keep_dataloader=batches(), score="contrast", **quiet),
    "attribution": localize(base, donor, batches(), score="attribution", points=2, **quiet),
    "weight": localize(base, donor, score="weight"),
}
fitted = fit(base, donor, batches(), batches(), **quiet)
fitted.save(f"{FOLDER}/fit.{WORLD}.{RANK}")
if WORLD > 1:
    inner = {"batch_size": 3, "collate_fn": trainer.data_collator}
    data = trainer.train_dataset
    loaders = {
        "sampler": DataLoader(data, sampler=DistributedSampler(data), **inner),
        "stream": trainer.accelerator.prepare(DataLoader(Stream(), **inner)),
        "one has nothing": [list(DataLoader(data, **inner)), []][RANK],
        "one has more": list(DataLoader(data, **inner))[RANK::2],
    }
    for name, loader in loaders.items():
        found[f"activation, {name}"] = localize(base, donor, loader, **quiet)
    found["activation, checkpoint"] = localize(base, donor, batches(), checkpoint=f"{FOLDER}/partial", **quiet)
    wrapped = DistributedDataParallel(base), DistributedDataParallel(donor)
    found["activation, DistributedDataParallel"] = localize(*wrapped, batches(), **quiet)
    compiled = torch.compile(base), torch.compile(donor)
    found["activation, compiled"] = localize(*compiled, batches(), **quiet)

    def policy(module, recurse, nonwrapped_numel):
        return recurse or "DecoderLayer" in type(module).__name__

    for originals in (True, False):
        flat = [
            FullyShardedDataParallel(
                model, auto_wrap_policy=policy, use_orig_params=originals, device_id=torch.device("cpu")
            )
            for model in build_relatives("llama")
        ]
        found[f"activation, FSDP1, {originals}"] = localize(*flat, batches(), **quiet)
    for model in (base, donor):
        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
    found["activation, FSDP2"] = localize(base, donor, batches(), **quiet)
    found["activation, FSDP2, one has more"] = localize(base, donor, loaders["one has more"], **quiet)
    found["weight, FSDP2"] = localize(base, donor, score="weight")
    for refused in (
        lambda: localize(base, donor, batches(), score="attribution", **quiet),
        lambda: localize(base, donor, loaders["one has nothing"], **quiet),
        lambda: fit(base, donor, batches(), batches(), **quiet),
    ):
        try:
            refused()
        except ValueError as error:
            assert "spread over" in str(error), error
        else:
            raise AssertionError("not refused")
for name, scores in found.items():
    scores.save(f"{FOLDER}/{name}.{WORLD}.{RANK}")
"""


SCORED = [(score, name) for score in ("activation", "contrast") for name in ("a", "b")]
GROUPS = """
import json
from act_peft import localize
from act_peft.cli import main
from act_peft.demo.family import BASE, DONOR
from act_peft.demo.task import Split, rows
from act_peft.demo.words import Language
from tests.support.tiny_models import batch, build_relatives

data = f"{FOLDER}/data{WORLD}{RANK}.jsonl"
with open(data, "w") as file:
    for row in rows(Language.SPANISH, Split.TRAIN, count=10):
        file.write(json.dumps(row) + "\\n")
command = ["--base", str(BASE), "--donor", str(DONOR), "--device", "cpu"]
examples = ["--dataset", data, "--batch-size", "3"]
assert main(["localize", *command, "--score", "weight", "--output", f"{FOLDER}/weight.{WORLD}"]) == 0
assert main(["localize", *command, *examples, "--output", f"{FOLDER}/command.{WORLD}"]) == 0
assert main(["fit", *command, *examples, "--keep-dataset", data, "--output", f"{FOLDER}/fit.{WORLD}"]) == 0

base, donor = build_relatives("llama")
whole = {name: [{"input_ids": batch(seed=first + n)} for n in range(4)] for first, name in ((0, "a"), (5, "b"))}
groups = {name: batches[RANK::WORLD] for name, batches in whole.items()}
for score in ("activation", "contrast"):
    keep = {"keep_dataloader": groups["a"]} if score == "contrast" else {}
    settings = {"score": score, "show_progress": False, **keep}
    found = localize(base, donor, groups, checkpoint=f"{FOLDER}/{score}.{WORLD}.sums", **settings)
    turns = localize(base, donor, groups, spool=FOLDER, **settings)
    for name, scores in found.items():
        assert scores == turns[name]
        scores.save(f"{FOLDER}/{score}.{name}.{WORLD}.{RANK}")
"""


def test_processes_hold_the_same_channels_or_say_so(tmp_path):
    run_in_processes(AGREEMENT, tmp_path)


@pytest.mark.slow
def test_processes_score_their_data_together(tmp_path):
    run_in_processes(SCORES, tmp_path)
    run_in_processes(SCORES, tmp_path, processes=1)
    found = sorted(path.name[: -len(".2.0")] for path in tmp_path.glob("*.2.0") if not path.name.startswith("fit"))
    assert len(found) == 16
    for name in found:
        expected = ChannelScores.load(tmp_path / f"{name.partition(',')[0]}.1.0")
        scores = ChannelScores.load(tmp_path / f"{name}.2.0")
        assert scores == ChannelScores.load(tmp_path / f"{name}.2.1"), name
        assert scores.num_tokens == expected.num_tokens, name
        assert list(scores) == list(expected), name
        for module, values in expected.items():
            largest = float(values.abs().max())
            assert float((scores[module] - values).abs().max()) <= 1e-6 * largest, (name, module)
    parts = [ChannelScores.load(tmp_path / f"partial.{number}-of-2") for number in (0, 1)]
    assert (parts[0] + parts[1]).num_tokens == ChannelScores.load(tmp_path / "activation.1.0").num_tokens
    fits = [FittedTransfer.load(tmp_path / f"fit.{which}") for which in ("1.0", "2.0", "2.1")]
    assert fits[0].record.num_tokens == fits[1].record.num_tokens
    assert fits[1].gains == fits[2].gains
    for module, values in fits[0].gains.items():
        assert float((fits[1].gains[module] - values).abs().max()) <= 1e-5 * float(values.max()), module


@pytest.mark.slow
def test_processes_share_groups_and_commands(tmp_path):
    run_in_processes(GROUPS, tmp_path)
    run_in_processes(GROUPS, tmp_path, processes=1)
    pairs = {f"{score}.{name}": (f"{score}.{name}.1.0", f"{score}.{name}.2.0") for score, name in SCORED}
    for first, second in [*pairs.values(), ("command.1", "command.2"), ("weight.1", "weight.2")]:
        expected, scores = (ChannelScores.load(tmp_path / name) for name in (first, second))
        assert (scores.num_tokens, scores.num_samples) == (expected.num_tokens, expected.num_samples), second
        assert scores.origin == expected.origin
        for module, values in expected.items():
            torch.testing.assert_close(scores[module], values, rtol=1e-6, atol=1e-12)
            if expected.standard_errors is not None:
                errors = expected.standard_errors[module]
                torch.testing.assert_close(scores.standard_errors[module], errors, rtol=1e-5, atol=1e-9)
    for _, second in pairs.values():
        assert ChannelScores.load(tmp_path / second) == ChannelScores.load(tmp_path / f"{second[:-1]}1")
    parts = [ChannelScores.load(tmp_path / f"activation.2.sums.group-1.{number}-of-2") for number in (0, 1)]
    assert parts[0] + parts[1] == ChannelScores.load(tmp_path / "activation.b.2.0")
    fits = [FittedTransfer.load(tmp_path / f"fit.{which}") for which in (1, 2)]
    assert fits[0].record.num_tokens == fits[1].record.num_tokens
