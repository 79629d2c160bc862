"""A family of two tiny related models: a donor that knows Spanish and a base that forgot it while learning German.

The donor is trained on English and Spanish additions with a little German, the base is the donor after further
training on German alone. Both are ordinary checkpoint folders; a pair is shipped with the package (`BASE`, `DONOR`).

    python -m act_peft.demo.family OUTPUT --seed 0
"""

import argparse
import copy
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from act_peft.batches.answer_tokens import IGNORED_LABEL
from act_peft.demo.task import Row, Split, accuracy, rows
from act_peft.demo.words import Language, vocabulary
from act_peft.disk.atomic import new_folder
from act_peft.errors import ActValueError

logger = logging.getLogger(__name__)

CHECKPOINTS = Path(__file__).parent / "checkpoints"
BASE = CHECKPOINTS / "base"
DONOR = CHECKPOINTS / "donor"

PAD, BOS, EOS, UNK = "<pad>", "<bos>", "<eos>", "<unk>"
MEASURED_PROBLEMS = 500


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer for all sentences of the task.

    Words are split at white space and `<bos>` is put in front, as Llama's tokenizers do. Nothing puts `<eos>` at the
    end: TRL adds it to completions by itself.
    """
    ids = {token: index for index, token in enumerate([PAD, BOS, EOS, UNK, *vocabulary()])}
    tokenizer = Tokenizer(models.WordLevel(vocab=ids, unk_token=UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, ids[BOS])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNK,
        padding_side="right",
        model_max_length=32,
    )


def build_model(tokenizer: PreTrainedTokenizerFast, *, seed: int) -> LlamaForCausalLM:
    """A Llama of about 240,000 parameters with fresh weights; the global random state is left alone."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=240,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=32,
        initializer_range=0.06,  # the usual 0.02 suits wide models; here it would add 200 steps of training
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


@dataclass(frozen=True)
class Phase:
    """One training run.

    Attributes:
        shares: The share of each language in a batch; a language that is not named is not trained.
        steps: Optimizer steps.
        learning_rate: The peak of the learning rate.
        decay: The last share of the steps, in which the learning rate falls linearly to zero.
        batch_size: Sentences in a step.
        warmup: The first steps, in which the learning rate rises linearly.
        problems: Training problems of each language; all by default.
    """

    shares: Mapping[Language, float]
    steps: int
    learning_rate: float
    decay: float = 0.3
    batch_size: int = 128
    warmup: int = 40
    problems: int | None = None


@dataclass(frozen=True)
class Gate:
    """What a trained model must and must not be able to do, in exact-match accuracy on validation problems."""

    at_least: Mapping[Language, float] = field(default_factory=dict)
    at_most: Mapping[Language, float] = field(default_factory=dict)


ANCESTOR_PHASE = Phase(
    shares={Language.ENGLISH: 0.4, Language.SPANISH: 0.52, Language.GERMAN: 0.08}, steps=1100, learning_rate=4e-3
)
BASE_PHASE = Phase(shares={Language.GERMAN: 1.0}, steps=240, learning_rate=2.5e-3)
DONOR_GATE = Gate(at_least={Language.ENGLISH: 0.9, Language.SPANISH: 0.9}, at_most={Language.GERMAN: 0.3})
BASE_GATE = Gate(at_least={Language.GERMAN: 0.85}, at_most={Language.SPANISH: 0.3})


