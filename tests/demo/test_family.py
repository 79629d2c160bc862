import json

import pytest
import torch
from datasets import Dataset
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from act_peft.demo.family import BASE, DONOR, encode
from act_peft.demo.task import Split, accuracy, row, rows
from act_peft.demo.words import Language
from tests.support.family_training import BASE_GATE, DONOR_GATE, build_model, build_tokenizer, check_gate

SHIPPED = {"base": (BASE, BASE_GATE), "donor": (DONOR, DONOR_GATE)}
# Enough problems to tell 0.3 from 0.85, few enough for a quick test.
PROBLEMS = 200


class TestEncode:
    def test_labels_are_the_answer_and_eos(self):
        tokenizer = build_tokenizer()
        ids, labels = encode(tokenizer, [row(42, 17, Language.GERMAN), row(2, 3, Language.GERMAN)])
        assert ids.shape == labels.shape
        assert tokenizer.decode(labels[0][labels[0] != -100]) == "neun und fuenfzig <eos>"
        assert tokenizer.decode(labels[1][labels[1] != -100]) == "fuenf <eos>"
        assert torch.equal(ids[labels != -100], labels[labels != -100])

    # TRL reads a name of TrainingArguments that transformers is about to drop.
    @pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")
    def test_equals_what_trl_makes(self, tmp_path):
        tokenizer = build_tokenizer()
        examples = [example for language in Language for example in rows(language, Split.TRAIN, count=8)]
        arguments = SFTConfig(
            output_dir=str(tmp_path),
            report_to="none",
            use_cpu=True,
            per_device_train_batch_size=len(examples),
            dataloader_pin_memory=False,
            disable_tqdm=True,
        )
        trainer = SFTTrainer(
            build_model(tokenizer, seed=0),
            args=arguments,
            train_dataset=Dataset.from_list(examples),
            processing_class=tokenizer,
        )
        batch = next(iter(trainer.get_train_dataloader()))
        ids, labels = encode(tokenizer, examples)

        def lines(ids, labels):
            return sorted(zip(ids.tolist(), labels.tolist(), strict=True))

        assert lines(batch["input_ids"], batch["labels"]) == lines(ids, labels)


@pytest.mark.parametrize("name", SHIPPED)
class TestShipped:
    def test_tokenizer_is_the_built_one(self, name):
        assert AutoTokenizer.from_pretrained(SHIPPED[name][0]).get_vocab() == build_tokenizer().get_vocab()

    def test_meets_the_gate(self, name):
        folder, gate = SHIPPED[name]
        model = AutoModelForCausalLM.from_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        measured = {
            language: accuracy(model, tokenizer, rows(language, Split.VALIDATION, count=PROBLEMS))
            for language in Language
        }
        check_gate(name, gate, measured)

    def test_is_small_float32_and_portable(self, name):
        folder, _ = SHIPPED[name]
        assert (folder / "model.safetensors").stat().st_size < 1_000_000
        with safe_open(folder / "model.safetensors", framework="pt") as tensors:
            assert {tensors.get_tensor(key).dtype for key in tensors.keys()} == {torch.float32}  # noqa: SIM118
        assert sorted(p.name for p in folder.iterdir()) == [
            "config.json",
            "generation_config.json",
            "model.safetensors",
            "tokenizer.json",
            "tokenizer_config.json",
        ]
        for file in folder.glob("*.json"):
            settings = json.loads(file.read_text(encoding="utf-8"))
            assert "_name_or_path" not in settings
            assert "/" not in json.dumps(settings)
