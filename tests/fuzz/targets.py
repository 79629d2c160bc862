"""What reads files: each target damages one of its files, runs, and says what it made of them."""

from __future__ import annotations

import contextlib
import copy
import functools
import hashlib
import io
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn

from act_peft import (
    ActConfig,
    ChannelMask,
    ChannelScores,
    FittedTransfer,
    combine,
    create_adapter,
    export_lora,
    initialize_from_donor,
    localize,
    merge_checkpoint,
)
from act_peft.cli import main
from act_peft.cli.inspect import describe
from act_peft.layers.lookup import act_layers
from tests.support.tiny_checkpoints import save_adapter, save_relatives
from tests.support.tiny_models import batch, build, candidates, random_mask

TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
ADAPTER = (f"a/{TENSORS}", f"a/{CONFIG}")
LORA = (f"lora/{TENSORS}", f"lora/{CONFIG}", f"dora/{TENSORS}", f"dora/{CONFIG}")


@dataclass(frozen=True)
class Target:
    """An entry point.

    Attributes:
        name: its name.
        files: what may be damaged.
        run: reads the files of a folder, and returns what it made of them: any plain values and tensors.
        foreign: other code reads the files first, so its errors may come out.
    """

    name: str
    files: tuple[str, ...]
    run: Callable[[Path, str], Any]
    foreign: bool = False


class WrongAcceptance(BaseException):
    """Something was accepted that no entry point may accept."""


# ------------------------------------------------------------------------------------------------------- originals ---


def make_originals(folder: Path) -> None:
    """All files, whole."""
    save_relatives(folder, "qwen2", shards=False)
    save_relatives(folder / "many", "qwen2")
    save_adapter(folder / "a", "qwen2")
    save_adapter(folder / "b", "qwen2", seed=1)
    weights = [name for name in candidates(build("qwen2")) if name.endswith(("o_proj", "up_proj"))]
    save_adapter(folder / "w", "qwen2", channels={name: [0, 3, 5] for name in weights})
    save_adapter(folder / "s", "qwen2", channels={"q_proj": [1, 2], "norm": [3]}, trainable="both")
    for name, settings in (("lora", {"bias": "lora_only"}), ("dora", {"use_dora": True})):
        config = LoraConfig(r=2, target_modules=["q_proj", "o_proj"], init_lora_weights=False, **settings)
        get_peft_model(build("qwen2"), config).save_pretrained(folder / name)
    counts = candidates(build("qwen2"))
    generator = torch.Generator().manual_seed(0)
    sums = {name: torch.rand(count, generator=generator, dtype=torch.float64) for name, count in counts.items()}
    ChannelScores(sums, 3).save(folder / "scores")
    ChannelScores(sums, 3, kind="contrast", keep=ChannelScores(sums, 5)).save(folder / "contrast")
    fitted().save(folder / "fitted")
    lines = [f'{{"prompt": "w{i}", "completion": " w{i + 1}"}}' for i in range(8)]
    (folder / "data").mkdir()
    (folder / "data" / "d.jsonl").write_text("\n".join(lines) + "\n")
    tokenizer().save_pretrained(folder / "base")


def fitted() -> FittedTransfer:
    from act_peft import fit
    from tests.fitting.conftest import batches

    base, donor = build("qwen2"), build("qwen2", seed=1)
    return fit(base, donor, batches(seed=1), batches(seed=2), target_modules=["o_proj", "norm"])


def tokenizer() -> Any:
    import transformers
    from tokenizers import Tokenizer, models

    words = {"<unk>": 0, **{f"w{i}": i for i in range(1, 48)}}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="<unk>", pad_token="<unk>", eos_token="<unk>"
    )


@functools.cache
def _base() -> nn.Module:
    return build("qwen2")


def base() -> nn.Module:
    return copy.deepcopy(_base())


# --------------------------------------------------------------------------------------------------------- running ---