def encode(tokenizer: PreTrainedTokenizerFast, examples: Sequence[Row]) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokenises rows as TRL does: the labels are the answer and `<eos>`.

    Args:
        tokenizer: From `build_tokenizer`.
        examples: Prompt-completion rows.

    Returns:
        Token ids and labels, both int64 `[B, T]`, padded on the right; ids that do not count have label -100.
    """
    prompts = tokenizer([example["prompt"] for example in examples])["input_ids"]
    texts = [example["prompt"] + example["completion"] + EOS for example in examples]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    ids, labels = batch["input_ids"], batch["input_ids"].clone()
    labels[batch["attention_mask"] == 0] = IGNORED_LABEL
    for index, prompt in enumerate(prompts):
        labels[index, : len(prompt)] = IGNORED_LABEL
    return ids, labels


def measure(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> dict[Language, float]:
    """Validation accuracy in every language."""
    return {
        language: accuracy(model, tokenizer, rows(language, Split.VALIDATION, count=MEASURED_PROBLEMS))
        for language in Language
    }


def check_gate(name: str, gate: Gate, measured: Mapping[Language, float]) -> None:
    """Raises if a model learned too little or kept too much.

    Raises:
        ActValueError: Names the first language out of bounds.
    """
    for language, bound in gate.at_least.items():
        if measured[language] < bound:
            raise ActValueError(
                f"{name}: {language.name.title()} accuracy is {measured[language]:.2f}, expected at least {bound:.2f} "
                "(try another seed)"
            )
    for language, bound in gate.at_most.items():
        if measured[language] > bound:
            raise ActValueError(
                f"{name}: {language.name.title()} accuracy is {measured[language]:.2f}, expected at most {bound:.2f} "
                "(try another seed)"
            )


def _rate_factor(phase: Phase, step: int) -> float:
    rise = min(1.0, (step + 1) / phase.warmup)
    fall = min(1.0, (phase.steps - step) / max(1.0, phase.decay * phase.steps))
    return rise * fall


def train_phase(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    phase: Phase,
    *,
    seed: int,
    show_progress: bool = True,
    title: str = "training",
) -> None:
    """Trains a model in place on the training split.

    Args:
        model: The model.
        tokenizer: From `build_tokenizer`.
        phase: The mixture of languages and the optimizer's settings.
        seed: Decides the order of the examples.
        show_progress: Whether to show a progress bar.
        title: The bar's label.

    Raises:
        ActValueError: If a batch asks for more sentences than there are.
    """
    generator = torch.Generator().manual_seed(seed)
    languages = list(phase.shares)
    mixture = [row for language in languages for row in rows(language, Split.TRAIN, count=phase.problems)]
    if len(mixture) < phase.batch_size:
        raise ActValueError(
            f"train_phase: got batch_size={phase.batch_size}, expected at most {len(mixture)} (the chosen sentences)"
        )
    ids, labels = encode(tokenizer, mixture)  # [N, T]
    per_language = len(mixture) // len(languages)
    weights = torch.tensor([phase.shares[language] for language in languages]).repeat_interleave(per_language)
    optimizer = torch.optim.AdamW(model.parameters(), lr=phase.learning_rate, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate_factor(phase, step))
    model.train()
    progress = tqdm(range(phase.steps), desc=title, disable=not show_progress)
    for step in progress:
        chosen = torch.multinomial(weights, phase.batch_size, generator=generator)
        loss = model(input_ids=ids[chosen], labels=labels[chosen]).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 20 == 0:
            progress.set_postfix(loss=f"{loss.item():.3f}")
    model.eval()


def train_family(
    output_dir: str | Path,
    *,
    seed: int,
    show_progress: bool = True,
    ancestor_phase: Phase = ANCESTOR_PHASE,
    base_phase: Phase = BASE_PHASE,
    donor_gate: Gate = DONOR_GATE,
    base_gate: Gate = BASE_GATE,
) -> dict[str, dict[Language, float]]:
    """Trains a donor and a base from it, and writes them to `output_dir/donor` and `output_dir/base`.

    Args:
        output_dir: A folder; it is made if it does not exist.
        seed: Decides the first weights and the order of the examples.
        show_progress: Whether to show progress bars.
        ancestor_phase: How the donor, which is the ancestor of both, is trained.
        base_phase: How the donor is trained further to become the base.
        donor_gate: What the donor must and must not be able to do.
        base_gate: The same for the base.

    Returns:
        Validation accuracies by model and language, `{"donor": {...}, "base": {...}}`.

    Raises:
        ActValueError: If a folder is there already or a gate is not met; nothing is written then.
    """
    output = Path(output_dir)
    for name in ("donor", "base"):
        if (output / name).exists():
            raise ActValueError(f"train_family: {output / name} exists, expected a new folder (remove it first)")
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, seed=seed)
    results = {}
    trained = {}
    for name, phase, gate in (("donor", ancestor_phase, donor_gate), ("base", base_phase, base_gate)):
        train_phase(model, tokenizer, phase, seed=seed, show_progress=show_progress, title=name)
        results[name] = measure(model, tokenizer)
        logger.info("%s: %s", name, {language.value: value for language, value in results[name].items()})
        check_gate(name, gate, results[name])
        trained[name] = copy.deepcopy(model)
    output.mkdir(parents=True, exist_ok=True)
    for name, copied in trained.items():
        with new_folder(output / name) as folder:
            copied.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
    return results


def main(argv: Sequence[str] | None = None) -> int:
    """The command line: trains one family and logs its accuracies."""
    parser = argparse.ArgumentParser(description="Train the demo's tiny donor and base.")
    parser.add_argument("output", type=Path, help="folder for donor/ and base/")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    train_family(arguments.output, seed=arguments.seed, show_progress=not arguments.quiet)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
