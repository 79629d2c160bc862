"""The study's data: an ability that the donor has, texts to keep, skills that nobody touches.

All made of what pip and apt install, and written once as JSONL in TRL's formats (`prompt` and `completion`,
conversations among them, or `text`), one file for each skill and split. Questions about one country all lie in the
same split. The donor decides which questions count: those that it answers.
"""

from __future__ import annotations

import gzip
import json
import random
import re
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from facts import open_prompts, other_questions
from measure import Row, score
from models import load

GERMAN_PAGES = Path("/usr/share/man/de")  # Debian: apt-get install manpages-de
SPLITS = ("train", "validation", "test")
CHUNK = 64  # tokens of a text that is kept or measured
ANSWER = 64  # tokens of the donor's answer to an open prompt, at most

Example = dict[str, Any]
CAPITAL_OF = r"The country with the capital \1 is"

Question = tuple[str, str, str]  # question, beginning of the answer, what completes it


# ---------------------------------------------------------------------------------------------------- geography ---


def country_questions() -> list[tuple[str, list[Question]]]:
    """By country, what can be asked about it."""
    import pycountry
    from countryinfo import all_countries

    found = []
    for country in all_countries():
        facts = country.info()
        name, capital, region = (facts.get(key) for key in ("name", "capital", "region"))
        questions: list[Question] = []
        if isinstance(capital, str) and capital:
            questions += [
                (f"What is the capital of {name}?", f"The capital of {name} is", capital),
                (f"Which country's capital is {capital}?", f"{capital} is the capital of", name),
            ]
        if isinstance(region, str) and region:
            questions.append((f"On which continent is {name}?", f"{name} is in", region))
        currency = _first(facts.get("currencies"), lambda code: pycountry.currencies.get(alpha_3=code))
        if currency:
            questions.append((f"What is the currency of {name}?", f"The currency of {name} is the", currency))
        language = _first(facts.get("languages"), lambda code: pycountry.languages.get(alpha_2=code))
        if language:
            questions.append(
                (f"Which language is spoken in {name}?", f"The language spoken in {name} is", language.split(" (")[0])
            )
        found.append((name, questions))
    return sorted(found)


def _first(codes: Any, look_up: Any) -> str | None:
    entry = look_up(codes[0]) if codes else None
    return entry.name if entry is not None else None


def paraphrased(question: Question) -> Question:
    """The same fact asked in other words; gives more examples to learn from, never one to test on."""
    asked, _, answer = question
    rules = [
        (r"What is the capital of (.*)\?", r"Name the capital city of \1.", r"\1's capital city is"),
        (r"Which country's capital is (.*)\?", r"\1 is the capital of which country?", CAPITAL_OF),
        (r"On which continent is (.*)\?", r"Which part of the world is \1 in?", r"\1 lies in"),
        (r"What is the currency of (.*)\?", r"How do people pay in \1?", r"In \1 people pay with the"),
        (r"Which language is spoken in (.*)\?", r"What do people speak in \1?", r"In \1 people speak"),
    ]  # fmt: skip
    for pattern, other, lead in rules:
        if re.fullmatch(pattern, asked):
            return re.sub(pattern, other, asked), re.sub(pattern, lead, asked), answer
    raise ValueError(f"no other words for {asked!r}")


def as_example(question: Question) -> Example:
    """TRL's prompt and completion."""
    asked, begun, answer = question
    return {
        "prompt": f"Question: {asked}\nAnswer: {begun}",
        "completion": answer if begun.endswith('"') else f" {answer}",
    }


def answered(examples: Sequence[Example], donor: Any, tokenizer: Any) -> list[Example]:
    """Those whose every answer token is the donor's first choice."""
    rows = [encode(example, tokenizer) for example in examples]
    found = score(donor, rows, tokenizer.pad_token_id)
    return [example for example, a, b in zip(examples, found.right, found.tokens, strict=True) if a == b]


def geography(donor: Any, tokenizer: Any) -> dict[str, list[Example]]:
    """The ability: a third of the countries to test on, a sixth to choose settings by, half to learn from."""
    countries = country_questions()
    random.Random(0).shuffle(countries)
    third, sixth = len(countries) // 3, len(countries) // 6
    parts = {
        "test": countries[:third],
        "validation": countries[third : third + sixth],
        "train": countries[third + sixth :],
    }
    found = {}
    for split, chosen in parts.items():
        questions = [question for _, several in chosen for question in several]
        if split == "train":
            questions += [paraphrased(question) for question in questions]
        found[split] = answered([as_example(question) for question in questions], donor, tokenizer)
    return found


# --------------------------------------------------------------------------------------------------------- texts ---


def german_pages() -> list[str]:
    """German manual pages without their markup."""
    if not GERMAN_PAGES.is_dir():
        raise SystemExit(f"no {GERMAN_PAGES}: apt-get install manpages-de")
    pages = {}
    for path in sorted(GERMAN_PAGES.glob("man*/*.gz")):
        if not path.is_symlink():
            text = _without_markup(gzip.decompress(path.read_bytes()).decode(errors="ignore"))
            if len(text) > 500:
                pages[text] = None  # some pages exist under two names
    return list(pages)


