"""The tensors of an ACT layer's adapters: channels, deltas and learned scales."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from act_peft.adapter.config import Trainable
from act_peft.channels.kinds import ChannelKind, features, is_quantized
from act_peft.channels.rows import ChannelRows, scaled_channels, wide_dtype
from act_peft.doors import BufferDict
from act_peft.shards import whole

PREFIX = "act_delta_"  # `act_` alone would also match modules such as `mlp.act_fn`
CPU = torch.device("cpu")
UNKNOWN = -1  # in place of a channel of an adapter that is not loaded yet


def unknown_index(num_selected: int) -> torch.Tensor:
    """Placeholder for the channels of an adapter that is not loaded yet: int64 `[K]`, all -1."""
    return torch.full((num_selected,), UNKNOWN)


class DeltaLayer(nn.Module, BaseTunerLayer):
    """A wrapped module with the tensors of its adapters.

    Attributes:
        act_delta_weight: per adapter the trainable delta of the weight, oriented as in `ChannelRows`.
        act_delta_bias: per adapter `[K]`, for modules with a bias, unless the adapter leaves biases out.
        act_delta_channel_scale: per adapter with learned scales, float32 `[K]`. Weight and bias above are then the
            donor's difference, which the scales multiply. It is frozen unless it trains too.
        act_delta_index: per adapter the selected channels, int64 `[K]`, ascending.
        act_delta_scale: per adapter the factor of `set_scale`, 1.0 by default; not saved.
    """

    adapter_layer_names = ("act_delta_weight", "act_delta_bias", "act_delta_channel_scale")
    other_param_names = ("act_delta_index", "act_delta_scale")

    kind: ChannelKind

    # Members of PEFT's classes, for type checkers.
    get_base_layer: Callable[[], Any]
    _cast_input_dtype: Callable[..., torch.Tensor]
    _get_embed_scale: Callable[[], torch.Tensor | None]
    active_adapters: list[str]
    merged_adapters: list[str]

    def __init__(self, base_layer: nn.Module) -> None:
        """Wrap `base_layer`, which is not changed."""
        super().__init__()
        self.base_layer = base_layer
        self.act_delta_weight = nn.ParameterDict({})
        self.act_delta_bias = nn.ParameterDict({})
        self.act_delta_channel_scale = nn.ParameterDict({})
        self.act_delta_index = BufferDict({}, persistent=True)
        self.act_delta_scale: dict[str, float] = {}
        self.merged_adapters = []
        self._learns_scales: set[str] = set()  # adapters with learned scales
        self._frozen_rows: set[str] = set()  # those of them whose rows do not train
        self._offloaded: set[str] = set()  # those of these whose weight's delta stays in CPU memory
        self._disable_adapters = False
        base = self.get_base_layer()
        self.in_features, self.out_features = features(base)
        self.is_quantized = is_quantized(base)

    @property
    def num_channels(self) -> int:
        """Number of channels C of the wrapped module."""
        return self.out_features

    # ------------------------------------------------------------------------------------------------- adapters ---

    def update_layer(
        self,
        adapter_name: str,
        *,
        index: torch.Tensor,
        init_weights: bool = True,
        include_bias: bool = True,
        inference_mode: bool = False,
        trainable: Trainable = Trainable.DELTAS,
        transfer_scale: float = 1.0,
        offload: bool = False,
    ) -> None:
        """Give the layer an adapter.

        Args:
            adapter_name: name of the adapter.
            index: int64 `[K]`, ascending channels in `[0, C)`. All -1 (`unknown_index`) for an adapter whose tensors
                are not loaded yet; K = 0 if their number is not known either.
            init_weights: True: zero deltas; False: random ones, for tests.
            include_bias: whether a bias has a delta too.
            inference_mode: whether the deltas start frozen.
            trainable: what trains.
            transfer_scale: start value of learned scales.
            offload: whether the frozen delta of the weight stays in CPU memory.
        """
        base = self.get_base_layer()
        # In half precision, training would round away the small differences between donor and base. PEFT's rule for
        # adapters asks for float32 too. A frozen difference keeps the dtype of its two models.
        dtype = torch.float32 if self.is_quantized else base.weight.dtype
        if trainable.trains_rows:
            dtype = torch.promote_types(dtype, torch.float32)
        create = torch.zeros if init_weights else torch.randn
        shape = self.delta_shape(index.numel())
        self.act_delta_weight[adapter_name] = nn.Parameter(create(shape, dtype=dtype))
        if self.has_bias and include_bias:
            self.act_delta_bias[adapter_name] = nn.Parameter(create(index.numel(), dtype=dtype))
        if trainable.has_scales:
            scales = torch.full((index.numel(),), float(transfer_scale), dtype=torch.float32)
            self.act_delta_channel_scale[adapter_name] = nn.Parameter(scales)
            self._learns_scales.add(adapter_name)
        if not trainable.trains_rows:
            self._frozen_rows.add(adapter_name)
        if offload and not self.kind.is_norm:  # the delta of a norm is no larger than its scales
            self._offloaded.add(adapter_name)
        self.act_delta_index[adapter_name] = index.clone()
        self.act_delta_scale[adapter_name] = 1.0
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def set_adapter(self, adapter_names: str | list[str], *args: Any, **kwargs: Any) -> None:
        """As in PEFT, but frozen rows stay frozen."""
        super().set_adapter(adapter_names, *args, **kwargs)
        self._freeze_rows()

    def set_requires_grad(self, *args: Any, **kwargs: Any) -> None:
        """As in PEFT, but frozen rows stay frozen."""
        super().set_requires_grad(*args, **kwargs)
        self._freeze_rows()

    def _freeze_rows(self) -> None:
        for container in (self.act_delta_weight, self.act_delta_bias):
            for name in self._frozen_rows:
                if name in container:
                    container[name].requires_grad_(False)

    def remove_adapter(self, adapter_name: str) -> None:
        """Remove an adapter, if the layer has it. The list of active adapters does not change."""
        for container in (*self.adapter_layer_names, *self.other_param_names):
            if adapter_name in getattr(self, container):
                del getattr(self, container)[adapter_name]
        self._forget_scales(adapter_name)

    def delete_adapter(self, adapter_name: str) -> None:
        """As in PEFT: remove an adapter. If it was active, a different one becomes active."""
        super().delete_adapter(adapter_name)
        self._forget_scales(adapter_name)

    def _forget_scales(self, adapter_name: str) -> None:
        self._learns_scales.discard(adapter_name)
        self._frozen_rows.discard(adapter_name)
        self._offloaded.discard(adapter_name)

    def fold_scales(self, adapter_name: str, kept: torch.Tensor) -> None:
        """Replace the deltas of an adapter by scale * delta, for some of its channels, and remove the scales.

        Args:
            adapter_name: name of an adapter with learned scales.
            kept: positions of the remaining channels, int64 `[n]`, ascending.
        """
        trains = self.act_delta_channel_scale[adapter_name].requires_grad
        for container, part in ((self.act_delta_weight, "weight"), (self.act_delta_bias, "bias")):
            if adapter_name in container:
                delta = self.delta(adapter_name, part).detach()
                rows = delta.index_select(self.kind.axis_of(part), kept)
                container[adapter_name] = nn.Parameter(rows, requires_grad=trains)
        self.act_delta_index[adapter_name] = self.act_delta_index[adapter_name][kept]
        del self.act_delta_channel_scale[adapter_name]
        self._forget_scales(adapter_name)

    @property
    def has_bias(self) -> bool:
        """Whether the wrapped module has a bias."""
        return getattr(self.get_base_layer(), "bias", None) is not None

    def changes_bias(self, adapter_name: str) -> bool:
        """Whether an adapter has a delta of the bias."""
        return adapter_name in self.act_delta_bias

    def delta_shape(self, num_selected: int) -> tuple[int, ...]:
        """Shape of the weight's delta for K selected channels, in the module's orientation."""
        if self.kind.is_norm:
            return (num_selected,)
        shape = (num_selected, self.in_features)
        return shape if self.kind.channel_dim == 0 else shape[::-1]

    def state_shapes(self, adapter_name: str) -> dict[str, tuple[int, ...]]:
        """Container -> shape of what it holds of an adapter."""
        count = self.act_delta_index[adapter_name].numel()
        names = ("act_delta_index", "act_delta_bias", "act_delta_channel_scale")
        return {"act_delta_weight": self.delta_shape(count), **dict.fromkeys(names, (count,))}

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Move the adapter to the base layer's device. Its dtype does not change, so that loading keeps every bit."""
        target = self.get_base_layer().weight.device if device is None else device
        for container in (self.act_delta_bias, self.act_delta_channel_scale, self.act_delta_index):
            _move(container, adapter_name, target)
        _move(self.act_delta_weight, adapter_name, CPU if adapter_name in self._offloaded else target)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> DeltaLayer:
        # `.to()`, `.cuda()`, `.half()` and similar methods all call this.
        super()._apply(fn, recurse)
        for adapter_name in self._offloaded:
            _move(self.act_delta_weight, adapter_name, CPU)
        return self

    def offloaded_parameters(self) -> list[str]:
        """Names of the parameters that always stay in CPU memory."""
        return [f"act_delta_weight.{adapter_name}" for adapter_name in sorted(self._offloaded)]

    def cast_adapter(self, adapter_name: str) -> None:
        """Cast the deltas of one adapter to the base layer's dtype, in place. On a quantized layer nothing changes."""
        if self.is_quantized:
            return
        dtype = self.get_base_layer().weight.dtype
        for container in (self.act_delta_weight, self.act_delta_bias):
            if adapter_name in container:
                container[adapter_name].data = container[adapter_name].data.to(dtype)

    # --------------------------------------------------------------------------------------------------- deltas ---

    def delta(self, adapter_name: str, part: str) -> torch.Tensor:
        """The delta of one adapter for `"weight"` or `"bias"` of its channels, learned scales included.

        Args:
            adapter_name: name of the adapter.
            part: `"weight"` or `"bias"`, of which the adapter must have a delta.

        Returns:
            K channels in the orientation of the parameter, differentiable, without the factor of `set_scale`.
        """
        rows = getattr(self, f"act_delta_{part}")[adapter_name]
        if adapter_name not in self._learns_scales:
            return rows
        return scaled_channels(rows, self.act_delta_channel_scale[adapter_name], self.kind.axis_of(part))

    def whole_delta(self, adapter_name: str, part: str) -> torch.Tensor:
        """As `delta`, without gradient, also if this process holds only a part of it."""
        rows = whole(getattr(self, f"act_delta_{part}")[adapter_name])
        if adapter_name not in self._learns_scales:
            return rows
        return scaled_channels(rows, whole(self.act_delta_channel_scale[adapter_name]), self.kind.axis_of(part))

    def as_stored(self, adapter_name: str, rows: ChannelRows) -> ChannelRows:
        """Deltas in the dtype and on the device of the adapter's deltas; on the CPU if these have no data yet."""
        weight = self.act_delta_weight[adapter_name]
        device = CPU if weight.device.type == "meta" else weight.device
        bias = None if rows.bias is None else rows.bias.to(device, weight.dtype)
        return ChannelRows(rows.index, rows.weight.to(device, weight.dtype), bias)

    def write_deltas(self, adapter_name: str, rows: ChannelRows, *, transfer_scale: float) -> None:
        """Replace the deltas of an adapter. Parameters without data get data.

        Args:
            adapter_name: name of the adapter.
            rows: the new deltas.
            transfer_scale: new start value of learned scales.
        """
        stored = self.as_stored(adapter_name, rows)
        scales = torch.full((rows.index.numel(),), float(transfer_scale), dtype=torch.float32)
        for container, values in (
            (self.act_delta_weight, stored.weight),
            (self.act_delta_bias, stored.bias),
            (self.act_delta_channel_scale, scales),
        ):
            if adapter_name not in container or values is None:
                continue
            parameter = container[adapter_name]
            if parameter.device.type == "meta":
                container[adapter_name] = nn.Parameter(values, parameter.requires_grad)
            else:
                parameter.data.copy_(values)
        torch.clear_autocast_cache()  # of casts of the deltas as they were
        self._move_adapter_to_device_of_base_layer(adapter_name)

    def delta_dtype(self, adapter_name: str) -> torch.dtype:
        """Dtype of `delta`."""
        dtype = self.act_delta_weight[adapter_name].dtype
        return wide_dtype(dtype) if adapter_name in self._learns_scales else dtype


def _move(container: nn.ParameterDict | BufferDict, adapter_name: str, target: torch.device) -> None:
    """Move one tensor, unless it has no data or the target is the meta device. A frozen one stays frozen."""
    if adapter_name not in container or "meta" in (container[adapter_name].device.type, target.type):
        return
    tensor = container[adapter_name]
    if tensor.device != target:
        moved = tensor.detach().to(target)
        container[adapter_name] = (
            nn.Parameter(moved, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else moved
        )
