"""Training of a family of two tiny related models: a donor that knows Spanish, and a base that forgot it for German.

The donor is trained on English and Spanish additions with a little German; the base is the donor after further
training on German alone. Both are ordinary checkpoint folders. The pair of seed 0 is shipped with the demo.

    python -m tests.support.family_training OUTPUT --seed 0
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

from act_peft.demo.family import encode
from act_peft.demo.task import Split, accuracy, rows
from act_peft.demo.words import Language, vocabulary
from act_peft.disk.atomic import new_folder
from act_peft.errors import ActValueError

logger = logging.getLogger(__name__)

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
        shares: share of each language in a batch; a language without a share is not trained.
        steps: optimizer steps.
        learning_rate: peak of the learning rate.
        decay: share of the steps, at the end, in which the learning rate falls linearly to zero.
        batch_size: sentences in a step.
        warmup: number of first steps, in which the learning rate rises linearly.
        problems: training problems of each language; all by default.
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
    """Bounds of a trained model's exact-match accuracy on validation problems, per language."""

    at_least: Mapping[Language, float] = field(default_factory=dict)
    at_most: Mapping[Language, float] = field(default_factory=dict)


ANCESTOR_PHASE = Phase(
    shares={Language.ENGLISH: 0.4, Language.SPANISH: 0.52, Language.GERMAN: 0.08}, steps=1100, learning_rate=4e-3
)
BASE_PHASE = Phase(shares={Language.GERMAN: 1.0}, steps=240, learning_rate=2.5e-3)
DONOR_GATE = Gate(at_least={Language.ENGLISH: 0.9, Language.SPANISH: 0.9}, at_most={Language.GERMAN: 0.3})
BASE_GATE = Gate(at_least={Language.GERMAN: 0.85}, at_most={Language.SPANISH: 0.3})


def measure(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> dict[Language, float]:
    """Validation accuracy in every language."""
    return {
        language: accuracy(model, tokenizer, rows(language, Split.VALIDATION, count=MEASURED_PROBLEMS))
        for language in Language
    }


def check_gate(name: str, gate: Gate, measured: Mapping[Language, float]) -> None:
    """Check that a model learned enough and forgot enough.

    Raises:
        ActValueError: a language is out of bounds.
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
    """Train a model in place on the training split.

    Args:
        model: the model.
        tokenizer: from `build_tokenizer`.
        phase: mixture of languages and settings of the optimizer.
        seed: of the order of the examples.
        show_progress: show a progress bar.
        title: label of the bar.

    Raises:
        ActValueError: a batch needs more sentences than there are.
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
    """Train a donor, and a base from it, and write them to `output_dir/donor` and `output_dir/base`.

    Args:
        output_dir: the folder; it is made if it does not exist.
        seed: of the first weights and of the order of the examples.
        show_progress: show progress bars.
        ancestor_phase: training of the donor, which is the ancestor of both.
        base_phase: further training, which makes the base of the donor.
        donor_gate: bounds of the donor's accuracies.
        base_gate: bounds of the base's accuracies.

    Returns:
        Model -> language -> validation accuracy, `{"donor": {...}, "base": {...}}`.

    Raises:
        ActValueError: a folder exists already, or an accuracy is out of bounds; nothing is written then.
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
        with new_folder(output / name, overwrite=True) as folder:
            copied.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
    return results


def main(argv: Sequence[str] | None = None) -> int:
    """The command line: train one family and log its accuracies."""
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