def _without_markup(source: str) -> str:
    lines = []
    for line in source.splitlines():
        if line.startswith(('.\\"', "'\\\"")) or re.match(
            r"\.(TH|so|PP|TP|nf|fi|RS|RE|IP|ad|hy|ft|in|ds|if|de)\b", line
        ):
            continue
        line = re.sub(r"^\.[A-Za-z]+ ?", "", line)
        line = re.sub(r"\\f(\[[^]]*\]|\(..|.)", "", line).replace(r"\,", "").replace(r"\/", "").replace(r"\&", "")
        line = re.sub(r"\\\[..\]|\\\(..", " ", line).replace(r"\-", "-").replace("\\e", "\\")
        if not re.search(r"\\[{}hmsuwn]", line):  # markup within a line that some converters leave
            lines.append(line)
    return re.sub(r"\n{2,}", "\n", "\n".join(lines))


def python_sources() -> list[str]:
    """Modules of the standard library."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    return [path.read_text(errors="ignore") for path in sorted(folder.glob("*.py")) if path.stat().st_size > 2000]


def chunked(texts: Sequence[str], tokenizer: Any, length: int = CHUNK) -> Iterator[Example]:
    """Texts cut into pieces of so many tokens; the first piece of a text, a header, is left out."""
    for text in texts:
        ids = tokenizer(text)["input_ids"]
        for start in range(length, len(ids) - length + 1, length):
            yield {"text": tokenizer.decode(ids[start : start + length])}


def text_splits(texts: list[str], tokenizer: Any) -> dict[str, list[Example]]:
    """Pieces of texts, those of one text in one split; most texts are left for specialising a model on."""
    texts = list(texts)
    random.Random(0).shuffle(texts)
    share = len(texts) // 10
    parts = {"test": texts[:share], "validation": texts[share : 2 * share], "train": texts[2 * share : 5 * share]}
    sizes = {"test": 100, "validation": 50, "train": 400}
    found = {}
    for split, chosen in parts.items():
        pieces = list(chunked(chosen, tokenizer))
        random.Random(1).shuffle(pieces)
        found[split] = pieces[: sizes[split]]
    found["specialise"] = [{"text": text} for text in texts[5 * share :]]
    return found


# ---------------------------------------------------------------------------------------------------- open prompts ---


@torch.no_grad()
def open_answers(donor: Any, tokenizer: Any) -> dict[str, list[Example]]:
    """Everyday requests with the donor's own greedy answers: twelve to learn from, the others to test on."""
    examples = []
    for prompt in open_prompts():
        messages = [{"role": "user", "content": prompt}]
        asked = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        with torch.autocast("cpu", torch.bfloat16):
            out = donor.generate(**asked, max_new_tokens=ANSWER, do_sample=False, pad_token_id=tokenizer.pad_token_id)
        answer = tokenizer.decode(out[0, asked["input_ids"].shape[1] :], skip_special_tokens=True)
        examples.append({"prompt": messages, "completion": [{"role": "assistant", "content": answer}]})
    return {"train": examples[:12], "test": examples[12:]}


# ----------------------------------------------------------------------------------------------- files and tokens ---


def encode(example: Example, tokenizer: Any) -> Row:
    """Token ids; of a text everything counts, otherwise the completion, as TRL's SFTTrainer has it."""
    if "text" in example:
        return Row(tuple(tokenizer(example["text"])["input_ids"][:CHUNK]), 1)
    prompt, completion = example["prompt"], example["completion"]
    if not isinstance(prompt, str):
        prompt = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
        completion = completion[0]["content"]
    first, second = tokenizer(prompt)["input_ids"], tokenizer(completion)["input_ids"]
    return Row((*first, *second), len(first))


def write(folder: Path, skill: str, splits: dict[str, list[Example]]) -> None:
    """One JSONL file for each split."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, examples in splits.items():
        lines = [json.dumps(example, ensure_ascii=False) + "\n" for example in examples]
        (folder / f"{skill}-{split}.jsonl").write_text("".join(lines))


def read(folder: Path, skill: str, split: str) -> list[Example]:
    """What `write` wrote."""
    return [json.loads(line) for line in (folder / f"{skill}-{split}.jsonl").read_text().splitlines()]


def make_data(folder: Path, donor_folder: Path, tokenizer: Any) -> None:
    """Write everything that the study reads, unless it is there."""
    if (folder / "open-test.jsonl").exists():
        return
    donor = load(donor_folder)
    write(folder, "german", text_splits(german_pages(), tokenizer))
    write(folder, "code", text_splits(python_sources(), tokenizer))
    write(folder, "geography", geography(donor, tokenizer))
    write(folder, "other", {"test": answered([as_example(row) for row in other_questions()], donor, tokenizer)})
    write(folder, "open", open_answers(donor, tokenizer))  # last: its presence says that all is there
