"""Recover an ability that a model has lost and a relative of it still has: ACT as in arXiv 2601.09398.

    python examples/recover_ability.py --base Qwen/Qwen2.5-Math-7B-Instruct --donor Qwen/Qwen2.5-7B-Instruct \
        --dataset ability.jsonl --output ability

The dataset is what TRL's SFTTrainer takes (`prompt` and `completion`, `messages`, or `text`): a local JSON or JSONL
file, a local folder, or a dataset on the Hub.

The default is the recipe of the README: a fifth of the channels of every module, 0.3 of the donor's difference. The
paper ranks the channels of all modules together, with the output layer and the embeddings. Its settings are
--target-modules ".*" --scope global --density 0.09 --transfer-scale 0.7. On real models such a mask is mostly output
layer; then a warning says so.
"""

import argparse
from pathlib import Path

import torch
from datasets import Dataset, load_dataset
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from act_peft import ActConfig, localize


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True, help="model to repair: folder or Hub id")
    parser.add_argument("--donor", required=True, help="its relative with the ability: folder or Hub id")
    parser.add_argument("--dataset", required=True, help="examples of the ability: JSON(L) file, folder or Hub id")
    parser.add_argument("--split", default="train", help="split of the dataset (train)")
    parser.add_argument("--samples", type=int, default=1500, help="how many examples, drawn at random (1500)")
    parser.add_argument("--output", type=Path, required=True, help="folder for the adapter")
    parser.add_argument("--merged-output", type=Path, help="folder for the merged model, if you want one")
    parser.add_argument("--density", type=float, default=0.2, help="selected share of the channels (0.2)")
    parser.add_argument("--scope", choices=["module", "global"], default="module", help="of every module, or of all")
    parser.add_argument("--transfer-scale", type=float, default=0.3, help="λ, share of the difference (0.3)")
    parser.add_argument("--target-modules", help="regular expression for the modules (all but output and embeddings)")
    parser.add_argument("--exclude-modules", nargs="*", help="modules to leave out, for example down_proj")
    parser.add_argument("--learning-rate", type=float, default=2e-5, help="of Adam (2e-5)")
    parser.add_argument("--epochs", type=float, default=1, help="(1)")
    parser.add_argument("--batch-size", type=int, default=16, help="examples an update (16)")
    parser.add_argument("--micro-batch-size", type=int, default=4, help="examples at a time (4)")
    parser.add_argument("--max-length", type=int, default=1024, help="tokens of an example (1024)")
    parser.add_argument("--seed", type=int, default=0, help="(0)")
    arguments = parser.parse_args()
    if arguments.micro_batch_size < 1 or arguments.batch_size % arguments.micro_batch_size:
        parser.error("--batch-size must be a multiple of --micro-batch-size")
    return arguments


def load_examples(arguments: argparse.Namespace) -> Dataset:
    """Draw the examples that serve both localization and fine-tuning."""
    if Path(arguments.dataset).is_file():
        dataset = load_dataset("json", data_files=arguments.dataset, split=arguments.split)
    else:
        dataset = load_dataset(arguments.dataset, split=arguments.split)
    return dataset.shuffle(seed=arguments.seed).select(range(min(arguments.samples, len(dataset))))


def main() -> None:
    """Localize, select, transfer, fine-tune, save."""
    arguments = parse_arguments()
    bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    dtype = torch.bfloat16 if bf16 else torch.float32
    dataset = load_examples(arguments)
    tokenizer = AutoTokenizer.from_pretrained(arguments.base)
    base = AutoModelForCausalLM.from_pretrained(arguments.base, dtype=dtype)
    settings = SFTConfig(
        output_dir=str(arguments.output),
        num_train_epochs=arguments.epochs,
        learning_rate=arguments.learning_rate,
        optim="adamw_torch",
        weight_decay=0.0,  # without it AdamW is Adam
        per_device_train_batch_size=arguments.micro_batch_size,
        gradient_accumulation_steps=arguments.batch_size // arguments.micro_batch_size,
        max_length=arguments.max_length,
        bf16=bf16,
        dataloader_pin_memory=torch.cuda.is_available(),
        save_strategy="no",
        report_to="none",
        seed=arguments.seed,
    )

    # 1. Localize. This trainer only tokenises and masks, exactly as the one that trains.
    donor = AutoModelForCausalLM.from_pretrained(arguments.donor, dtype=dtype)
    trainer = SFTTrainer(base, args=settings, train_dataset=dataset, processing_class=tokenizer)
    donor.to(base.device)
    scores = localize(
        base,
        donor,
        trainer.get_train_dataloader(),
        target_modules=arguments.target_modules,
        exclude_modules=arguments.exclude_modules,
    )
    del donor, trainer

    # 2. Select. 3. Transfer.
    mask = scores.top(arguments.density, scope=arguments.scope)
    config = ActConfig(
        channels=mask, donor=arguments.donor, transfer_scale=arguments.transfer_scale, task_type="CAUSAL_LM"
    )
    model = get_peft_model(base, config)

    # 4. Make compatible: only the selected channels train.
    SFTTrainer(model, args=settings, train_dataset=dataset, processing_class=tokenizer).train()

    model.save_pretrained(arguments.output)
    scores.save(arguments.output / "scores.safetensors")  # for another density without localizing again
    print(f"{mask}")
    print(f"adapter: {arguments.output}")
    if arguments.merged_output is not None:
        model.merge_and_unload().save_pretrained(arguments.merged_output)
        tokenizer.save_pretrained(arguments.merged_output)
        print(f"merged model: {arguments.merged_output}")


if __name__ == "__main__":
    main()
