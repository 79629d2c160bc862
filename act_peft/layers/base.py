"""The life cycle of every ACT layer: selected channels, their deltas, merging with kept originals, loading."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import nn

from act_peft.arithmetic import merged_rows
from act_peft.channels import ChannelKind
from act_peft.errors import ActValueError
from act_peft.layers.state import check_adapter_state

PREFIX = "act_delta_"  # `act_` alone is part of the names of modules in half of all transformers models


@dataclass(frozen=True)
class ChannelRows:
    """The parameters of some channels of one module.

    `weight` has the module's own orientation: `[K, I]` for a linear layer, `[I, K]` for Conv1D, `[V, K]` for an
    embedding, `[K]` for a norm. `bias` is `[K]`, or None where the module has none.
    """

    index: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None


def unknown_index(num_selected: int) -> torch.Tensor:
    """Placeholder for the channels of an adapter that is still to be loaded: int64 `[K]`, no valid channel."""
    return torch.full((num_selected,), -1)


class ActLayer(nn.Module, BaseTunerLayer):
    """A module whose selected channels carry deltas.

    The wrapped module runs as it is; for each active adapter the change of the selected outputs is added to them:

        y = base(x);    y[..., index] += scale * change(x, delta)

    A subclass names its `kind` (which says where the channel axis is) and computes `change`; everything else is here.

    Attributes:
        act_delta_weight: per adapter the trainable delta of the weight, oriented as in `ChannelRows`.
        act_delta_bias: per adapter `[K]`, only for modules with a bias.
        act_delta_index: per adapter the selected channels, int64 `[K]`, ascending.
        act_delta_scale: per adapter a factor on its contribution, 1.0 unless `set_scale` was called; not saved.
    """

    adapter_layer_names = ("act_delta_weight", "act_delta_bias")
    other_param_names = ("act_delta_index", "act_delta_scale")

    kind: ChannelKind

    # What PEFT's classes bring along, for type checkers.
    get_base_layer: Callable[[], Any]
    set_adapter: Callable[..., None]
    _cast_input_dtype: Callable[..., torch.Tensor]
    _get_embed_scale: Callable[[], torch.Tensor | None]
    active_adapters: list[str]
    merged_adapters: list[str]

    def __init__(self, base_layer: nn.Module, *, shares_weight: bool = False) -> None:
        """Wrap `base_layer`.

        Args:
            base_layer: the module to adapt; it is kept as it is.
            shares_weight: whether another module uses the same weight (tied embeddings). Merging then gives this
                module a weight of its own, because a delta belongs to this use of the weight alone.
        """
        super().__init__()
        self.base_layer = base_layer
        self.act_delta_weight = nn.ParameterDict({})
        self.act_delta_bias = nn.ParameterDict({})
        self.act_delta_index = BufferDict({}, persistent=True)
        self.act_delta_scale: dict[str, float] = {}
        self.merged_adapters = []
        self._disable_adapters = False
        self._shares_weight = shares_weight
        self._originals: ChannelRows | None = None
        self._tied_weight: nn.Parameter | None = None
        self.in_features, self.out_features = self._features()

    def _features(self) -> tuple[int, int]:
        weight = self.get_base_layer().weight
        if self.kind.is_norm:
            return weight.shape[0], weight.shape[0]
        return weight.shape[1 - self.kind.channel_dim], weight.shape[self.kind.channel_dim]

    @property
    def num_channels(self) -> int:
        """Number of channels C of the wrapped module."""
        return self.out_features

    # ------------------------------------------------------------------------------------------------- adapters ---

    def update_layer(
        self, adapter_name: str, *, index: torch.Tensor, init_weights: bool = True, inference_mode: bool = False
    ) -> None:
        """Give the layer an adapter.

        Args:
            adapter_name: name of the adapter.
            index: int64 `[K]`, ascending channels in `[0, C)`; all -1 (`unknown_index`) for an adapter whose tensors
                are still to be loaded, K = 0 if even their number is not known yet.
            init_weights: zero deltas if True; random ones otherwise (for tests).
            inference_mode: whether the deltas start frozen.
        """
        base = self.get_base_layer()
        # A half precision delta would lose what distinguishes donor and base; PEFT's autocast rule asks for float32
        # too.
        dtype = torch.promote_types(base.weight.dtype, torch.float32)
        create = torch.zeros if init_weights else torch.randn
        shape = self.delta_shape(index.numel())
        self.act_delta_weight[adapter_name] = nn.Parameter(create(shape, dtype=dtype))
        if self.has_bias:
            self.act_delta_bias[adapter_name] = nn.Parameter(create(index.numel(), dtype=dtype))
        self.act_delta_index[adapter_name] = index.clone()
        self.act_delta_scale[adapter_name] = 1.0
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    @property
    def has_bias(self) -> bool:
        """Whether the wrapped module has a bias."""
        return getattr(self.get_base_layer(), "bias", None) is not None

    def delta_shape(self, num_selected: int) -> tuple[int, ...]:
        """Shape of the weight's delta for K selected channels, in the module's orientation."""
        shape = list(self.get_base_layer().weight.shape)
        shape[self.kind.channel_dim] = num_selected
        return tuple(shape)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Move the adapter to the base layer's device; its dtype stays, so that loading keeps every bit."""
        target = self.get_base_layer().weight.device if device is None else device
        for container in (self.act_delta_weight, self.act_delta_bias, self.act_delta_index):
            if adapter_name in container and container[adapter_name].device.type != "meta" and target.type != "meta":
                container[adapter_name] = container[adapter_name].to(target)

    def cast_adapter(self, adapter_name: str) -> None:
        """Cast the deltas of one adapter to the base layer's dtype, in place."""
        dtype = self.get_base_layer().weight.dtype
        for container in (self.act_delta_weight, self.act_delta_bias):
            if adapter_name in container:
                container[adapter_name].data = container[adapter_name].data.to(dtype)

    def set_scale(self, adapter_name: str, scale: float) -> None:
        """Multiply the contribution of one adapter by `scale`; a merged adapter is merged again with it.

        Raises:
            ActValueError: if `scale` is not finite.
        """
        if not math.isfinite(scale):
            raise ActValueError(f"set_scale({adapter_name!r}): got {scale}, expected a finite number")
        if adapter_name not in self.act_delta_scale:
            return
        self.act_delta_scale[adapter_name] = float(scale)
        if adapter_name in self.merged_adapters:
            self._write_rows(self._merged_rows(self.merged_adapters))

    # -------------------------------------------------------------------------------------------------- forward ---

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The base layer's output, with the change of each active adapter added to its selected channels."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        result = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return result
        # A fixed order: rounding must not depend on the order in which adapters were activated.
        for name in sorted(self.active_adapters):
            if name in self.act_delta_weight:
                result = self._add_change(result, self.change(x, name), name)
        return result

    def change(self, x: torch.Tensor, adapter_name: str) -> torch.Tensor:
        """What one adapter adds to its selected outputs, before `scale`: `[..., K]` for the input of the layer."""
        raise ActValueError(f"{type(self).__name__}: a layer class has to compute `change`")

    def _add_change(self, result: torch.Tensor, change: torch.Tensor, adapter_name: str) -> torch.Tensor:
        scale = self.act_delta_scale[adapter_name]
        if scale != 1.0:
            change = change * scale
        index = self.act_delta_index[adapter_name]
        change = change.to(result.dtype)
        # The output of the base layer is nobody else's, unless a hook may have kept it or made it a leaf.
        if self.base_layer._forward_hooks or (result.is_leaf and result.requires_grad):
            return result.index_add(-1, index, change)
        return result.index_add_(-1, index, change)

    # -------------------------------------------------------------------------------------------------- merging ---

    def original_rows(self, index: torch.Tensor) -> ChannelRows:
        """Copies of the base parameters of channels `index` (int64 `[K]`, ascending) as they were before any merge."""
        base, dim = self.get_base_layer(), self.kind.channel_dim
        index = index.to(base.weight.device)
        weight = base.weight.data.index_select(dim, index)
        bias = base.bias.data.index_select(0, index) if self.has_bias else None
        if self._originals is not None and index.numel():
            kept = self._originals
            where = torch.searchsorted(index, kept.index.to(index.device)).clamp(max=index.numel() - 1)
            hit = index[where] == kept.index.to(index.device)
            source = hit.nonzero().squeeze(1)
            weight.index_copy_(dim, where[hit], kept.weight.to(weight).index_select(dim, source))
            if bias is not None and kept.bias is not None:
                bias.index_copy_(0, where[hit], kept.bias.to(bias).index_select(0, source))
        return ChannelRows(index, weight, bias)

    def _merged_rows(self, adapter_names: list[str]) -> ChannelRows:
        """Original rows plus the scaled deltas of the named adapters, rounded once to the weight's dtype."""
        dim = self.kind.channel_dim
        names = sorted(name for name in adapter_names if name in self.act_delta_weight)
        index = torch.cat([self.act_delta_index[name] for name in names]).unique()  # sorted
        original = self.original_rows(index)

        def merged(rows: torch.Tensor, deltas: nn.ParameterDict, axis: int) -> torch.Tensor:
            parts = [(self.act_delta_index[n], deltas[n].detach(), self.act_delta_scale[n]) for n in names]
            return merged_rows(rows, original.index, parts, dim=axis)

        return ChannelRows(
            original.index,
            merged(original.weight, self.act_delta_weight, dim),
            None if original.bias is None else merged(original.bias, self.act_delta_bias, 0),
        )

    def _write_rows(self, rows: ChannelRows) -> None:
        base = self.get_base_layer()
        base.weight.data.index_copy_(self.kind.channel_dim, rows.index, rows.weight)
        if rows.bias is not None:
            base.bias.data.index_copy_(0, rows.index, rows.bias)

    def adapters_to_merge(self, adapter_names: list[str] | None) -> list[str]:
        """Those of the named (by default: the active) adapters that this layer has and that are not merged yet."""
        names = self.active_adapters if adapter_names is None else adapter_names
        return [name for name in names if name in self.act_delta_weight and name not in self.merged_adapters]

    def check_merge(self, adapter_names: list[str] | None = None) -> None:
        """Compute the merged rows without writing them.

        Raises:
            ActValueError: if they are not all finite.
        """
        names = self.adapters_to_merge(adapter_names)
        if not names:
            return
        rows = self._merged_rows(self.merged_adapters + names)
        for tensor in (rows.weight, rows.bias):
            if tensor is not None and not torch.isfinite(tensor).all():
                broken = [n for n in names if not torch.isfinite(self.act_delta_weight[n]).all()] or names
                raise ActValueError(f"NaNs detected in the merged weights. The adapter {broken[0]} seems to be broken")

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Write the rows of the named (by default: the active) adapters into the base weight.

        The original rows are kept, so `unmerge` gives the base's bytes back. Only selected rows are written.

        Args:
            safe_merge: check first that the merged rows are finite.
            adapter_names: the adapters to merge.

        Raises:
            ActValueError: with `safe_merge`, if a merged row is not finite; nothing is written then.
        """
        names = [n for n in check_adapters_to_merge(self, adapter_names) if n in self.act_delta_weight]
        if not names:
            return
        if safe_merge:
            self.check_merge(names)
        merged = [*self.merged_adapters, *names]
        rows = self._merged_rows(merged)
        self._originals = self.original_rows(rows.index)
        if self._shares_weight and self._tied_weight is None:
            base = self.get_base_layer()
            self._tied_weight = base.weight
            base.weight = nn.Parameter(base.weight.detach().clone(), requires_grad=False)
        self._write_rows(rows)
        self.merged_adapters = merged

    def unmerge(self) -> None:
        """Give the base weight its original bytes back."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        if self._originals is not None:
            base = self.get_base_layer()
            original = self._originals
            bias = original.bias
            self._write_rows(
                ChannelRows(
                    original.index.to(base.weight.device),
                    original.weight.to(base.weight),
                    None if bias is None else bias.to(base.bias),
                )
            )
            if self._tied_weight is not None:
                base.weight = self._tied_weight
        self._originals = self._tied_weight = None
        self.merged_adapters = []

    def get_delta_weight(self, adapter_name: str) -> torch.Tensor:
        """The adapter's change of the weight as a dense tensor of the weight's shape, in the delta's dtype.

        For inspection and conversion; the layer itself never builds it.
        """
        delta = self.act_delta_weight[adapter_name].detach() * self.act_delta_scale[adapter_name]
        dense = delta.new_zeros(self.get_base_layer().weight.shape)
        return dense.index_copy_(self.kind.channel_dim, self.act_delta_index[adapter_name], delta)

    # -------------------------------------------------------------------------------------------------- loading ---

    def knows_channels(self, adapter_name: str) -> bool:
        """Whether the adapter's channels are known, rather than still to be loaded."""
        index = self.act_delta_index[adapter_name]
        return index.device.type != "meta" and index.numel() > 0 and int(index[0]) >= 0

    def _load_from_state_dict(
        self, state_dict: dict[str, torch.Tensor], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        # torch calls this before it loads the containers below, so what is checked and resized here is what they load.
        for adapter_name in list(self.act_delta_index.keys()):
            state = self.adapter_state(state_dict, prefix, adapter_name)
            check_adapter_state(self, adapter_name, state, prefix.rstrip("."))
            index = state.get("act_delta_index")
            if index is not None and self.act_delta_index[adapter_name].numel() != index.numel():
                self._resize(adapter_name, index.numel())
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def adapter_state(
        self, state_dict: dict[str, torch.Tensor], prefix: str, adapter_name: str
    ) -> dict[str, torch.Tensor]:
        """The tensors of one adapter of this layer in a state dict, without prefix and adapter name."""
        names = ("act_delta_weight", "act_delta_bias", "act_delta_index")
        keys = {name: f"{prefix}{name}.{adapter_name}" for name in names}
        return {name: state_dict[key] for name, key in keys.items() if key in state_dict}

    def _resize(self, adapter_name: str, num_selected: int) -> None:
        old = self.act_delta_index[adapter_name]
        self.act_delta_index[adapter_name] = unknown_index(num_selected).to(old.device)
        for container, shape in (
            (self.act_delta_weight, self.delta_shape(num_selected)),
            (self.act_delta_bias, (num_selected,)),
        ):
            if adapter_name in container:
                parameter = container[adapter_name]
                container[adapter_name] = nn.Parameter(
                    torch.zeros(shape, dtype=parameter.dtype, device=parameter.device), parameter.requires_grad
                )
