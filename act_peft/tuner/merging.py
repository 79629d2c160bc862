"""Merging: checked first, exact in the end, also of a base that is spread over processes."""

from __future__ import annotations

from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from act_peft.layers.lookup import act_layers
from act_peft.shards import reshard_
from act_peft.tuner.ties import check_ties_in_parts, configuration_of_ties


class MergingTuner(BaseTuner):
    """A tuner whose layers keep what they overwrite."""

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Merge adapters as in PEFT. With `safe_merge` all rows are checked before the first one is written."""
        reshard_(self.model)
        check_ties_in_parts(self.model)
        if safe_merge:
            self._check_merge(adapter_names)
        super().merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge)

    def unmerge_adapter(self) -> None:
        """As in PEFT."""
        reshard_(self.model)
        super().unmerge_adapter()

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        reshard_(self.model)
        if merge:
            check_ties_in_parts(self.model)
        if merge and safe_merge:
            self._check_merge(adapter_names)
        with configuration_of_ties(self.model):
            return super()._unload_and_optionally_merge(
                merge=merge, progressbar=progressbar, safe_merge=safe_merge, adapter_names=adapter_names
            )

    def _check_merge(self, adapter_names: list[str] | None) -> None:
        for layer in act_layers(self.model).values():
            layer.check_merge(adapter_names)
