"""Recipes from files: what is wrong is said by name, and nothing that a file names is opened."""

from __future__ import annotations

import time

import pytest

from act_peft import ActValueError
from act_peft.demo.recipes import copy_recipe, ready_recipes
from act_peft.recipes.reading import card_section, read_recipe

SMALL = "base: b\ndonor: d\nabilities: {s: {train: a.jsonl}}\n"
LORA = "base: b\nabilities: {s: {train: a}}\nmethod: lora\ntrain: {}\n"


def write(tmp_path, text, name="recipe.yaml"):
    path = tmp_path / name
    path.write_text(text)
    return path


def test_defaults_and_places(tmp_path):
    (tmp_path / "a.jsonl").write_text("")
    recipe = read_recipe(write(tmp_path, SMALL + "train: {learning_rate: 5e-4}\noutput: {folder: out}"))
    assert (recipe.method, recipe.select.density, recipe.train.learning_rate) == ("fit", 0.5, 5e-4)
    assert recipe.abilities["s"].train == str(tmp_path / "a.jsonl")  # it lies beside the recipe
    assert recipe.base == "b"  # nothing there: a Hub id
    assert recipe.output.folder == str(tmp_path / "out")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "got NoneType, expected settings such as"),
        ("- 1", "got list, expected settings such as"),
        ("base: b\nbase: c", r"cannot be read as YAML \(line 1: base is there more than once"),
        ("a: &x 1\nb: *x", "an alias"),
        ("[" * 100_000, "cannot be read as YAML"),
        ("!!python/object/apply:os.system [true]", "cannot be read as YAML"),
        ("a: 2026-99-99", "cannot be read as YAML"),
        ("base: {}", "base: got {}, input should be a valid string; abilities is missing"),
        (SMALL + "selct: 1", r"selct: unknown setting \(did you mean select\?\)"),
        (SMALL + "select: {densty: 1}", r"select.densty: unknown setting \(did you mean density\?\)"),
        (
            SMALL + "select: {qqqq: 1}",
            r"select.qqqq: unknown setting \(known are density, scope, max_channels",
        ),
        ("base: b\ndonor: d\nabilities: {s: {trian: x}}", r"abilities.s.trian: unknown setting \(did you mean train"),
        (
            "base: b\ndonor: d\nkeep: {s: {donor: x}}\nabilities: {}",
            r"keep.s.donor: unknown setting \(known are",
        ),
        (SMALL + "select: {density: 3}", "select.density: got 3, input should be less than or equal to 1"),
        (SMALL + "select: {density: .nan}", "select.density: got nan"),
        (SMALL + "seed: yes", "seed: got True, a number is expected, not a yes or no"),
        (SMALL + "train: {steps: 0}", "train.steps: got 0, input should be greater than or equal to 1"),
        (SMALL + "train: {learning_rate: fast}", "train.learning_rate: got 'fast', input should be a valid number"),
        (SMALL + "train: {batch_size: 6}", "train: batch_size is 6, expected a multiple of micro_batch_size"),
        (SMALL + 'dtype: "a\\nb"', "dtype: got"),
        (SMALL + 'device: "a\\nb"', "device: got 'a.nb', a text without line breaks is expected"),
        ("base: b\nabilities: {s: {train: x}}", "donor is missing, expected the model that has the abilities"),
        ("base: b\ndonor: d\nabilities: {s: {test: x}}", "abilities.s.train is missing"),
        (SMALL + "keep: {s: {train: x}}", "got the names s, s, expected each once"),
        (SMALL + "keep: {k: {test: x}}", "keep.k.train is missing"),
        (SMALL + "untouched: {u: {train: x}}", "untouched.u: expected test alone"),
        (
            "base: b\ndonor: d\nabilities: {s: {train: x}, t: {train: x}}\nmethod: localize",
            "got 2 for method",
        ),
        (SMALL + "method: localize\nlocalize: {score: contrast}", "keep is missing, expected a skill to keep"),
        (SMALL + "method: localize\nselect: {tokens: 0.1}", "select.tokens: got a share for method localize"),
        (SMALL + "lora: {rank: 3}", "lora: got settings for another method, expected those of fit"),
        (
            "base: b\nabilities: {s: {train: x}}\nmethod: lora",
            "train is missing, expected the settings of",
        ),
        (LORA + "output: {lora_rank: 8}", "output.lora_rank: the adapter is a LoRA already"),
        (SMALL + "output: {lora_target: vllm}", "output.lora_rank is missing, expected the rank"),
        (SMALL + "output: {lora_rank: 8, lora_target: vlm}", "output.lora_target: got 'vlm', input should be 'peft'"),
        (SMALL + "output: {lora_rank: 600, lora_target: vllm}", "got 600, expected at most 512 for vLLM"),
        (LORA + "select: {density: 1}", "select: got settings for channels, expected none for method lora"),
        (LORA.replace("{}", "{donor_weight: 1}"), "donor is missing"),
        (
            "base: b\nabilities: {s: {train: x, donor: d}, t: {train: x, donor: e}}\ntrain: {donor_weight: 1}",
            "train: got several donors, expected one that teaches",
        ),
    ],
)
def test_mistakes_are_named(tmp_path, text, message):
    started = time.perf_counter()
    with pytest.raises(ActValueError, match=message):
        read_recipe(write(tmp_path, text))
    assert time.perf_counter() - started < 30


def test_files_that_are_no_recipes(tmp_path):
    with pytest.raises(ActValueError, match="there is no such file, expected a recipe"):
        read_recipe(tmp_path / "none.yaml")
    (tmp_path / "recipe.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ActValueError, match="is no UTF-8 text"):
        read_recipe(tmp_path / "recipe.yaml")
    with pytest.raises(ActValueError, match="is larger than"):
        read_recipe(write(tmp_path, "#" * (1 << 20) + "\n"))
    write(tmp_path, "# a card", "README.md")
    with pytest.raises(ActValueError, match="holds no recipe, expected the card of an adapter"):
        read_recipe(tmp_path)


@pytest.mark.parametrize("text", [SMALL + "train: {}\nselect: {density: 0.25}\n", LORA])
def test_a_card_holds_its_recipe(tmp_path, text):
    recipe = read_recipe(write(tmp_path, text + "output: {folder: out}"))
    write(tmp_path, f"# card\n\n{card_section(recipe)}\nmore\n", "README.md")
    again = read_recipe(tmp_path)
    assert again.output.folder is None  # who runs it again says where to
    assert again.model_copy(update={"output": recipe.output}) == recipe


def test_ready_recipes_are_right(tmp_path):
    names = ready_recipes()
    assert set(names) == {"keep", "recover", "specialists"}
    for name, summary in names.items():
        assert summary.lower().startswith(name)
        recipe = read_recipe(copy_recipe(name, tmp_path / name))
        assert recipe.base.startswith(str(tmp_path))
    with pytest.raises(ActValueError, match="recipe: got 'none', expected one of keep, recover, specialists"):
        copy_recipe("none", tmp_path / "none")
    with pytest.raises(ActValueError, match=r"exists, expected a new folder"):
        copy_recipe("keep", tmp_path / "keep")
    copy_recipe("keep", tmp_path / "keep", overwrite=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text("{}")
    with pytest.raises(ActValueError, match="is no folder of a recipe, expected one to overwrite"):
        copy_recipe("keep", tmp_path / "other", overwrite=True)
