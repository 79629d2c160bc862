"""What a recipe may say: names, types, ranges and defaults, in one place. `act-peft run` checks a file against it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from act_peft.export import Target


def _no_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("a number is expected, not a yes or no")
    return value


def _text(value: str) -> str:
    if not value.strip() or not value.isprintable():
        raise ValueError("a text without line breaks is expected, and not an empty one")
    return value


Number = Annotated[float, BeforeValidator(_no_bool), Field(allow_inf_nan=False)]
Count = Annotated[int, BeforeValidator(_no_bool), Field(ge=1)]
Text = Annotated[str, AfterValidator(_text)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Examples(_Part):
    """Examples of a skill, in one of TRL's formats: JSON(L) files, folders or Hub ids.

    Attributes:
        train: to fit and train on.
        test: to measure on; without it a part of `train` is held out.
    """

    train: Text | None = None
    test: Text | None = None


class Ability(Examples):
    """A lost ability.

    Attributes:
        donor: the model, or the adapter of the base, that has it; without it the recipe's `donor`.
    """

    donor: Text | None = None


class Reading(_Part):
    """How examples are read.

    Attributes:
        split: split of the datasets.
        samples: examples to fit and train on, of each skill; they are drawn at random.
        test_samples: examples to measure on, of each skill.
        held_out: share of the examples that is held out where no `test` is named.
        max_length: tokens of an example; the rest is cut off.
        batch_size: examples at a time where nothing trains.
        counted: `answers`, or `all` tokens.
    """

    split: Text = "train"
    samples: Count = 300
    test_samples: Count = 300
    held_out: Annotated[Number, Field(gt=0, lt=1)] = 0.2
    max_length: Count = 1024
    batch_size: Count = 8
    counted: Literal["answers", "all"] = "answers"


class Fit(_Part):
    """The closed form, see `act_peft.fit`."""

    keep_weight: Annotated[Number, Field(ge=0)] = 3.0
    ridge: Annotated[Number, Field(ge=0)] = 0.03
    prior_scale: Number = 0.0


class Localize(_Part):
    """The paper's way, see `act_peft.localize`.

    Attributes:
        score: what a score measures.
        transfer_scale: λ, the share of the donor's difference that the selected channels take.
    """

    score: Literal["activation", "weight", "contrast"] = "activation"
    transfer_scale: Number = 0.3


class Select(_Part):
    """Which channels move.

    Attributes:
        density: their share.
        scope: the same share of every `module`, or the best of all of them (`global`).
        max_channels: at most so many of a module.
        tokens: for `fit`: the share of the token embedding's rows that move; without it `density`; 0 for none.
    """

    density: Annotated[Number, Field(gt=0, le=1)] = 0.5
    scope: Literal["module", "global"] = "module"
    max_channels: Count | None = None
    tokens: Annotated[Number, Field(ge=0, le=1)] | None = None


class Lora(_Part):
    """An ordinary LoRA adapter instead of channels."""

    rank: Count = 16
    target_modules: Text | list[Text] = "all-linear"


class Train(_Part):
    """The fine-tune.

    Attributes:
        trainer: `sft`; `dpo` for examples with `prompt`, `chosen` and `rejected`; `distillation`: the model answers
            the prompts, and the donor grades every token.
        steps: optimizer steps; without it `epochs`.
        epochs: rounds over the examples.
        batch_size: examples in a step.
        micro_batch_size: examples at a time.
        learning_rate: the first one; it falls linearly to zero.
        keep_weight: how much the base's teaching of the kept skills counts; 0 for none.
        donor_weight: how much the donor's teaching of the ability counts beside the labels; 0 for none.
        max_completion_length: tokens of an answer that the model writes, for `distillation`.
        report_to: trackers of transformers.
    """

    trainer: Literal["sft", "dpo", "distillation"] = "sft"
    steps: Count | None = None
    epochs: Annotated[Number, Field(gt=0)] = 1.0
    batch_size: Count = 16
    micro_batch_size: Count = 4
    learning_rate: Annotated[Number, Field(gt=0)] = 1e-4
    keep_weight: Annotated[Number, Field(ge=0)] = 3.0
    donor_weight: Annotated[Number, Field(ge=0)] = 0.0
    max_completion_length: Count = 64
    report_to: list[Text] = []

    @property
    def asks_donor(self) -> bool:
        """Whether the donor teaches."""
        return self.donor_weight > 0 or self.trainer == "distillation"

    @model_validator(mode="after")
    def _whole_batches(self) -> Train:
        if self.batch_size % self.micro_batch_size:
            raise ValueError(
                f"batch_size is {self.batch_size}, expected a multiple of micro_batch_size ({self.micro_batch_size})"
            )
        return self


class Output(_Part):
    """What is written.

    Attributes:
        folder: of everything; the adapter lies in its folder `adapter`.
        merged: also a merged checkpoint, in `merged`.
        lora_rank: also a LoRA adapter of this rank for tools that do not know this library, in `lora`. Norms, biases
            and rows of the token embedding, which it cannot hold, are not selected then.
        lora_target: the program that is to load it, see `act_peft.export_lora`.
    """

    folder: Text | None = None
    merged: bool = False
    lora_rank: Count | None = None
    lora_target: Target = Target.PEFT


class Recipe(_Part):
    """A whole run.

    Attributes:
        base: the model to change: a folder or Hub id.
        donor: its relative that has the abilities.
        abilities: name -> examples.
        keep: name -> examples of skills to keep.
        untouched: name -> examples of skills that are only measured.
        method: `fit`, `localize` (the paper's) or `lora` (only the fine-tune).
        dtype: of the models; `auto` is that of their checkpoints.
        device: of the models; without it the GPU if there is one.
        seed: of everything that is drawn.
    """

    base: Text
    donor: Text | None = None
    abilities: dict[Text, Ability] = Field(min_length=1)
    keep: dict[Text, Examples] = {}
    untouched: dict[Text, Examples] = {}
    method: Literal["fit", "localize", "lora"] = "fit"
    reading: Reading = Reading()
    fit: Fit = Fit()
    localize: Localize = Localize()
    select: Select = Select()
    lora: Lora = Lora()
    train: Train | None = None
    output: Output = Output()
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    device: Text | None = None
    seed: Annotated[int, BeforeValidator(_no_bool), Field(ge=0, lt=2**32)] = 0

    def donors(self) -> list[str | None]:
        """The donor of each ability."""
        return [ability.donor or self.donor for ability in self.abilities.values()]

    @model_validator(mode="after")
    def _fits_together(self) -> Recipe:
        for problem in self._problems():
            raise ValueError(problem)
        return self

    def _problems(self) -> Any:
        names = [*self.abilities, *self.keep, *self.untouched]
        if len(set(names)) < len(names):
            yield f"abilities, keep, untouched: got the names {', '.join(names)}, expected each once"
        for name, ability in self.abilities.items():
            if ability.train is None:
                yield f"abilities.{name}.train is missing"
        asks_donor = self.train is not None and self.train.asks_donor
        if (self.method != "lora" or asks_donor) and None in self.donors():
            yield f"donor is missing, expected the model that has the abilities (for method {self.method})"
        if self.method == "localize" and len(self.abilities) > 1:
            yield f"abilities: got {len(self.abilities)} for method localize, expected one (or method: fit)"
        if self.method == "lora" and self.train is None:
            yield "train is missing, expected the settings of the fine-tune for method lora ({} for the defaults)"
        if self.method == "lora" and self.output.lora_rank is not None:
            yield "output.lora_rank: the adapter is a LoRA already, expected nothing (method lora)"
        if self.output.lora_rank is None and "lora_target" in self.output.model_fields_set:
            yield "output.lora_rank is missing, expected the rank of the LoRA adapter (for output.lora_target)"
        engine, rank = self.output.lora_target.engine, self.output.lora_rank
        if engine is not None and engine.ranks and rank is not None and rank > engine.ranks[-1]:
            yield f"output.lora_rank: got {rank}, expected at most {engine.ranks[-1]} for {engine.name}"
        if asks_donor and len(set(self.donors())) > 1:
            yield "train: got several donors, expected one that teaches"
        learns_keep = self.method == "fit" or (self.train is not None and self.train.keep_weight > 0)
        needs_keep = self.method == "localize" and self.localize.score == "contrast"
        for name, kept in self.keep.items():
            if (learns_keep or needs_keep) and kept.train is None:
                yield f"keep.{name}.train is missing"
        if needs_keep and not self.keep:
            yield "keep is missing, expected a skill to keep (for localize.score: contrast)"
        for name, skill in self.untouched.items():
            if skill.test is None or skill.train is not None:
                yield f"untouched.{name}: expected test alone (nothing is fitted or trained on it)"
        for part in ("fit", "localize", "lora"):
            if part != self.method and part in self.model_fields_set:
                yield f"{part}: got settings for another method, expected those of {self.method}"
        if self.method != "fit" and self.select.tokens is not None:
            yield f"select.tokens: got a share for method {self.method}, expected none (only the fit knows tokens)"
        if self.method == "lora" and "select" in self.model_fields_set:
            yield "select: got settings for channels, expected none for method lora"
