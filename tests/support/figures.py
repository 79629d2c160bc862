"""One example of each figure, from made-up data that looks like real one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from act_peft import plots
from act_peft.analysis import (
    measure_composition,
    measure_disentanglement,
    measure_sample_curve,
    predict_overlap,
)
from act_peft.analysis.patched import PatchedRow, Patching
from act_peft.channels.masks import ChannelMask
from act_peft.channels.scores import ChannelScores
from act_peft.channels.selection import Normalization, Scope
from act_peft.channels.spread import Spread
from act_peft.sweeps.heldout import SampleSums, SkillResult
from act_peft.sweeps.methods import Method
from act_peft.sweeps.result import SweepResult
from act_peft.sweeps.rows import Measurement, SweepRow

SIZES = {
    "self_attn.q_proj": 64,
    "self_attn.k_proj": 32,
    "self_attn.v_proj": 32,
    "self_attn.o_proj": 64,
    "mlp.gate_proj": 128,
    "mlp.up_proj": 128,
    "mlp.down_proj": 64,
    "input_layernorm": 64,
}
ACCURACIES = {
    "base": {"Spanish": 0.06, "German": 0.98},
    "donor": {"Spanish": 0.99, "German": 0.2},
    "fitted": {"Spanish": 0.92, "German": 0.89},
    "fitted, then fine-tuned": {"Spanish": 0.95, "German": 0.96},
    "control: no fit": {"Spanish": 0.4, "German": 0.95},
}


def make_scores(samples: int = 12, seed: int = 0, *, layers: int = 6, head: bool = True) -> ChannelScores:
    """Heavy-tailed scores of samples of one token, around the same means for every seed."""
    means, noise = torch.Generator().manual_seed(0), torch.Generator().manual_seed(seed)
    sizes = {f"model.layers.{i}.{kind}": size for i in range(layers) for kind, size in SIZES.items()}
    if head:
        sizes["lm_head"] = 500
    drawn = {}
    for number, (name, size) in enumerate(sizes.items()):
        mean = (torch.randn(size, generator=means, dtype=torch.float64) * 0.8 + 0.3 * (number % len(SIZES))).exp()
        drawn[name] = mean * torch.rand(samples, size, generator=noise, dtype=torch.float64)  # [samples, C]
    sums = {name: values.sum(0) for name, values in drawn.items()}
    squares = {name: values.square().sum(0) for name, values in drawn.items()}
    return ChannelScores(sums, samples, spread=Spread(squares, sums, samples, samples))


def make_sweep(skills: tuple[str, ...] = ("German",), *, gain: float = 0.2, donor: float | None = 0.4) -> SweepResult:
    """A sweep over densities and scales; `donor` is the donor's accuracy on what is kept."""

    def results(ability: float, keep: float) -> Any:
        return SkillResult(1.0, ability), {name: SkillResult(1.0, keep) for name in skills}

    rows = [
        SweepRow(*results(0.5 + gain * density + 0.1 * scale, 0.95 - 0.1 * scale), density, scale, 10)
        for density in (0.1, 0.2)
        for scale in (0.3, 0.6, 1.0)
    ]
    masks = {density: ChannelMask({"m": [0]}, {"m": 10}) for density in (0.1, 0.2)}
    base = SweepRow(*results(0.5, 0.95), 0.0, 0.0, 0)
    own = None if donor is None else Measurement(*results(1.0, donor))
    return SweepResult(tuple(rows), base, own, 0.07, Scope.GLOBAL, Normalization.NONE, masks)


def make_loss_sweep() -> SweepResult:
    """A sweep of several methods with a limit on the loss."""

    def row(method: Method, ability: float, rise: float, scale: float) -> SweepRow:
        losses = torch.tensor([ability, ability + 0.01], dtype=torch.float64)
        tokens = torch.tensor([1.0, 1.0], dtype=torch.float64)
        result = SkillResult(float(losses.mean()), 0.5, SampleSums(losses, tokens, tokens))
        kept = {"German": SkillResult(1.0 + rise, 0.9)}
        return SweepRow(result, kept, 1.0, scale, 10, method, {} if method is Method.BASE else {"scale": scale})

    rows = (
        row(Method.INTERPOLATION, 0.8, 0.01, 0.2),
        row(Method.INTERPOLATION, 0.6, 0.06, 0.35),
        row(Method.INTERPOLATION, 0.3, 0.9, 0.6),
        row(Method.TIES, 0.75, 0.03, 0.5),
        row(Method.FITTED, 0.5, 0.02, 1.0),
        row(Method.FITTED_ROWS, 0.55, 0.015, 1.0),
        row(Method.FITTED_RANK, 0.58, 0.025, 1.0),
    )
    base, donor = row(Method.BASE, 1.0, 0.0, 0.0), row(Method.BASE, 0.25, 1.4, 0.0)
    return SweepResult(rows, base, donor, None, Scope.GLOBAL, Normalization.NONE, {}, max_keep_loss=0.03)


