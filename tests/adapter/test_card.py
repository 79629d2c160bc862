"""The model card of a saved adapter."""

from __future__ import annotations

from huggingface_hub import ModelCard, ModelCardData
from peft import get_peft_model

from act_peft import ActConfig
from act_peft.adapter.card import without_blanks
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


def test_the_card_leads_with_three_ways_and_holds_no_blanks(tmp_path):
    save(tmp_path)
    text = (tmp_path / "adapter" / "README.md").read_text()
    assert "[More Information Needed]" not in text
    body = text.split("---\n", 2)[2]
    ways = [body.index(way) for way in ("import act_peft", "act-peft export-lora", "act-peft merge")]
    assert ways == sorted(ways)
    headings = [line for line in body.splitlines() if line.startswith("#")]
    assert headings == ["## ACT adapter", "### Framework versions"]


def test_a_section_that_somebody_filled_in_stays():
    blank = ModelCard.from_template(ModelCardData()).text
    assert "[More Information Needed]" in blank
    assert without_blanks(blank).strip() == ""
    filled = blank.replace("## Uses\n", "## Uses\n\nFor sums.\n\n```sh\n# a comment\nrun\n```\n", 1)
    kept = [line for line in without_blanks(filled).splitlines() if line]
    assert kept[-6:] == ["## Uses", "For sums.", "```sh", "# a comment", "run", "```"]
    assert all(line.startswith("# ") for line in kept[:-6])  # the title above it
    mine = "# Mine\n\nWords.\n"
    assert without_blanks(mine) == mine
