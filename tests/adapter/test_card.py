"""The model card of a saved adapter."""

from __future__ import annotations

from huggingface_hub import ModelCard
from peft import get_peft_model

from act_peft import ActConfig
from tests.support.tiny_models import build, build_relatives, random_mask


def save(tmp_path, **settings):
    base = build("llama")
    base.save_pretrained(tmp_path / "base")
    model = type(base).from_pretrained(tmp_path / "base")
    mask = random_mask(model, 0.25)
    tuned = get_peft_model(model, ActConfig(channels=mask, task_type="CAUSAL_LM", **settings))
    tuned.save_pretrained(tmp_path / "adapter")
    return tuned, mask


def test_the_card_says_what_the_adapter_is_and_how_to_load_it(tmp_path):
    _, donor = build_relatives("llama")
    donor.save_pretrained(tmp_path / "donor")
    _, mask = save(tmp_path, donor=str(tmp_path / "donor"), transfer_scale=0.7)
    card = ModelCard.load(tmp_path / "adapter" / "README.md")
    assert {"peft", "act"} <= set(card.data.tags)
    assert card.data.library_name == "peft"
    assert card.data.base_model == str(tmp_path / "base")
    for line in (
        f"| base | {tmp_path / 'base'} |",
        f"| donor | {tmp_path / 'donor'} |",
        f"| density | {mask.density:.4g} |",
        "| transfer scale λ | 0.7 |",
        "import act_peft",
        "PeftModel.from_pretrained(base,",
        f"changes {mask.num_selected} channels in {len(mask)} modules",
    ):
        assert line in card.text, line


def test_saving_again_keeps_what_the_user_wrote(tmp_path):
    tuned, _ = save(tmp_path)
    path = tmp_path / "adapter" / "README.md"
    path.write_text(path.read_text() + "\nMy own words.\n")
    tuned.peft_config["default"].transfer_scale = 0.9
    tuned.save_pretrained(tmp_path / "adapter")
    text = path.read_text()
    assert "My own words." in text
    assert text.count("## ACT adapter") == 1
    assert "| transfer scale λ | 0.9 |" in text
    assert sorted(p.name for p in path.parent.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


def test_every_adapter_of_a_model_gets_its_card(tmp_path):
    tuned, mask = save(tmp_path)
    tuned.add_adapter("second", ActConfig(channels=mask, task_type="CAUSAL_LM"))
    tuned.save_pretrained(tmp_path / "both")
    assert "## ACT adapter" in (tmp_path / "both" / "second" / "README.md").read_text()