def make_masks() -> dict[str, ChannelMask]:
    """Masks of four languages: one pool of channels, some of which each language has."""
    counts = {f"layers.{i}.up": 200 for i in range(4)}
    masks = {}
    for seed, name in enumerate(("German", "Spanish", "French", "Japanese")):
        generator = torch.Generator().manual_seed(seed)
        pool = 40 if name != "Japanese" else 200
        chosen = {m: torch.randperm(pool, generator=generator)[:20] for m in counts}
        masks[name] = ChannelMask(chosen, counts)
    return masks


def make_scales() -> dict[str, torch.Tensor]:
    """Learned scales, of which about a third are exactly zero."""
    drawn = torch.randn(3, 200, generator=torch.Generator().manual_seed(0)) * 0.3 + 0.2
    return {f"layers.{i}.up": values.clamp(0, 1) for i, values in enumerate(drawn)}


def make_patching() -> Patching:
    """Shares of a gap that grow with the density, selected channels ahead of random ones."""
    rows = []
    for density in (0.01, 0.05, 0.1, 0.2, 0.5):
        for kind, power in (("selected", 0.5), ("random", 1.2), ("random", 1.3)):
            share = density**power
            rows.append(PatchedRow(f"{density:g}", kind, density, 100, 1.0, 0.5, share, 0.03, 0.8 * share, 0.04))
    return Patching(tuple(rows), 1.13, 0.54, 124, 160, "answer", 0)


def finding(figure: Any) -> str:
    """The title of a figure in one line."""
    return " ".join(figure._suptitle.get_text().split())


FIGURES: dict[str, Callable[[], Any]] = {
    "distribution": lambda: plots.draw_distribution(make_scores(), note="seed 0"),
    "distribution of modules": lambda: plots.draw_distribution(make_scores(head=False), scope="module", density=0.1),
    "distribution of layers": lambda: plots.draw_distribution(make_scores(layers=40), group_by="layer"),
    "concentration": lambda: plots.draw_concentration(make_scores(), density=0.1, note="seed 0"),
    "composition": lambda: plots.draw_composition(measure_composition(make_scores().top(0.1)), note="seed 0"),
    "composition of many layers": lambda: plots.draw_composition(
        measure_composition(make_scores(layers=40, head=False).top(0.1, scope="module"))
    ),
    "overlaps": lambda: plots.draw_overlaps(measure_disentanglement(make_masks()), note="density 10%, seed 0"),
    "samples": lambda: plots.draw_sample_curve(
        {
            "halves": measure_sample_curve([make_scores(2, seed) for seed in range(16)]),
            "one run": predict_overlap(make_scores(8)),
        },
        note="seed 0",
    ),
    "sufficiency": lambda: plots.draw_sufficiency(make_patching()),
    "scales": lambda: plots.draw_scales(make_scales(), note="seed 0"),
    "accuracies": lambda: plots.draw_accuracies(
        ACCURACIES,
        title="Spanish comes back (6% to 95%), German stays (98% to 96%)",
        highlight="fitted, then fine-tuned",
        note="500 problems in each language, seed 0",
    ),
    "demo": lambda: plots.draw_demo(
        make_scores(),
        ACCURACIES,
        density=0.5,
        scope="module",
        title="Spanish comes back (6% to 95%), German stays (98% to 96%)",
        highlight="fitted, then fine-tuned",
        note="500 problems in each language, seed 0",
    ),
    "sweep": lambda: plots.draw_sweep(make_sweep(), note="seed 0"),
    "sweep of losses": lambda: plots.draw_sweep(make_loss_sweep(), note="seed 0"),
}
