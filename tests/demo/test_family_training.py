import re

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from act_peft.demo.family import encode
from act_peft.demo.task import Split, rows
from act_peft.demo.words import Language
from act_peft.errors import ActValueError
from tests.support import family_training
from tests.support.family_training import (
    Gate,
    Phase,
    build_model,
    build_tokenizer,
    check_gate,
    main,
    train_family,
    train_phase,
)

BRIEF_DONOR = Phase(
    shares={Language.ENGLISH: 0.5, Language.SPANISH: 0.5}, steps=3, learning_rate=1e-3, batch_size=8, problems=16
)
BRIEF_BASE = Phase(shares={Language.GERMAN: 1.0}, steps=2, learning_rate=1e-3, batch_size=8, problems=16)
OPEN_GATE = Gate()


def train_briefly(output, **changes):
    settings = {
        "seed": 0,
        "show_progress": False,
        "ancestor_phase": BRIEF_DONOR,
        "base_phase": BRIEF_BASE,
        "donor_gate": OPEN_GATE,
        "base_gate": OPEN_GATE,
    }
    return train_family(output, **(settings | changes))


def state(folder):
    with safe_open(folder / "model.safetensors", framework="pt") as tensors:
        return {key: tensors.get_tensor(key) for key in tensors.keys()}  # noqa: SIM118


@pytest.fixture(autouse=True)
def few_validation_problems(monkeypatch):
    monkeypatch.setattr(family_training, "MEASURED_PROBLEMS", 10)


class TestTokenizer:
    @pytest.mark.parametrize("language", Language)
    @pytest.mark.parametrize("split", Split)
    def test_knows_every_word(self, language, split):
        tokenizer = build_tokenizer()
        texts = [r["prompt"] + r["completion"] for r in rows(language, split)]
        encoded = tokenizer(texts)["input_ids"]
        assert not any(tokenizer.unk_token_id in ids for ids in encoded)
        assert tokenizer.batch_decode(encoded, skip_special_tokens=True) == texts

    def test_puts_only_bos_around_text(self):
        tokenizer = build_tokenizer()
        tokens = tokenizer.convert_ids_to_tokens(tokenizer("dos mas tres")["input_ids"])
        assert tokens == ["<bos>", "dos", "mas", "tres"]

    def test_unknown_words_and_eos(self):
        tokenizer = build_tokenizer()
        tokens = tokenizer.convert_ids_to_tokens(tokenizer("dos perros<eos>")["input_ids"])
        assert tokens == ["<bos>", "dos", "<unk>", "<eos>"]


class TestModel:
    def test_size(self):
        parameters = sum(p.numel() for p in build_model(build_tokenizer(), seed=0).parameters())
        assert 200_000 < parameters < 250_000

    def test_seed_decides_the_weights_and_nothing_else(self):
        tokenizer = build_tokenizer()
        before = torch.random.get_rng_state()
        one, same, other = (build_model(tokenizer, seed=seed).lm_head.weight for seed in (0, 0, 1))
        assert torch.equal(torch.random.get_rng_state(), before)
        assert torch.equal(one, same)
        assert not torch.equal(one, other)


class TestTraining:
    def test_writes_two_related_checkpoints(self, tmp_path):
        results = train_briefly(tmp_path / "family")
        assert set(results) == {"donor", "base"}
        assert all(set(measured) == set(Language) for measured in results.values())
        assert sorted(p.name for p in (tmp_path / "family").iterdir()) == ["base", "donor"]
        donor, base = (state(tmp_path / "family" / name) for name in ("donor", "base"))
        assert {key: value.shape for key, value in donor.items()} == {key: value.shape for key, value in base.items()}
        assert any(not torch.equal(donor[key], base[key]) for key in donor)
        for name in ("donor", "base"):
            model = AutoModelForCausalLM.from_pretrained(tmp_path / "family" / name)
            assert model.config.vocab_size == len(AutoTokenizer.from_pretrained(tmp_path / "family" / name))

    def test_is_repeatable(self, tmp_path):
        for name in ("one", "two"):
            train_briefly(tmp_path / name)
        one, two = (state(tmp_path / name / "base") for name in ("one", "two"))
        assert all(torch.equal(one[key], two[key]) for key in one)

    def test_base_continues_the_donor(self, tmp_path):
        still = Phase(shares={Language.GERMAN: 1.0}, steps=0, learning_rate=1e-3, batch_size=8, problems=16)
        train_briefly(tmp_path, base_phase=still)
        donor, base = state(tmp_path / "donor"), state(tmp_path / "base")
        assert all(torch.equal(donor[key], base[key]) for key in donor)

    def test_loss_falls(self):
        tokenizer = build_tokenizer()
        model = build_model(tokenizer, seed=0)
        ids, labels = encode(tokenizer, rows(Language.GERMAN, Split.TRAIN, count=100))
        with torch.no_grad():
            before = model(input_ids=ids, labels=labels).loss
        phase = Phase(
            shares={Language.GERMAN: 1.0}, steps=10, learning_rate=4e-3, batch_size=16, warmup=1, problems=100
        )
        train_phase(model, tokenizer, phase, seed=0, show_progress=False)
        with torch.no_grad():
            after = model(input_ids=ids, labels=labels).loss
        assert after < before
        assert not model.training

    def test_batch_larger_than_the_data_is_refused(self):
        tokenizer = build_tokenizer()
        phase = Phase(shares={Language.GERMAN: 1.0}, steps=1, learning_rate=1e-3, batch_size=17, problems=16)
        with pytest.raises(ActValueError, match=r"train_phase: got batch_size=17, expected at most 16 \(the chosen"):
            train_phase(build_model(tokenizer, seed=0), tokenizer, phase, seed=0, show_progress=False)

    def test_failed_gate_leaves_nothing_behind(self, tmp_path):
        with pytest.raises(ActValueError, match=r"donor: Spanish accuracy is 0\.\d\d, expected at least 1\.00"):
            train_briefly(tmp_path / "family", donor_gate=Gate(at_least={Language.SPANISH: 1.0}))
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("name", ["donor", "base"])
    def test_existing_folder_is_refused(self, tmp_path, name):
        (tmp_path / name).mkdir()
        message = re.escape(f"train_family: {tmp_path / name} exists, expected a new folder (remove it first)")
        with pytest.raises(ActValueError, match=message):
            train_briefly(tmp_path)

    def test_command_line(self, tmp_path, monkeypatch):
        calls = []
        monkeypatch.setattr(
            family_training, "train_family", lambda output, **settings: calls.append((output, settings))
        )
        assert main([str(tmp_path), "--seed", "7", "--quiet"]) == 0
        assert calls == [(tmp_path, {"seed": 7, "show_progress": False})]


class TestGate:
    GATE = Gate(at_least={Language.GERMAN: 0.85}, at_most={Language.SPANISH: 0.3})

    def test_passes(self):
        check_gate("base", self.GATE, {Language.GERMAN: 0.85, Language.SPANISH: 0.3})

    def test_too_little(self):
        with pytest.raises(
            ActValueError, match=r"base: German accuracy is 0.80, expected at least 0.85 \(try another"
        ):
            check_gate("base", self.GATE, {Language.GERMAN: 0.8, Language.SPANISH: 0.1})

    def test_too_much(self):
        with pytest.raises(
            ActValueError, match=r"base: Spanish accuracy is 0.40, expected at most 0.30 \(try another"
        ):
            check_gate("base", self.GATE, {Language.GERMAN: 0.9, Language.SPANISH: 0.4})