def loaded(model: nn.Module) -> dict[str, torch.Tensor]:
    """The adapter in a model, after a look at it."""
    found = {}
    for name, layer in act_layers(model).items():
        for adapter, index in layer.act_delta_index.items():
            ascending = bool((index[1:] > index[:-1]).all()) if index.numel() else True
            inside = not index.numel() or 0 <= int(index.min()) <= int(index.max()) < layer.num_channels
            if index.dtype != torch.int64 or not ascending or not inside:
                raise WrongAcceptance(f"{name}: channels {index.tolist()[:8]} of {index.dtype}")
            parts = {
                part: getattr(layer, part)[adapter]
                for part in layer.adapter_layer_names
                if adapter in getattr(layer, part)
            }
            if tuple(parts["act_delta_weight"].shape) != layer.delta_shape(index.numel()):
                raise WrongAcceptance(f"{name}: {index.numel()} channels and {list(parts['act_delta_weight'].shape)}")
            found |= {f"{name}.{adapter}.{part}": tensor.detach() for part, tensor in parts.items()}
            found[f"{name}.{adapter}.index"] = index
    with torch.no_grad():
        model(input_ids=batch(rows=1, length=3))
    return found


def in_folder(path: Path) -> dict[str, Any]:
    """The tensors that were written."""
    return {f"{f.name}:{n}": t for f in sorted(path.glob("*.safetensors")) for n, t in load_file(f).items()}


def from_pretrained(folder: Path, damaged: str) -> Any:
    name = damaged.partition("/")[0]
    return loaded(PeftModel.from_pretrained(base(), str(folder / name)))


def second_adapter(folder: Path, damaged: str) -> Any:
    model = PeftModel.from_pretrained(base(), str(folder / "b"))
    model.load_adapter(str(folder / "a"), "second")
    return loaded(model)


def transformers_loads(folder: Path, damaged: str) -> Any:
    model = base()
    model.load_adapter(str(folder / damaged.partition("/")[0]))
    return loaded(model)


def state_dict(folder: Path, damaged: str) -> Any:
    if not (folder / ADAPTER[0]).is_file():  # safetensors would wait for a pipe
        raise Refused("no file")
    model = get_peft_model(base(), ActConfig(channels=random_mask(_base(), 0.3)))
    set_peft_model_state_dict(model, load_file(folder / ADAPTER[0]))
    return loaded(model)


def merging(folder: Path, damaged: str) -> Any:
    where = "many/base" if damaged.startswith("many/") else "base"
    adapter = damaged.partition("/")[0]
    merge_checkpoint(folder / where, folder / (adapter if adapter in "as" else "a"), folder / "out")
    return in_folder(folder / "out")


def creating(donor: str) -> Callable[[Path, str], Any]:
    def run(folder: Path, damaged: str) -> Any:
        name = damaged.partition("/")[0] if donor == "*" else donor
        create_adapter(folder / "base", folder / name, folder / "mask", folder / "out")
        return in_folder(folder / "out")

    return run


def from_donor(folder: Path, damaged: str) -> Any:
    model = get_peft_model(base(), ActConfig(channels={"q_proj": [1, 2]}))
    initialize_from_donor(model, folder / damaged.partition("/")[0])
    return loaded(model)


def localizing(folder: Path, damaged: str) -> Any:
    data = [{"input_ids": batch(rows=1, length=4)}]
    return dict(localize(base(), str(folder / damaged.partition("/")[0]), data, show_progress=False))


def combining(folder: Path, damaged: str) -> Any:
    combine([folder / damaged.partition("/")[0], folder / "b"], folder / "out")
    return in_folder(folder / "out")


def exporting(folder: Path, damaged: str) -> Any:
    export_lora(folder / damaged.partition("/")[0], folder / "out")
    return in_folder(folder / "out")


def inspecting(folder: Path, damaged: str) -> Any:
    return describe(folder / damaged.partition("/")[0])


def mask(folder: Path, damaged: str) -> Any:
    read = ChannelMask.load(folder / "mask")
    return {**read, "density": read.density, "union": (read | read).num_selected}


def scores(folder: Path, damaged: str) -> Any:
    read = ChannelScores.load(folder / damaged)
    return {**read, "top": dict(read.top(0.3)), "sum": dict(read + read)}


def fitting(folder: Path, damaged: str) -> Any:
    read = FittedTransfer.load(folder / "fitted")
    read.to_adapter(read.gains.top(0.3, scope="module"), folder / "out")
    return {**read.gains, **in_folder(folder / "out")}


