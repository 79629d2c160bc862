"""Recover an ability that a model has lost and a relative of it still has.

    python examples/recover_ability.py --base org/fine-tuned --donor org/before --dataset ability.jsonl \
        --keep-dataset keep.jsonl --output ability

The default, `--method fitted`: the donor's difference is fitted in closed form (no training), so that the base answers
as the donor does on the ability and as before on what is to be kept. The best half of the channels of every module
becomes an adapter. It is fine-tuned briefly on the ability, with the base as teacher on the data to keep. `--steps 0`
leaves the fine-tune out.

`--method paper` is ACT as in arXiv 2601.09398: channels are selected by activation, a fixed share of the donor's
difference moves over, and the selected channels are fine-tuned on the examples. It needs no data to keep. The paper
ranks the channels of all modules together, with the output layer and the embeddings. Its settings are
--target-modules ".*" --scope global --density 0.09 --transfer-scale 0.7. On real models such a mask is mostly output
layer; then a warning says so.

Datasets are what TRL's SFTTrainer takes (`prompt` and `completion`, `messages`, or `text`): a local JSON or JSONL
file, a local folder, or a dataset on the Hub.
"""

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from datasets import Dataset, load_dataset
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from act_peft import ActConfig, KeepCallback, fit, localize


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True, help="model to repair: folder or Hub id")
    parser.add_argument("--donor", required=True, help="its relative with the ability: folder or Hub id")
    parser.add_argument("--dataset", required=True, help="examples of the ability: JSON(L) file, folder or Hub id")
    parser.add_argument("--keep-dataset", help="examples of what is to be kept; needed by --method fitted")
    parser.add_argument("--method", choices=["fitted", "paper"], default="fitted", help="(fitted)")
    parser.add_argument("--split", default="train", help="split of the datasets (train)")
    parser.add_argument("--samples", type=int, default=1500, help="how many examples of each, drawn at random (1500)")
    parser.add_argument("--output", type=Path, required=True, help="folder for the adapter")
    parser.add_argument("--merged-output", type=Path, help="folder for the merged model, if you want one")
    parser.add_argument("--keep-weight", type=float, default=3.0, help="μ of the fit and weight of the teacher (3)")
    parser.add_argument("--density", type=float, help="selected share of the channels (0.5; paper: 0.2)")
    parser.add_argument("--scope", choices=["module", "global"], default="module", help="of every module, or of all")
    parser.add_argument("--transfer-scale", type=float, default=0.3, help="paper: λ, share of the difference (0.3)")
    parser.add_argument("--target-modules", help="paper: regular expression for the modules")
    parser.add_argument("--exclude-modules", nargs="*", help="modules to leave out, for example down_proj")
    parser.add_argument("--learning-rate", type=float, help="of Adam (1e-4; paper: 2e-5)")
    parser.add_argument("--epochs", type=float, default=1, help="of the fine-tune, if --steps is not given (1)")
    parser.add_argument("--steps", type=int, help="optimizer steps of the fine-tune; 0 for none (by --epochs)")
    parser.add_argument("--batch-size", type=int, default=16, help="examples an update (16)")
    parser.add_argument("--micro-batch-size", type=int, default=4, help="examples at a time (4)")
    parser.add_argument("--max-length", type=int, default=1024, help="tokens of an example (1024)")
    parser.add_argument("--seed", type=int, default=0, help="(0)")
    arguments = parser.parse_args()
    if arguments.micro_batch_size < 1 or arguments.batch_size % arguments.micro_batch_size:
        parser.error("--batch-size must be a multiple of --micro-batch-size")
    if arguments.method == "fitted" and arguments.keep_dataset is None:
        parser.error("--method fitted needs --keep-dataset (or take --method paper)")
    fitted = arguments.method == "fitted"
    arguments.density = (0.5 if fitted else 0.2) if arguments.density is None else arguments.density
    arguments.learning_rate = (
        (1e-4 if fitted else 2e-5) if arguments.learning_rate is None else arguments.learning_rate
    )
    return arguments


def load_examples(name: str, arguments: argparse.Namespace) -> Dataset:
    """Draw the examples that serve the fit or localization and the fine-tune."""
    if Path(name).is_file():
        dataset = load_dataset("json", data_files=name, split=arguments.split)
    else:
        dataset = load_dataset(name, split=arguments.split)
    return dataset.shuffle(seed=arguments.seed).select(range(min(arguments.samples, len(dataset))))


