from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from act_peft import fit
from act_peft.channels.kinds import channel_kind, norm_epsilon, normalize
from act_peft.channels.scores import ScoreKind
from act_peft.errors import ActTypeError, ActValueError, ActWarning
from act_peft.fitting import CollectedInputs
from tests.fitting.conftest import batches, relatives
from tests.fitting.oracle import least_squares, mean_square, with_ones

SETTINGS = {"keep_weight": 2.0, "ridge": 0.1, "prior_scale": 0.3}
ABILITY, KEEP = batches(seed=0), batches(seed=10)


def inputs_of(model: nn.Module, data) -> dict[str, torch.Tensor]:
    """The first argument of every module at every token that is not padding, sample by sample."""
    found: dict[str, list[torch.Tensor]] = {}
    handles = []

    def note(name):
        return lambda module, args, output: found.setdefault(name, []).append(args[0]) if args else None

    for name, module in model.named_modules():
        if channel_kind(module) is not None:
            handles.append(module.register_forward_hook(note(name)))
    kept: dict[str, list[torch.Tensor]] = {}
    for batch in data:
        with torch.no_grad():
            model(**{k: v for k, v in batch.items() if k != "labels"})
        for name, (given,) in found.items():
            for row, mask in enumerate(batch["attention_mask"]):
                sample = given[row if len(given) > 1 else 0]
                if sample.dim() == 3 and len(sample) != len(mask):  # heads first
                    sample = sample.transpose(0, 1)
                for position in mask.nonzero().flatten():
                    kept.setdefault(name, []).append(sample[position])
        found.clear()
    for handle in handles:
        handle.remove()
    return {name: torch.stack(rows) for name, rows in kept.items()}


def rows_of(module: nn.Module) -> torch.Tensor:
    """Weight as `[O, I]`, with the bias as last column."""
    weight = module.weight.detach().double()
    weight = weight.T if isinstance(module, Conv1D) else weight
    return weight if getattr(module, "bias", None) is None else torch.cat((weight, module.bias.detach()[:, None]), 1)


def expected_linear(name, base, donors, ability, keep) -> torch.Tensor:
    mine = base.get_submodule(name)
    widen = with_ones if getattr(mine, "bias", None) is not None else lambda rows: rows
    return least_squares(
        [rows_of(donor.get_submodule(name)) - rows_of(mine) for donor in donors],
        [widen(rows[name].double()) for rows in ability],
        None if keep is None else widen(keep[name].double()),
        **SETTINGS,
    )


@pytest.mark.parametrize("donors", [1, 2])
@pytest.mark.parametrize("has_keep", [True, False])
def test_every_linear_module_is_fitted_by_least_squares(family: str, donors: int, has_keep: bool) -> None:
    base, *others = relatives(family, donors=donors)
    data = [batches(seed=20 * j) for j in range(donors)]
    fitted = fit(
        base,
        others if donors > 1 else others[0],
        data if donors > 1 else data[0],
        KEEP if has_keep else None,
        **SETTINGS,
    )
    ability = [inputs_of(donor, part) for donor, part in zip(others, data, strict=True)]
    keep = inputs_of(base, KEEP) if has_keep else None
    compared = 0
    for name, module in fitted.modules.items():
        if module.is_linear:
            expected = expected_linear(name, base, others, ability, keep)
            found = module.delta if module.bias is None else torch.cat((module.delta, module.bias[:, None]), 1)
            torch.testing.assert_close(found, expected)
            compared += 1
    linear = [m for _, m in base.named_modules() if isinstance(m, (nn.Linear, Conv1D))]
    assert compared == len(linear) - (base.get_input_embeddings().weight is base.get_output_embeddings().weight)
    assert fitted.record.num_tokens == (36,) * donors + (36 if has_keep else 0,)


