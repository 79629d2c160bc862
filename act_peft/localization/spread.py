"""What a model that is spread over processes cannot do."""

from __future__ import annotations

from torch import nn

from act_peft.channels.scores import ScoreKind
from act_peft.errors import ActValueError
from act_peft.peft_modules import named_modules
from act_peft.shards import is_flattened, is_shared_out, is_tensor_parallel


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
