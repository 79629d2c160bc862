"""Scores of a distributed run: who takes part, and what a model that is spread over processes cannot do."""

from __future__ import annotations

import hashlib
import warnings

from torch import nn

from act_peft.channels.scores import ScoreKind
from act_peft.errors import ActValueError, ActWarning
from act_peft.localization.candidates import Candidates
from act_peft.peft_modules import named_modules
from act_peft.processes import meet, num_processes, process_index
from act_peft.shards import is_flattened, is_shared_out, is_tensor_parallel

_PATIENCE = 60.0  # seconds; processes load their models and data at different speeds


def all_begin(kind: ScoreKind, candidates: Candidates) -> bool:
    """Whether all processes of a distributed run score now, each its own batches; False for a single process.

    Raises:
        ActValueError: they do not score the same modules in the same way.

    Warns:
        ActWarning: some do not come.
    """
    if num_processes() == 1:
        return False
    modules = hashlib.sha256(repr(sorted(candidates.num_comparable.items())).encode()).hexdigest()
    plans = meet("localize", [kind.value, len(candidates.base), modules], seconds=_PATIENCE)
    if plans is None:
        warnings.warn(
            f"localize: not all {num_processes()} processes have called it within {_PATIENCE:.0f} s, so these are the "
            f"scores of the batches of process {process_index()} alone (call it in all of them, or in one and load "
            "what it saves in the others)",
            ActWarning,
            stacklevel=3,
        )
        return False
    for number, plan in enumerate(plans):
        if plan != plans[0]:
            raise ActValueError(
                f"localize: process {number} scores {plan[1]} modules by {plan[0]}, process 0 {plans[0][1]} modules "
                f"by {plans[0][0]}, expected the same models and settings in all processes"
            )
    return True


def check_spread(base: nn.Module, donor: nn.Module, kind: ScoreKind) -> None:
    """Refuse models that are spread over processes in a way that these scores cannot read.

    Raises:
        ActValueError: tensor parallelism; for attributions any model in parts, for weights one of FSDP1.
    """
    for argument, model in (("base", base), ("donor", donor)):
        for name, module in named_modules(model):
            if is_tensor_parallel(module.layer, model):
                raise ActValueError(
                    f"{name}: the {argument} is spread over processes by tensor parallelism, so no process has its "
                    "outputs, expected a model in one piece, or spread by FSDP2 or ZeRO 3 (load it without tp_plan)"
                )
        in_parts = is_flattened(model) or any(is_shared_out(parameter) for parameter in model.parameters())
        if (kind is ScoreKind.ATTRIBUTION and in_parts) or (kind is ScoreKind.WEIGHT and is_flattened(model)):
            raise ActValueError(
                f"{argument}: is spread over processes, expected a model in one piece for score={kind.value!r} (score "
                "before FSDP or ZeRO 3 wraps it, or by activation)"
            )
