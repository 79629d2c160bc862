"""The cards of LoRA adapters that are made of something else."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from huggingface_hub import ModelCardData

from act_peft.adapter.changes import AdapterChanges
from act_peft.export.plan import Plan
from act_peft.export.targets import Target
from act_peft.plain import in_markdown, model_name


def card_text(base: str | None, lines: Iterable[str]) -> str:
    """The text of a README: the Hub's facts about the adapter, and these lines."""
    data = ModelCardData(base_model=model_name(base), library_name="peft", tags=["lora", "peft", "act"])
    return f"---\n{data.to_yaml()}\n---\n\n" + "\n".join(lines) + "\n"


def export_lines(source: AdapterChanges, plan: Plan, target: Target) -> list[str]:
    """What the card of an exported ACT adapter says."""
    ranks: Mapping[str, int] = plan.ranks
    errors = plan.measured.errors
    lines = [
        "## LoRA adapter made from an ACT adapter\n",
        f"Made from {source.origin} ([ACT](https://arxiv.org/abs/2601.09398)) with `act_peft.export_lora`.",
        "PEFT loads it as any LoRA adapter; act_peft is not needed.\n",
        f"- base: {in_markdown(source.config.base_model_name_or_path or 'unknown')}",
        f"- donor of the ACT adapter: {in_markdown(source.config.donor or 'none, or one in memory')}",
        f"- modules with LoRA factors: {len(ranks)}, rank {min(ranks.values())} to {plan.config.r}",
    ]
    if target.engine is not None:
        lines.append(f"- made for {target.engine.name}: one rank for all modules, alpha = rank")
    inexact = {name: error for name, error in errors.items() if error}
    if inexact:
        worst = max(inexact, key=lambda name: inexact[name])
        lines.append(
            f"- approximated modules: {len(inexact)}; the greatest relative error is {inexact[worst]:.3g}, in "
            f"{in_markdown(worst)}; all together {plan.measured.error:.3g}"
        )
    else:
        lines.append("- the factors are exact")
    if plan.whole:
        lines.append(f"- saved as a whole, base weights included: {in_markdown(', '.join(plan.whole))}")
    lines.append("\n| module | rank | relative error |\n|---|---|---|")
    return lines + [f"| {in_markdown(name)} | {rank} | {errors[name]:.3g} |" for name, rank in ranks.items()]