def test_norms_are_fitted_element_by_element(family: str) -> None:
    base, donor = relatives(family)
    fitted = fit(base, donor, ABILITY, KEEP, **SETTINGS)
    ability, keep = inputs_of(donor, ABILITY), inputs_of(base, KEEP)
    for name, module in fitted.modules.items():
        if not module.kind.is_norm:
            continue
        layer = base.get_submodule(name)
        n = [
            normalize(rows[name].reshape(-1, rows[name].shape[-1]), module.kind, norm_epsilon(layer)).double()
            for rows in (ability, keep)
        ]
        difference = (donor.get_submodule(name).weight - layer.weight).detach()
        if module.bias is None:
            a, k = n[0].square().mean(0), n[1].square().mean(0)
            m = k.mean()
            a = a * m / a.mean()
            ridge = SETTINGS["ridge"] * m
            expected = difference * (a + ridge * SETTINGS["prior_scale"]) / (a + SETTINGS["keep_weight"] * k + ridge)
            torch.testing.assert_close(module.delta[:, 0], expected, rtol=1e-5, atol=1e-7)
        else:
            assert module.delta.shape == (len(difference), 1)
            assert module.bias.shape == difference.shape


def test_an_embedding_moves_token_by_token() -> None:
    base, donor = relatives("llama")
    module = fit(base, donor, ABILITY, KEEP, **SETTINGS).modules["model.embed_tokens"]
    counts = [torch.zeros(48, dtype=torch.float64) for _ in range(2)]
    for count, data in zip(counts, (ABILITY, KEEP), strict=True):
        for batch in data:
            for token in batch["input_ids"][batch["attention_mask"] == 1]:
                count[token] += 1 / 36
    difference = (donor.model.embed_tokens.weight - base.model.embed_tokens.weight).detach()
    ridge = SETTINGS["ridge"] / 48
    share = (counts[0] + ridge * SETTINGS["prior_scale"]) / (counts[0] + SETTINGS["keep_weight"] * counts[1] + ridge)
    torch.testing.assert_close(module.delta, difference * share[:, None])


@pytest.mark.parametrize("family", ["gpt2", "gemma"])
def test_a_tied_embedding_serves_both_uses(family: str) -> None:
    base, donor = relatives(family)
    fitted = fit(base, donor, ABILITY, KEEP, **SETTINGS)
    name = "transformer.wte" if family == "gpt2" else "model.embed_tokens"
    module = fitted.modules[name]
    assert module.names == (name, "lm_head")
    assert "lm_head" not in fitted.modules
    ability, keep = inputs_of(donor, ABILITY), inputs_of(base, KEEP)
    m = mean_square(keep["lm_head"])
    scale = m / mean_square(ability["lm_head"])
    difference = (donor.lm_head.weight - base.lm_head.weight).detach()
    eye = torch.eye(16, dtype=torch.float64)
    moments = [rows["lm_head"].double().T @ rows["lm_head"].double() / 36 for rows in (ability, keep)]
    for token in range(48):
        a, k = (float((rows[name] == token).double().mean()) * 48 * m for rows in (ability, keep))
        ability_side = scale * moments[0] + a * eye
        keep_side = SETTINGS["keep_weight"] * (moments[1] + k * eye)
        ridge = SETTINGS["ridge"] * m * eye
        expected = torch.linalg.solve(
            ability_side + keep_side + ridge, (ability_side + SETTINGS["prior_scale"] * ridge) @ difference[token]
        )
        torch.testing.assert_close(module.delta[token], expected)


def test_the_fall_of_the_outputs_error_is_the_gain() -> None:
    """Without ridge the objective is what the module's outputs say: measured on the outputs themselves."""
    base, donor = relatives("llama")
    name = "model.layers.1.mlp.down_proj"
    fitted = fit(base, donor, ABILITY, KEEP, ridge=1e-9, keep_weight=1.5)
    a, k = (inputs_of(model, data)[name] for model, data in ((donor, ABILITY), (base, KEEP)))
    scale = mean_square(k) / mean_square(a)
    difference = rows_of(donor.get_submodule(name)) - rows_of(base.get_submodule(name))
    delta = fitted.modules[name].delta
    wanted, moved, disturbed = difference @ a.T, delta @ a.T, delta @ k.T
    fall = scale * (wanted.square() - (wanted - moved).square()).mean(1) - 1.5 * disturbed.square().mean(1)
    torch.testing.assert_close(fitted.gains[name], fall, rtol=1e-5, atol=1e-9)
    assert fitted.gains.kind is ScoreKind.GAIN


