"""Recover a lost ability with learned transfer scales: a few hundred examples decide how much of each channel moves.

    python examples/learned_scales.py --base Qwen/Qwen2.5-Math-7B-Instruct --donor Qwen/Qwen2.5-7B-Instruct \
        --dataset ability.jsonl --keep-dataset keep.jsonl --output ability

    1. localize     which channels answer differently on the ability
    2. learn        one scale in [0, 1] for each of them, on examples of the ability; many become zero. So all channels
                    are selected first, and the scales start at 0.2: they find the density and λ by themselves
    3. prune        drop those; an ordinary adapter is left, in float32 and with every channel that is not zero
    4. fine-tune    its rows, briefly

While scales and rows train, the answers of the base itself to other examples hold on to what is to be kept. Both
datasets are what TRL's SFTTrainer takes (`prompt` and `completion`, `messages`, or `text`): local JSON or JSONL files,
local folders, or datasets on the Hub.
"""

import argparse
from pathlib import Path

import torch
from datasets import Dataset, load_dataset
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from act_peft import ActConfig, KeepCallback, ScaleSparsityCallback, localize, prune_channels


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True, help="model to repair: folder or Hub id")
    parser.add_argument("--donor", required=True, help="its relative with the ability: folder or Hub id")
    parser.add_argument("--dataset", required=True, help="examples of the ability: JSON(L) file, folder or Hub id")
    parser.add_argument("--keep-dataset", required=True, help="examples of what the base should keep")
    parser.add_argument("--split", default="train", help="split of both datasets (train)")
    parser.add_argument("--samples", type=int, default=300, help="how many examples of each, drawn at random (300)")
    parser.add_argument("--output", type=Path, required=True, help="folder for the adapter")
    parser.add_argument("--density", type=float, default=1.0, help="share of every module that gets scales (1: all)")
    parser.add_argument("--target-modules", help="regular expression for the modules (all but output and embeddings)")
    parser.add_argument("--exclude-modules", nargs="*", help="modules to leave out, for example down_proj")
    parser.add_argument("--transfer-scale", type=float, default=0.2, help="where the scales start (0.2)")
    parser.add_argument("--l1", type=float, default=0.1, help="weight of the penalty that makes scales zero (0.1)")
    parser.add_argument("--keep-weight", type=float, default=3.0, help="of the kept answers in the loss (3)")
    parser.add_argument("--scale-steps", type=int, default=150, help="optimizer steps for the scales (150)")
    parser.add_argument("--scale-learning-rate", type=float, default=0.05, help="of the scales (0.05)")
    parser.add_argument("--row-steps", type=int, default=75, help="optimizer steps for the rows (75)")
    parser.add_argument("--row-learning-rate", type=float, default=2e-5, help="of the rows (2e-5)")
    parser.add_argument("--batch-size", type=int, default=16, help="examples of the ability in an update (16)")
    parser.add_argument("--keep-batch-size", type=int, default=48, help="examples to keep in an update (48)")
    parser.add_argument("--micro-batch-size", type=int, default=4, help="examples at a time (4)")
    parser.add_argument("--max-length", type=int, default=1024, help="tokens of an example (1024)")
    parser.add_argument("--offload", action="store_true", help="the difference stays in CPU memory until it is pruned")
    parser.add_argument("--seed", type=int, default=0, help="(0)")
    arguments = parser.parse_args()
    for size in ("batch_size", "keep_batch_size"):
        if arguments.micro_batch_size < 1 or getattr(arguments, size) % arguments.micro_batch_size:
            parser.error(f"--{size.replace('_', '-')} must be a multiple of --micro-batch-size")
    return arguments


def load_examples(name: str, arguments: argparse.Namespace) -> Dataset:
    """Draw examples from a dataset."""
    if Path(name).is_file():
        dataset = load_dataset("json", data_files=name, split=arguments.split)
    else:
        dataset = load_dataset(name, split=arguments.split)
    return dataset.shuffle(seed=arguments.seed).select(range(min(arguments.samples, len(dataset))))


def main() -> None:
    """Localize, learn the scales, prune, fine-tune the rows, save."""
    arguments = parse_arguments()
    bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    dtype = torch.bfloat16 if bf16 else torch.float32
    ability, keep = (load_examples(name, arguments) for name in (arguments.dataset, arguments.keep_dataset))
    tokenizer = AutoTokenizer.from_pretrained(arguments.base)
    base = AutoModelForCausalLM.from_pretrained(arguments.base, dtype=dtype)

    def trainer(model, dataset, *, steps, learning_rate, callbacks=()):
        settings = SFTConfig(
            output_dir=str(arguments.output),
            max_steps=steps,
            learning_rate=learning_rate,
            optim="adamw_torch",
            weight_decay=0.0,  # would pull every scale towards zero, needed or not
            per_device_train_batch_size=arguments.micro_batch_size,
            gradient_accumulation_steps=arguments.batch_size // arguments.micro_batch_size,
            max_length=arguments.max_length,
            bf16=bf16,
            dataloader_pin_memory=torch.cuda.is_available(),
            save_strategy="no",
            report_to="none",
            seed=arguments.seed,
        )
        return SFTTrainer(
            model, args=settings, train_dataset=dataset, processing_class=tokenizer, callbacks=list(callbacks)
        )

    # These trainers only tokenise and mask, exactly as those that train.
    ability_dataloader, keep_dataloader = (
        trainer(base, dataset, steps=1, learning_rate=0.0).get_train_dataloader() for dataset in (ability, keep)
    )

    # 1. Localize.
    donor = AutoModelForCausalLM.from_pretrained(arguments.donor, dtype=dtype).to(base.device)
    scores = localize(
        base,
        donor,
        ability_dataloader,
        target_modules=arguments.target_modules,
        exclude_modules=arguments.exclude_modules,
    )
    del donor

    # 2. Learn one scale per channel.
    config = ActConfig(
        channels=scores.top(arguments.density, scope="module"),
        donor=arguments.donor,
        transfer_scale=arguments.transfer_scale,
        trainable="scales",
        offload_deltas=arguments.offload,
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(base, config)
    keeping = KeepCallback(
        keep_dataloader, arguments.keep_weight, arguments.keep_batch_size // arguments.micro_batch_size
    )
    sparsity = ScaleSparsityCallback(arguments.l1, bounds=(0, 1))
    steps, rate = arguments.scale_steps, arguments.scale_learning_rate
    trainer(model, ability, steps=steps, learning_rate=rate, callbacks=[keeping, sparsity]).train()

    # 3. Drop the channels that ended at zero.
    prune_channels(model)
    print(f"channels left: {model.peft_config['default'].density:.1%} of all")

    # 4. Make compatible: the rows of these channels train.
    if arguments.row_steps:
        steps, rate = arguments.row_steps, arguments.row_learning_rate
        trainer(model, ability, steps=steps, learning_rate=rate, callbacks=[keeping]).train()

    model.save_pretrained(arguments.output)
    size = (arguments.output / "adapter_model.safetensors").stat().st_size
    print(f"adapter: {arguments.output} ({size / 1e6:.1f} MB)")


if __name__ == "__main__":
    main()
