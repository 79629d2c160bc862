"""Which channels and tokens of a fitted transfer are meant by what users write."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Mapping

import torch

from act_peft.channels.masks import ChannelMask, checked_indices
from act_peft.channels.names import matching_key
from act_peft.channels.origin import check_models
from act_peft.checks import finite_number
from act_peft.errors import ActTypeError, ActValueError, ActWarning
from act_peft.fitting.module import FitRecord, FittedModule, Modules

MaskLike = ChannelMask | Mapping[str, Iterable[int]] | str | os.PathLike[str]
TokensLike = float | Iterable[int] | torch.Tensor | None


def selected_channels(mask: MaskLike, modules: Modules, record: FitRecord) -> dict[str, torch.Tensor]:
    """Module name -> channels, int64 `[K]` with K at least 1, ascending.

    Args:
        mask: a mask, the path of a saved one, or names (or dotted suffixes of names) -> channels.
        modules: the fitted modules.
        record: what they were made from.

    Raises:
        ActTypeError: another type.
        ActValueError: a name that no fitted module has; channels out of range; a tied embedding; nothing selected; a
            mask that was made with base and donor exchanged.

    Warns:
        ActWarning: a mask that was made with other models.
    """
    if isinstance(mask, (str, os.PathLike)):
        mask = ChannelMask.load(mask)
    if isinstance(mask, ChannelMask) and record.origin is not None:
        for note in check_models(mask.origin, base=record.origin.base, donor=record.origin.donor):
            warnings.warn(note, ActWarning, stacklevel=3)
    if not isinstance(mask, Mapping):
        raise ActTypeError(f"mask: got {type(mask).__name__}, expected a ChannelMask, a dict or the path of a mask")
    counts = {name: len(module.delta) for name, module in modules.items()}
    found, used = {}, set()
    for name, module in modules.items():
        key = matching_key(name, mask)
        if key is None:
            continue
        used.add(key)
        if module.is_embedding:
            if len(torch.as_tensor(mask[key])):
                raise ActValueError(
                    f"{name}: moves by rows of tokens, not by channels, expected none of them in the mask (choose its "
                    "tokens with tokens=...)"
                )
            continue
        if isinstance(mask, ChannelMask) and mask.num_channels[key] != counts[name]:
            raise ActValueError(
                f"{name}: the mask has {mask.num_channels[key]} channels, the fitted module {counts[name]} (was the "
                "mask made for another model?)"
            )
        index = checked_indices(name, mask[key], counts[name])
        if not index.numel():
            continue
        found[name] = index
    unknown = [key for key in mask if key not in used and len(torch.as_tensor(mask[key])) > 0]
    if unknown:
        raise ActValueError(
            f"{unknown[0]}: is no fitted module, expected one of {len(modules)}, such as {next(iter(modules))} "
            f"({len(unknown)} of {len(mask)} names of the mask are not; fit them too, or leave them out of the mask)"
        )
    return found


def selected_tokens(tokens: TokensLike, modules: Modules) -> dict[str, torch.Tensor]:
    """Name of an embedding -> tokens, int64 `[K]` with K at least 1, ascending.

    Args:
        tokens: a share (float, from 0 to 1) of the tokens, those with the greatest gains; the tokens themselves; None
            for none.
        modules: the fitted modules.

    Raises:
        ActTypeError: another type.
        ActValueError: a share out of range; no fitted embedding; tokens out of range.
    """
    embeddings = {name: module for name, module in modules.items() if module.is_embedding}
    if tokens is None:
        return {}
    if isinstance(tokens, bool) or (isinstance(tokens, int) and tokens not in (0, 1)) or isinstance(tokens, str):
        raise ActTypeError(f"tokens: got {tokens!r:.80}, expected a share from 0 to 1, a list of tokens, or None")
    if isinstance(tokens, (int, float)):
        share = finite_number(tokens, "tokens", least=0, most=1)
        shares = {name: top_tokens(module, share) for name, module in embeddings.items()}
        return {name: index for name, index in shares.items() if index.numel()}
    main = next(iter(embeddings.items()), None)
    if main is None:
        raise ActValueError("tokens: got some, but no embedding was fitted, expected None (or fit with the embedding)")
    name, module = main
    index = checked_indices(name, tokens, len(module.delta))
    return {name: index} if index.numel() else {}


def top_tokens(module: FittedModule, share: float) -> torch.Tensor:
    """The tokens with the greatest gains, int64 `[K]`, ascending; those that gain nothing are left out."""
    count = min(round(share * len(module.gains)), int((module.gains > 0).sum()))
    return module.gains.sort(descending=True, stable=True).indices[:count].sort().values
