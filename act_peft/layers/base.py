"""What every ACT layer does: forward pass, scaling, merging. Merging keeps the original rows."""

from __future__ import annotations

import warnings
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from torch import nn

from act_peft.channels.rows import ChannelRows, merged_rows
from act_peft.checks import finite_number
from act_peft.doors import check_adapters_to_merge, onload_layer
from act_peft.errors import ActValueError, ActWarning
from act_peft.layers.loadable import LoadableLayer
from act_peft.layers.quantized import QuantizedRows
from act_peft.layers.rows import BaseRows
from act_peft.offloading import brought_in, has_data


def remove_adapter(model: nn.Module, name: str, adapter_name: str) -> None:
    """Remove an adapter from one layer of a model. A layer without adapters is replaced by its plain module.

    Args:
        model: the base model.
        name: of the layer in it.
        adapter_name: name of the adapter.
    """
    layer = model.get_submodule(name)
    if isinstance(layer, ActLayer):
        layer.remove_adapter(adapter_name)
        if not layer.act_delta_index:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, layer.base_layer)


class ActLayer(LoadableLayer):
    """A module whose selected channels carry deltas.

    The wrapped module runs unchanged. For each active adapter the change of the selected outputs is added to them:

        y = base(x);    y[..., index] += scale * change(x, delta)

    With learned scales s the change of every channel is multiplied by its scale, after the product with the input:
    `s * change(x, delta)`. No scaled copy of the delta is made.

    A subclass names its `kind`, which knows the axis of the channels, and computes `change`. All else is here.
    """

    def __init__(self, base_layer: nn.Module, *, shares_weight: bool = False) -> None:
        """Wrap `base_layer`.

        Args:
            base_layer: the module to adapt. It is not changed.
            shares_weight: whether another module uses the same weight or bias (tied embeddings). Merging then gives
                this module copies, because the delta is for this module only.
        """
        super().__init__(base_layer)
        self._rows = QuantizedRows() if self.is_quantized else BaseRows(self.kind, shares_weight=shares_weight)

    # -------------------------------------------------------------------------------------------------- scaling ---

    def set_scale(self, adapter_name: str, scale: float) -> None:
        """Multiply the deltas of one adapter by `scale`. A merged adapter is merged again with the new factor.

        Raises:
            ActValueError: if `scale` is not finite.
        """
        scale = finite_number(scale, f"set_scale({adapter_name!r})")
        if adapter_name not in self.act_delta_scale:
            return
        self.act_delta_scale[adapter_name] = scale
        if adapter_name in self.merged_adapters:
            self._write(self._merged_rows(self.merged_adapters))

    def scale_layer(self, scale: float) -> None:
        """Multiply the current factor of the active adapters by `scale` (diffusers calls this).

        Raises:
            ActValueError: if the product is not finite.
        """
        for name in self.active_adapters:
            if name in self.act_delta_scale:
                self.set_scale(name, self.act_delta_scale[name] * scale)

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the current factor of the active adapters by `scale`; without `scale` the factor becomes 1.0.

        Raises:
            ActValueError: if `scale` is 0.
        """
        if scale == 0:
            raise ActValueError("unscale_layer: got 0, expected a factor other than 0 (None: as trained)")
        for name in self.active_adapters:
            if name in self.act_delta_scale:
                self.set_scale(name, 1.0 if scale is None else self.act_delta_scale[name] / scale)

    # -------------------------------------------------------------------------------------------------- forward ---

    def forward(
        self, x: torch.Tensor, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any
    ) -> torch.Tensor:
        """The output of the base layer plus the change of each active adapter in its selected channels.

        Args:
            x: input of the base layer.
            *args: further inputs of the base layer.
            adapter_names: one adapter for each sample (the first axis of `x`) instead of the active ones. A name that
                the layer does not have, such as `__base__`, changes nothing.
            **kwargs: further inputs of the base layer.

        Raises:
            ActValueError: the numbers of names and samples differ, or an adapter is merged.
            ActLoadError: an adapter's tensors are not loaded, or do not fit.
        """
        if self._disable_adapters:
            if self.merged_adapters:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        if "_hf_hook" in self.act_delta_weight.__dict__:  # accelerate hooks modules that nobody calls, too
            with brought_in(self.act_delta_weight, self.act_delta_bias, self.act_delta_channel_scale):
                return self._forward_adapted(x, adapter_names, *args, **kwargs)
        return self._forward_adapted(x, adapter_names, *args, **kwargs)

    def _forward_adapted(
        self, x: torch.Tensor, adapter_names: list[str] | None, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        if self._awaited:
            self.settle(self.active_adapters if adapter_names is None else set(adapter_names))
        if adapter_names is not None:
            return self._forward_mixed(x, adapter_names, *args, **kwargs)
        # Looking up a submodule costs about as much as a small kernel, and decoding passes here for every token.
        base, deltas = self.base_layer, self.act_delta_weight
        result = base(x, *args, **kwargs)
        if self.merged_adapters:
            return result
        # Nobody else holds the output of the base layer, unless a hook kept it or made it a leaf. Quantized layers may
        # return a view, and autograd forbids writing into it.
        shared = self.is_quantized or base._forward_hooks or (result.is_leaf and result.requires_grad)
        # A fixed order, so that rounding does not depend on the order of activation.
        for name in sorted(self.active_adapters):
            if name in deltas:
                index, change = self.act_delta_index[name], self._scaled_change(x, name, result.dtype)
                result = result.index_add(-1, index, change) if shared else result.index_add_(-1, index, change)
        return result

    def _forward_mixed(self, x: torch.Tensor, adapter_names: list[str], *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.merged_adapters:
            raise ActValueError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
            )
        if len(x) == 1:  # an input that all samples share, such as positions
            x = x.expand(len(adapter_names), *x.shape[1:])
        if len(x) != len(adapter_names):
            raise ActValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(adapter_names)} and {len(x)} respectively. (adapted module: {self.get_base_layer()})"
            )
        result = self.base_layer(x, *args, **kwargs)
        for name in sorted(set(adapter_names) & set(self.act_delta_weight)):
            samples = torch.tensor([i for i, n in enumerate(adapter_names) if n == name], device=x.device)
            change = self._scaled_change(x.index_select(0, samples), name, result.dtype)
            part = result.index_select(0, samples).index_add_(-1, self.act_delta_index[name], change)
            result = result.index_copy(0, samples, part)
        return result

    def change(self, x: torch.Tensor, adapter_name: str) -> torch.Tensor:
        """The change of the selected outputs by the delta of one adapter, before any scale: `[..., K]`."""
        raise ActValueError(f"{type(self).__name__}: a layer class has to compute `change`")

    def _scaled_change(self, x: torch.Tensor, adapter_name: str, dtype: torch.dtype) -> torch.Tensor:
        change, scale = self.change(x, adapter_name), self.act_delta_scale[adapter_name]
        if adapter_name in self._learns_scales:
            change = change * self.act_delta_channel_scale[adapter_name]  # [..., K] * [K]
        if scale != 1.0:
            change = change * scale
        return change if change.dtype == dtype else change.to(dtype)

    # -------------------------------------------------------------------------------------------------- merging ---

    def original_rows(self, index: torch.Tensor) -> ChannelRows:
        """Copies of the base parameters of channels `index` (int64 `[K]`, ascending) as they were before any merge.

        Raises:
            ActTypeError: the weight has an unknown quantized form.
        """
        return self._rows.original(self.get_base_layer(), index)

    def _merged_rows(self, adapter_names: list[str]) -> ChannelRows:
        """Original rows plus the scaled deltas of the named adapters, rounded once to the weight's dtype."""
        dim = self.kind.channel_dim
        names = sorted(name for name in adapter_names if name in self.act_delta_weight)
        index = torch.cat([self.act_delta_index[name] for name in names]).unique()  # sorted
        original = self.original_rows(index)

        def merged(rows: torch.Tensor, part: str, axis: int) -> torch.Tensor:
            having = names if part == "weight" else [n for n in names if self.changes_bias(n)]
            parts = [(self.act_delta_index[n], self.whole_delta(n, part), self.act_delta_scale[n]) for n in having]
            return merged_rows(rows, original.index, parts, dim=axis)

        return ChannelRows(
            original.index,
            merged(original.weight, "weight", dim),
            None if original.bias is None else merged(original.bias, "bias", 0),
        )

    def adapters_to_merge(self, adapter_names: list[str] | None) -> list[str]:
        """The unmerged adapters of this layer among the named ones (by default: the active ones)."""
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
                broken = [n for n in names if not torch.isfinite(self.whole_delta(n, "weight")).all()] or names
                raise ActValueError(f"NaNs detected in the merged weights. The adapter {broken[0]} seems to be broken")

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Write the rows of the named (by default: the active) adapters into the base weight.

        The original rows are kept, so `unmerge` restores the bytes of the base. Only selected rows are written.

        Args:
            safe_merge: check first that the merged rows are finite.
            adapter_names: the adapters to merge.

        Raises:
            ActValueError: with `safe_merge`, a merged row is not finite. Nothing is written then.
            ActTypeError: the weight has an unknown quantized form. Nothing is written then.
            ActLoadError: an adapter's tensors are not loaded, or do not fit.

        Warns:
            ActWarning: if the weight is quantized.
        """
        names = [n for n in check_adapters_to_merge(self, adapter_names) if n in self.act_delta_weight]
        self.settle(names)
        if not names:
            return
        if safe_merge:
            self.check_merge(names)
        merged = [*self.merged_adapters, *names]
        rows = self._merged_rows(merged)
        if self.is_quantized:
            warnings.warn(
                f"{type(self.get_base_layer()).__name__}: its weight is quantized, merging rounds the deltas to what "
                "its codes can express (leave the adapter unmerged, or merge it into the base in full precision with "
                "merge_checkpoint, to lose nothing)",
                ActWarning,
                stacklevel=2,
            )
        self._write(rows)
        self.merged_adapters = merged

    def _write(self, rows: ChannelRows) -> None:
        with self._base_brought_in():
            self._rows.write(self.get_base_layer(), rows)

    def _base_brought_in(self) -> AbstractContextManager[None]:
        """For writing into the base weight, where accelerate keeps it elsewhere; `merge_adapter` has done it."""
        if has_data(self.get_base_layer()):
            return nullcontext()
        return cast("AbstractContextManager[None]", onload_layer(self))

    def unmerge(self) -> None:
        """Restore the original bytes of the base weight."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        with self._base_brought_in():
            self._rows.restore(self.get_base_layer())
        self.merged_adapters = []

    def get_delta_weight(self, adapter_name: str) -> torch.Tensor:
        """The delta of the weight as a dense tensor of the weight's shape, in the delta's dtype.

        For inspection and conversion. The layer itself never builds it.
        """
        delta = self.whole_delta(adapter_name, "weight") * self.act_delta_scale[adapter_name]
        dense = delta.new_zeros(self.delta_shape(self.num_channels))
        return dense.index_copy_(self.kind.channel_dim, self.act_delta_index[adapter_name], delta)