def test_moving_to_the_fit_gives_the_donors_answers_where_nothing_is_kept() -> None:
    base, donor = relatives("llama", dtype=torch.float64)
    fitted = fit(base, donor, ABILITY, None, ridge=1e-12)
    fitted.add_to_(base)
    for batch in ABILITY:
        with torch.no_grad():
            seen = batch["attention_mask"] == 1
            torch.testing.assert_close(base(**batch).logits[seen], donor(**batch).logits[seen], rtol=1e-4, atol=1e-5)


def test_an_endless_ridge_is_interpolation(family: str) -> None:
    base, donor = relatives(family)
    fitted = fit(base, donor, ABILITY, KEEP, ridge=1e10, prior_scale=0.4)
    expected = {
        name: (p + 0.4 * (q - p)).detach()
        for (name, p), (_, q) in zip(base.named_parameters(), donor.named_parameters(), strict=True)
    }
    fitted.add_to_(base)
    for name, parameter in base.named_parameters():
        torch.testing.assert_close(parameter.detach(), expected[name], rtol=1e-6, atol=1e-6)


def test_models_that_are_alike_do_not_change() -> None:
    base, _ = relatives("llama")
    with pytest.warns(ActWarning, match="all changes are 0: donor and base are equal"):
        fitted = fit(base, copy.deepcopy(base), ABILITY, KEEP)
    assert not any(module.delta.any() for module in fitted.modules.values())


def test_parts_that_fit_into_memory_give_the_same(family: str) -> None:
    base, donor = relatives(family)
    whole = fit(base, donor, ABILITY, KEEP, max_rank=2)
    parts = fit(base, donor, iter(ABILITY), iter(KEEP), max_memory=1, max_rank=2)
    assert list(parts.modules) == list(whole.modules)
    for name, module in whole.modules.items():
        assert torch.equal(parts.modules[name].delta, module.delta), name
        assert torch.equal(parts.modules[name].gains, module.gains), name


def test_settings_are_solved_from_inputs_collected_once() -> None:
    base, donor = relatives("llama")
    inputs = CollectedInputs(base, donor, iter(ABILITY), iter(KEEP))
    for settings in (SETTINGS, {"keep_weight": 0.5}, SETTINGS):
        found, expected = inputs.solve(**settings, max_rank=2), fit(base, donor, ABILITY, KEEP, **settings, max_rank=2)
        assert found.record == expected.record
        for name, module in expected.modules.items():
            assert torch.equal(found.modules[name].delta, module.delta), name
            assert found.modules[name].fingerprint == module.fingerprint


def test_answers_alone_can_count() -> None:
    base, donor = relatives("llama")
    data = batches(seed=0, labels=True)
    fitted = fit(base, donor, data, KEEP, positions="answer")
    assert fitted.record.num_tokens == (18, 36)
    assert fit(base, donor, data, KEEP).record.num_tokens == (36, 36)


def test_only_named_modules() -> None:
    base, donor = relatives("llama")
    fitted = fit(base, donor, ABILITY, KEEP, target_modules=["q_proj", "norm"], exclude_modules=r".*layers\.0.*")
    assert set(fitted.modules) == {"model.layers.1.self_attn.q_proj", "model.norm"}


def test_names_that_match_nothing() -> None:
    base, donor = relatives("llama")
    with pytest.warns(ActWarning, match=r"exclude_modules: \['w_proj'\] match no module"):
        fit(base, donor, ABILITY, KEEP, exclude_modules=["w_proj"])


def test_models_come_back_as_they_were() -> None:
    base, donor = relatives("llama")
    base.train()
    before = {name: p.clone() for name, p in base.named_parameters()}
    state = torch.get_rng_state()
    fit(base, donor, ABILITY, KEEP)
    assert base.training
    assert not donor.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in base.named_parameters())
    assert not any(module._forward_hooks for module in (*base.modules(), *donor.modules()))