class Recipe:
    """The models, the data and the settings that both methods share."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
        self.ability = load_examples(arguments.dataset, arguments)
        self.keep = None if arguments.keep_dataset is None else load_examples(arguments.keep_dataset, arguments)
        self.tokenizer = AutoTokenizer.from_pretrained(arguments.base)

    def model(self, name: str) -> torch.nn.Module:
        """A model, where the trainer would put it."""
        model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.bfloat16 if self.bf16 else torch.float32)
        return model.to("cuda" if torch.cuda.is_available() else "cpu")

    def trainer(self, model: torch.nn.Module, dataset: Dataset) -> SFTTrainer:
        """A trainer; some of them only tokenize and mask, exactly as the one that trains."""
        arguments = self.arguments
        settings = SFTConfig(
            output_dir=str(arguments.output),
            num_train_epochs=arguments.epochs,
            max_steps=arguments.steps or -1,
            learning_rate=arguments.learning_rate,
            optim="adamw_torch",
            weight_decay=0.0,  # without it AdamW is Adam
            per_device_train_batch_size=arguments.micro_batch_size,
            gradient_accumulation_steps=arguments.batch_size // arguments.micro_batch_size,
            max_length=arguments.max_length,
            bf16=self.bf16,
            dataloader_pin_memory=torch.cuda.is_available(),
            save_strategy="no",
            report_to="none",
            seed=arguments.seed,
        )
        return SFTTrainer(model, args=settings, train_dataset=dataset, processing_class=self.tokenizer)

    def tune(self, model: PeftModel, callbacks: list) -> None:
        """The short fine-tune of the adapter."""
        if self.arguments.steps == 0:
            return
        trainer = self.trainer(model, self.ability)
        for callback in callbacks:
            trainer.add_callback(callback)
        trainer.train()

    def fitted(self) -> PeftModel:
        """Fit, select by gain, fine-tune with the base as teacher of what is kept."""
        arguments = self.arguments
        base, donor = self.model(arguments.base), self.model(arguments.donor)
        ability = self.trainer(base, self.ability).get_train_dataloader()
        keep = self.trainer(base, self.keep).get_train_dataloader()
        fitted = fit(
            base,
            donor,
            ability,
            keep,
            keep_weight=arguments.keep_weight,
            exclude_modules=arguments.exclude_modules,
            max_rank=0,
        )
        del donor
        mask = fitted.gains.top(arguments.density, scope=arguments.scope)
        with TemporaryDirectory() as folder:
            # The selected rows, and the same share of the tokens of the embedding.
            tokens = arguments.density if fitted.token_gains else None
            fitted.to_adapter(mask, Path(folder) / "fitted", tokens=tokens)
            model = PeftModel.from_pretrained(self.model(arguments.base), Path(folder) / "fitted", is_trainable=True)
        self.tune(model, [KeepCallback(keep, weight=arguments.keep_weight)])
        print(mask)
        return model

    def paper(self) -> PeftModel:
        """Localize, select, transfer, fine-tune: ACT as in the paper."""
        arguments = self.arguments
        base, donor = self.model(arguments.base), self.model(arguments.donor)
        scores = localize(
            base,
            donor,
            self.trainer(base, self.ability).get_train_dataloader(),
            target_modules=arguments.target_modules,
            exclude_modules=arguments.exclude_modules,
        )
        del donor
        mask = scores.top(arguments.density, scope=arguments.scope)
        scale = arguments.transfer_scale
        config = ActConfig(channels=mask, donor=arguments.donor, transfer_scale=scale, task_type="CAUSAL_LM")
        model = get_peft_model(base, config)
        self.tune(model, [])
        arguments.output.mkdir(parents=True, exist_ok=True)
        scores.save(arguments.output / "scores.safetensors")  # for another density without localizing again
        print(mask)
        return model


def main() -> None:
    """Make the adapter, and the merged model if it is wanted."""
    arguments = parse_arguments()
    recipe = Recipe(arguments)
    model = recipe.fitted() if arguments.method == "fitted" else recipe.paper()
    model.save_pretrained(arguments.output)
    print(f"adapter: {arguments.output}")
    if arguments.merged_output is not None:
        model.merge_and_unload().save_pretrained(arguments.merged_output)
        recipe.tokenizer.save_pretrained(arguments.merged_output)
        print(f"merged model: {arguments.merged_output}")


if __name__ == "__main__":
    main()
