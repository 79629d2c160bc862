"""`act-peft localize`: score the channels of two models."""

from __future__ import annotations

import argparse
import tempfile

from act_peft.cli.files import add_output, check_output_file, load_examples

SUMMARY = "Score every channel by how differently base and donor answer, on examples of the ability."
EXAMPLE = "act-peft localize --base org/base --donor org/donor --dataset ability.jsonl --output scores.safetensors"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the command."""
    parser.add_argument("--base", required=True, help="model to repair: folder or Hub id")
    parser.add_argument("--donor", required=True, help="its relative with the ability: folder or Hub id")
    parser.add_argument(
        "--dataset", required=True, help="examples in one of TRL's formats: JSON(L) file, folder or Hub id"
    )
    parser.add_argument("--split", default="train", help="split of the dataset (train)")
    parser.add_argument("--samples", type=int, default=1500, help="how many examples, drawn at random (1500)")
    parser.add_argument("--target-modules", nargs="+", metavar="NAME", help="only these modules")
    parser.add_argument("--exclude-modules", nargs="+", metavar="NAME", help="not these modules")
    parser.add_argument("--assistant-only", action="store_true", help="count the assistant's tokens only")
    parser.add_argument("--batch-size", type=int, default=4, help="examples at a time (4)")
    parser.add_argument("--max-length", type=int, default=1024, help="tokens of an example (1024)")
    parser.add_argument("--dtype", default="auto", help="dtype of both models (that of their checkpoints)")
    parser.add_argument("--device", default="cuda if there is one", help="where both models run")
    parser.add_argument("--seed", type=int, default=0, help="of the drawing (0)")
    add_output(parser, what="file of scores")


def run(arguments: argparse.Namespace) -> None:
    """Localize and print what was written."""
    check_output_file(arguments.output, overwrite=arguments.overwrite)
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    from act_peft import localize

    if arguments.device.startswith("cuda if"):
        arguments.device = "cuda" if torch.cuda.is_available() else "cpu"
    examples = load_examples(arguments.dataset, split=arguments.split, samples=arguments.samples, seed=arguments.seed)
    base, donor = (
        AutoModelForCausalLM.from_pretrained(name, dtype=arguments.dtype).to(arguments.device)
        for name in (arguments.base, arguments.donor)
    )
    with tempfile.TemporaryDirectory() as unused:  # TRL makes its folder, although nothing is saved there
        settings = SFTConfig(
            output_dir=unused,
            per_device_train_batch_size=arguments.batch_size,
            max_length=arguments.max_length,
            assistant_only_loss=arguments.assistant_only,
            use_cpu=arguments.device == "cpu",
            bf16=False,
            dataloader_pin_memory=False,
            report_to="none",
        )
        tokenizing = SFTTrainer(
            base,
            args=settings,
            train_dataset=examples,
            processing_class=AutoTokenizer.from_pretrained(arguments.base),
        )
        scores = localize(
            base,
            donor,
            tokenizing.get_train_dataloader(),
            target_modules=arguments.target_modules,
            exclude_modules=arguments.exclude_modules,
        )
    scores.save(arguments.output)
    channels = sum(len(values) for values in scores.values())
    print(f"{arguments.output}: scores of {channels} channels in {len(scores)} modules, {scores.num_tokens} tokens")