def test_an_adapter_is_a_donor() -> None:
    base, _ = relatives("llama", dtype=torch.float32)
    torch.manual_seed(0)
    adapted = get_peft_model(
        copy.deepcopy(base), LoraConfig(target_modules=["q_proj", "up_proj"], init_lora_weights=False, r=2)
    ).eval()
    merged = copy.deepcopy(adapted).merge_and_unload()
    fitted = fit(adapted.get_base_model(), adapted, ABILITY, KEEP)
    expected = fit(base, merged, ABILITY, KEEP)
    assert list(fitted.modules) == list(expected.modules)
    for name, module in expected.modules.items():
        torch.testing.assert_close(fitted.modules[name].delta, module.delta, rtol=1e-3, atol=1e-6)
    assert any(isinstance(module, nn.Module) and hasattr(module, "lora_A") for module in adapted.modules())


def test_an_adapter_in_a_folder_is_a_donor(tmp_path) -> None:
    base, _ = relatives("llama", dtype=torch.float32)
    adapted = get_peft_model(copy.deepcopy(base), LoraConfig(target_modules=["q_proj"], init_lora_weights=False, r=2))
    adapted.save_pretrained(str(tmp_path))
    fitted = fit(base, str(tmp_path), ABILITY, KEEP)
    moved = [name for name, module in fitted.modules.items() if module.delta.any()]
    assert moved == [f"model.layers.{i}.self_attn.q_proj" for i in range(2)]


def test_a_donor_with_more_tokens() -> None:
    base, donor = relatives("gemma")
    donor.resize_token_embeddings(52, mean_resizing=False)
    module = fit(base, donor, ABILITY, KEEP).modules["model.embed_tokens"]
    assert module.delta.shape == (48, 16)
    fewer = fit(donor, base, ABILITY, KEEP).modules["model.embed_tokens"]
    assert fewer.delta.shape == (52, 16)
    assert not fewer.delta[48:].any()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"ridge": 0}, ActValueError, "ridge: got 0, expected a finite number above 0"),
        ({"max_rank": -1}, ActValueError, "max_rank: got -1, expected an integer of at least 0"),
        ({"max_rank": True}, ActTypeError, "max_rank: got True, expected an integer of at least 0"),
        ({"max_memory": 0}, ActValueError, "max_memory: got 0, expected an integer of at least 1"),
        ({"positions": "some"}, ActValueError, "positions: got 'some'"),
        ({"ability_dataloader": []}, ActValueError, "ability_dataloader: got no batch"),
        ({"keep_dataloader": iter(())}, ActValueError, "keep_dataloader: got no batch"),
        ({"ability_dataloader": 3}, ActTypeError, "ability_dataloader: got int, expected an iterable of batches"),
        ({"donor": []}, ActValueError, "donor: got an empty list, expected at least one donor"),
        ({"donor": 3}, ActTypeError, "donor: got int"),
    ],
)
def test_refused_arguments(changes, error, message: str) -> None:
    base, donor = relatives("llama")
    arguments = {"base": base, "donor": donor, "ability_dataloader": ABILITY, "keep_dataloader": KEEP, **changes}
    with pytest.raises(error, match=message):
        fit(**arguments)


def test_lists_of_donors_need_lists_of_data() -> None:
    base, donor = relatives("llama")
    with pytest.raises(ActTypeError, match="ability_dataloader: got generator with a list of donors"):
        fit(base, [donor], (batch for batch in ABILITY), KEEP)
    with pytest.raises(ActValueError, match="ability_dataloader: got 1 for 2 donors, expected as many"):
        fit(base, [donor, donor], [ABILITY], KEEP)


def test_weights_that_are_not_finite_inside() -> None:
    base, donor = relatives("llama")
    with torch.no_grad():
        donor.model.layers[0].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(ActValueError, match=r"model\.\S+: got inputs that are not finite"):
        fit(base, donor, ABILITY, KEEP)


def test_weights_that_are_not_finite() -> None:
    base, donor = relatives("llama")
    with torch.no_grad():
        donor.lm_head.weight[0, 0] = float("inf")
    with pytest.raises(ActValueError, match="lm_head: base or donor has weights that are not finite"):
        fit(base, donor, ABILITY, KEEP)