def command(*arguments: str) -> Callable[[Path, str], Any]:
    """A command of the command line, in this process."""

    def run(folder: Path, damaged: str) -> Any:
        out, err = io.StringIO(), io.StringIO()
        argv = [a.replace("DIR", str(folder)).replace("THIS", damaged.partition("/")[0]) for a in arguments]
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                status = main(argv)
            except SystemExit as error:
                raise WrongAcceptance(f"bad arguments: {err.getvalue()[-300:]}") from error
        lines = [
            line for line in err.getvalue().splitlines() if "warning" not in line and line.startswith("act-peft:")
        ]
        if status not in (0, 1, 2) or "Traceback" in err.getvalue() or (status and len(lines) != 1):
            raise WrongAcceptance(f"status {status}, {len(lines)} lines: {err.getvalue()[-300:]}")
        if status and "(unexpected;" in lines[0]:
            raise WrongAcceptance(lines[0][:300])
        out.getvalue().encode()
        if status:
            raise Refused(lines[0])
        return out.getvalue().replace(str(folder), "")

    return run


class Refused(Exception):
    """A command ended with one line and status 1 or 2."""


LOCALIZE = ("localize", "--base", "DIR/base", "--donor", "DIR/donor", "--output", "DIR/out", "--device", "cpu")
BASE = ("base/config.json", "base/model.safetensors")
TARGETS = [
    Target("ActConfig", ADAPTER, lambda f, d: ActConfig.from_pretrained(str(f / "a")).to_dict()),
    Target("PeftModel", (*ADAPTER, f"s/{TENSORS}", f"s/{CONFIG}"), from_pretrained, foreign=True),
    Target("PeftModel.load_adapter", ADAPTER, second_adapter, foreign=True),
    Target("transformers.load_adapter", (*ADAPTER, f"s/{TENSORS}"), transformers_loads, foreign=True),
    Target("set_peft_model_state_dict", ADAPTER[:1], state_dict, foreign=True),
    Target("merge_checkpoint", (*ADAPTER, *BASE, f"s/{TENSORS}", f"s/{CONFIG}"), merging),
    Target(
        "merge_checkpoint of shards",
        ("many/base/config.json", "many/base/model.safetensors.index.json", "many/base/model-00001-of-*.safetensors"),
        merging,
    ),
    Target("combine", ADAPTER, combining),
    Target("export_lora", (f"w/{TENSORS}", f"w/{CONFIG}"), exporting),
    Target("inspect", (*ADAPTER, "mask", "scores", "contrast", "fitted"), inspecting),
    Target("donor: ACT and LoRA", (*ADAPTER, *LORA), creating("*")),
    Target("donor: full", ("donor/config.json", "donor/model.safetensors", *BASE, "mask"), creating("donor")),
    Target("initialize_from_donor", (*ADAPTER, *LORA, "donor/config.json", "donor/model.safetensors"), from_donor),
    Target("localize with an adapter", (*ADAPTER, *LORA), localizing),
    Target("ChannelMask", ("mask",), mask),
    Target("ChannelScores", ("scores", "contrast"), scores),
    Target("FittedTransfer", ("fitted",), fitting),
    Target("act-peft inspect", (*ADAPTER, "mask", "scores", "fitted"), command("inspect", "DIR/THIS")),
    Target("act-peft inspect --json", (*ADAPTER, "mask"), command("inspect", "DIR/THIS", "--json")),
    Target(
        "act-peft select",
        ("scores", "fitted"),
        command("select", "DIR/THIS", "--density", "0.1", "--output", "DIR/out"),
    ),
    Target(
        "act-peft localize",
        ("data/d.jsonl", *BASE, "base/tokenizer.json", "base/tokenizer_config.json", "donor/config.json"),
        command(*LOCALIZE, "--dataset", "DIR/data/d.jsonl"),
    ),
]


def digest(value: Any) -> str:
    """Equal for equal results."""
    found = hashlib.sha256()

    def add(each: Any) -> None:
        if isinstance(each, torch.Tensor):
            found.update(f"{each.dtype}{list(each.shape)}".encode())
            found.update(
                each.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if each.numel() else b""
            )
        elif isinstance(each, dict):
            for key in sorted(each, key=repr):
                found.update(repr(key).encode())
                add(each[key])
        else:
            found.update(repr(sorted(each, key=repr) if isinstance(each, set) else each).encode())

    add(value)
    return found.hexdigest()


@contextlib.contextmanager
def quiet() -> Any:
    """Nothing but results."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield
