"""Mixed batches: an adapter for each sample, during one forward or one `generate`."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

from act_peft.errors import ActTypeError, ActValueError
from act_peft.layers import ActLayer

BASE = "__base__"  # means: no adapter
INPUTS = ("input_ids", "inputs_embeds", "input_features", "pixel_values", "decoder_input_ids")


@contextmanager
def adapter_per_sample(
    model: nn.Module, adapter_names: Sequence[str], *, adapters: Collection[str], settings: Mapping[str, Any]
) -> Iterator[None]:
    """Inside the context every adapted module of `model` uses the adapter that is named for each sample.

    Args:
        model: the base model with adapters in it, in evaluation mode.
        adapter_names: an adapter, or `__base__`, for each sample.
        adapters: the names that exist.
        settings: keyword arguments of the forward or of `generate`. They say how often `generate` repeats a sample.

    Raises:
        ActTypeError: if `adapter_names` is not a list of names.
        ActValueError: in training mode; unknown names; inside the context, a different number of samples.
    """
    if isinstance(adapter_names, str) or not all(isinstance(name, str) for name in adapter_names):
        raise ActTypeError(
            f"adapter_names: got {adapter_names!r}, expected a list with an adapter's name, or {BASE!r}, per sample"
        )
    if model.training:
        raise ActValueError("Cannot pass `adapter_names` when the model is in training mode.")
    unknown = sorted(set(adapter_names) - {BASE} - set(adapters))
    if unknown:
        raise ActValueError(
            f"Trying to infer with non-existing adapter(s): {', '.join(unknown)} (expected some of "
            f"{sorted(adapters)} and {BASE!r})"
        )
    names = list(adapter_names)
    repeated = [name for name in names for _ in range(_repetitions(settings))]
    encoder = _encoder(model)
    encoding = set() if encoder is None else set(encoder.modules())  # `generate` encodes before it repeats
    with ExitStack() as hooks:
        outer = model.register_forward_pre_hook(_sample_counter(repeated), with_kwargs=True)
        hooks.callback(outer.remove)
        for module in model.modules():
            if isinstance(module, (ActLayer, AuxiliaryTrainingWrapper)):
                hook = _name_giver(names if module in encoding else repeated)
                hooks.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
        yield


def _repetitions(settings: Mapping[str, Any]) -> int:
    """How often `generate` repeats each sample: once for each beam or returned sequence."""
    sources = [settings, vars(settings["generation_config"]) if settings.get("generation_config") is not None else {}]
    counts = [next((s[n] for s in sources if s.get(n) is not None), 1) for n in ("num_beams", "num_return_sequences")]
    return max(counts)


def _encoder(model: nn.Module) -> nn.Module | None:
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return None
    getter: Any = getattr(model, "get_encoder", None)
    return None if getter is None else getter()


def _name_giver(names: list[str]) -> Any:
    def give_names(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {**kwargs, "adapter_names": names}

    return give_names


def _sample_counter(names: list[str]) -> Any:
    def count_samples(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        candidates = [*args[:1], *(kwargs.get(name) for name in INPUTS)]
        found = next((x for x in candidates if isinstance(x, torch.Tensor)), None)
        if found is not None and len(found) != len(names):
            raise ActValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(names)} and {len(found)} respectively. (generate: pass `num_beams` and `num_return_sequences` "
                "to it; those of the model's own generation_config are not seen)"
            )

    return count_samples
