"""The study's page says what its results say, and the figures are what they are called."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

FOLDER = Path(__file__).parents[2] / "examples" / "evidence"


def script(name):
    """A file of the example, under a name that no other module has."""
    spec = importlib.util.spec_from_file_location(f"evidence_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # data classes look for their module there
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def tables():
    return script("tables")


@pytest.fixture(scope="module")
def measure():
    return script("measure")


def test_the_page_holds_the_tables_of_the_results(tables):
    page = tables.PAGE.read_text()
    assert "<!-- table: german main -->" in page
    assert tables.filled(page, tables.all_tables()) == page


def test_every_result_is_complete(tables):
    found = sorted(tables.RESULTS.glob("*/*.json"))
    assert found
    for path in found:
        result = json.loads(path.read_text())
        assert result["setting"] in [entry["setting"] for entry in result["tried"]]
        for scored in result["test"].values():
            assert len(scored["losses"]) == len(scored["tokens"])
            assert len(scored["hits"]) == sum(scored["tokens"])
            assert scored["nll"] == pytest.approx(sum(scored["losses"]) / sum(scored["tokens"]), abs=1e-3)


def result(hits, losses, tokens=(2, 1)):
    scored = {"hits": hits, "losses": list(losses), "tokens": list(tokens), "nll": sum(losses) / sum(tokens)}
    return {"test": {"geography": scored, "german": scored}}


def test_flips_of_answers_count_whole_answers_and_those_of_texts_tokens(tables):
    before, after = result("111", (1, 1)), result("100", (1, 1))
    assert tables.flips(before, [after], "geography") == (2, 0)
    assert tables.flips(after, [before], "geography") == (0, 2)
    assert tables.flips(before, [after, before], "german") == (1, 0)


def test_a_difference_is_paired_by_items_and_its_interval_holds_it(tables):
    first, second = result("111", (1.0, 2.0)), result("111", (1.5, 1.0))
    value, low, high = tables.difference([first], [second], "german")
    assert value == pytest.approx((-0.5 + 1.0) / 3)
    assert low <= value <= high
    assert tables.difference([first], [first], "german") == (0, 0, 0)
    assert tables.accuracy_difference([first], [result("101", (1, 1))], "geography")[0] == 0.5


def test_recovered_is_the_closed_share_of_the_gap(tables):
    base, donor, model = (result("111", (loss, 0.0)) for loss in (4.0, 2.0, 2.5))
    assert tables.recovered(base, donor, [model], "german") == pytest.approx(0.75)


def test_score_agrees_with_a_loop_over_tokens(measure):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=19,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).eval()
    rows = [measure.Row((3, 5, 7, 2, 9), 3), measure.Row((4, 4, 1), 1), measure.Row((8, 2), 1)]
    found = measure.score(model, rows, 0, measure.log_probabilities(model, rows, 0))
    for index, row in enumerate(rows):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            logits = model(torch.tensor([row.ids])).logits[0].float().log_softmax(-1)
        expected = [-logits[place - 1, row.ids[place]] for place in range(row.start, len(row.ids))]
        assert found.losses[index] == pytest.approx(float(sum(expected)), abs=0.02)  # bfloat16
        assert found.tokens[index] == len(expected)
    assert found.divergence == pytest.approx(0.0, abs=1e-4)
    assert found.nll == pytest.approx(sum(found.losses) / 5)


def test_only_answers_are_labelled(measure):
    batch = measure.padded([measure.Row((3, 5, 7), 2), measure.Row((4, 1), 1)], 0)
    assert batch["labels"].tolist() == [[-100, -100, 7], [-100, 1, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]


@pytest.mark.slow
def test_every_method_tries_as_many_settings():
    code = (
        "import json, methods, run;"
        "print(json.dumps({name: [len(m.settings), m.like] for name, m in methods.METHODS.items()}))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=FOLDER, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    assert {count for name, (count, _) in found.items() if name not in ("base", "donor")} == {4}
    assert {like for _, like in found.values()} == {None, "fitted"}
