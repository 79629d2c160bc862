"""`ActModel`: the tuner that PEFT calls. It finds, checks and wraps the modules. The layers compute."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from types import MappingProxyType
from typing import Any, cast

import torch
from torch import nn

from act_peft.adapter.config import ActConfig
from act_peft.adapter.state import INDEX, check_state
from act_peft.combination.rules import CombinationType, MajoritySign, make_rule
from act_peft.doors import OUTER
from act_peft.errors import ActError, ActValueError
from act_peft.layers import ActLayer
from act_peft.layers.deltas import PREFIX
from act_peft.layers.lookup import act_layers, output_head, shared_parameters
from act_peft.layers.output_head import seen_from_outside
from act_peft.layers.targets import Targets, find_targets, read_mask, renamed_record, target_answers
from act_peft.peft_modules import same_gradients
from act_peft.processes import digests, num_processes
from act_peft.transfer.difference import Transfer
from act_peft.transfer.in_model import donor_for_model, origin_of, warn_of_other_base
from act_peft.tuner.agreement import check_channels, check_loading, check_training
from act_peft.tuner.awaited import Awaited
from act_peft.tuner.combined import check_new_name, combined_adapter
from act_peft.tuner.complete import complete_state, frozen_copies
from act_peft.tuner.copies import copy_adapter_, find_twin
from act_peft.tuner.filling import fill_new_adapter
from act_peft.tuner.loading import check_names, check_place_of_base, check_whole
from act_peft.tuner.merging import MergingTuner
from act_peft.tuner.mixed_batches import adapter_per_sample
from act_peft.tuner.plan import InjectionPlan, withdraw


class ActModel(MergingTuner):
    """A model with ACT adapters (arXiv 2601.09398). Only the selected channels have deltas, and only these train.

    Created by `get_peft_model(model, ActConfig(...))`.

    Attributes:
        model: the base model, whose target modules are wrapped in `ActLayer`s.
        peft_config: adapter name -> `ActConfig`.
    """

    prefix = PREFIX
    tuner_layer_cls = ActLayer
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012 (PEFT's own annotation)

    # A class attribute, because PEFT injects the first adapter before `__init__` could set it.
    _plan: InjectionPlan | None = None  # while an adapter is being injected
    _frozen_copies: Mapping[str, torch.Tensor] = MappingProxyType({})  # of what ZeRO 3 has spread; see `complete`
    # Adapters whose channels no training step has compared between the processes yet: name of a module -> digest.
    _uncompared: Mapping[str, Mapping[str, str]] = MappingProxyType({})

    # ------------------------------------------------------------------------------------------------- creation ---

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, torch.Tensor] | None = None,
    ) -> None:
        """Check everything, wrap the target modules, and transfer from the donor if the configuration names one.

        Raises:
            ActValueError, ActTypeError: channels that do not fit the model, unsupported modules, a donor that does not
                fit. The model is then as it was.
        """
        config = self.peft_config[adapter_name]
        config.channels = read_mask(config.channels)
        donor = None if config.channels is None or config.from_file else config.donor
        self._inject(
            model,
            adapter_name,
            donor,
            autocast_adapter_dtype=autocast_adapter_dtype,
            low_cpu_mem_usage=low_cpu_mem_usage,
            state_dict=state_dict,
        )

    def _inject(
        self,
        model: nn.Module,
        adapter_name: str,
        donor: str | None,
        *,
        state_dict: dict[str, torch.Tensor] | None = None,
        **settings: bool,
    ) -> None:
        check_loading()
        config = self.peft_config[adapter_name]
        source = find_twin(adapter_name, configs=self.peft_config, awaiting=self._awaited())
        if source is None:
            if config.channels is None:
                check_place_of_base(model, adapter_name)
            if config.channels is None and config.adapted_modules is not None:
                config.adapted_modules = renamed_record(config.adapted_modules, model)
            targets = find_targets(config, model, state_dict)
        else:
            copied = {name: layer.act_delta_index[source] for name, layer in self._layers(source).items()}
            targets = Targets(copied, target_answers(config, [name for name, _ in model.named_modules()]))
        if config.channels is not None and state_dict is None:
            check_channels(targets.indices)
        with ExitStack() as stack:
            transfer, indices = None, targets.indices
            if source is None and donor is not None:
                origin, revision = origin_of(config.channels), config.donor_revision
                transfer = donor_for_model(model, donor, indices, revision=revision, origin=origin)
                indices = stack.enter_context(transfer).common(indices)
            elif source is None and state_dict is None:
                warn_of_other_base(config.channels, model, stacklevel=6)
            self._plan = InjectionPlan(
                indices=indices,
                answers=targets.answers,
                # Indices that a state dict will bring are created on the device where PEFT creates its deltas.
                device=torch.device("meta" if settings.get("low_cpu_mem_usage") and state_dict is not None else "cpu"),
                shared_parameters=shared_parameters(model),
                output_head=output_head(model),
            )
            trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
            try:
                super().inject_adapter(model, adapter_name, state_dict=state_dict, **settings)
                if source is not None:
                    copy_adapter_(self._layers(adapter_name), source, adapter_name)
                elif config.channels is not None and state_dict is None:
                    self._fill(config, model, indices, transfer, adapter_name=adapter_name)
            except BaseException as error:
                withdraw(model, adapter_name, trainable)
                if config.from_file and isinstance(error, ValueError) and not isinstance(error, ActError):
                    raise ActValueError(f"adapter {adapter_name!r}: {error}") from error  # of PEFT, about names
                raise
            finally:
                self._plan = None
        config.name_targets(indices)
        if config.channels is not None and state_dict is None:
            self._uncompared = {**self._uncompared, adapter_name: digests(indices)}
        if source is None and (config.channels is None or state_dict is not None):
            Awaited(model, adapter_name, self.peft_config, trainable)

    def _fill(
        self,
        config: ActConfig,
        model: nn.Module,
        indices: Mapping[str, torch.Tensor],
        transfer: Transfer | None,
        *,
        adapter_name: str,
    ) -> None:
        fill_new_adapter(config, model, indices, transfer, adapter_name=adapter_name)

    def _check_target_module_exists(self, peft_config: ActConfig, key: str) -> Any:
        if self._plan is None:  # PEFT's `inspect_matched_modules` asks at any time
            return target_answers(peft_config, [key])[key]
        return self._plan.answers[key]

    def _prepare_adapter_config(self, peft_config: ActConfig, model_config: dict[str, Any]) -> ActConfig:
        peft_config.forget_named_targets()  # the channels decide about the modules
        return peft_config

    def _create_and_replace(
        self,
        peft_config: ActConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        plan = cast(InjectionPlan, self._plan)
        layer = plan.layer_for(target)
        if layer is not target:
            layer._active_adapter = self.active_adapters
        layer.update_layer(
            adapter_name,
            index=plan.indices[current_key].to(plan.device),
            init_weights=peft_config.init_weights,
            include_bias=peft_config.include_bias,
            inference_mode=peft_config.inference_mode,
            trainable=peft_config.trains,
            transfer_scale=peft_config.transfer_scale,
            offload=peft_config.offload_deltas,
        )
        if layer is not target:
            if adapter_name not in self.active_adapters:
                layer.requires_grad_(False)
            self._replace_module(parent, target_name, layer, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # PEFT moves the tensors of the new layer to its device here. `ActLayer.update_layer` has done so already. It
        # knows which tensors have no data yet.
        setattr(parent, child_name, new_module)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        if not self.peft_config[adapter_name].trains.trains_rows:
            return  # the scales are float32, and the frozen difference keeps the dtype of its two models
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype=autocast_adapter_dtype)
        if not autocast_adapter_dtype:
            for layer in self._layers(adapter_name).values():
                layer.cast_adapter(adapter_name)

    # --------------------------------------------------------------------------------------------------- asking ---

    def _layers(self, adapter_name: str) -> dict[str, ActLayer]:
        return act_layers(self.model, adapter_name)

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        """Names of parameters that DistributedDataParallel leaves alone. It reads them from the model that it wraps.

        Offloaded deltas are frozen and the same in every process. They are not on the device of the other parameters.
        """
        layers = act_layers(self.model).items()
        offloaded = [f"model.{name}.{part}" for name, layer in layers for part in layer.offloaded_parameters()]
        return [*offloaded, *(f"base_model.{name}" for name in offloaded)]  # their names here and in a `PeftModel`

    @property
    def get_output_embeddings(self) -> Callable[[], nn.Module | None]:
        """The base model's method. It returns an adapted output layer in a form that other libraries can read.

        TRL refuses PEFT's layers there because it reads `lm_head.weight` instead of calling `lm_head`, and in theirs
        the deltas are no part of that weight. In ours they are (see `layers.output_head`).
        """
        original = self.model.get_output_embeddings

        def get_output_embeddings() -> nn.Module | None:
            return seen_from_outside(original())

        return get_output_embeddings

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        # PEFT calls this around every forward and `generate`. It removes `adapter_names` from the arguments itself.
        if self._uncompared and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            self._compare_processes()
        names = kwargs.get("adapter_names")
        if names is None:
            yield
            return
        with adapter_per_sample(self.model, names, adapters=self.peft_config, settings=kwargs):
            yield

    def _compare_processes(self) -> None:
        """In the first training step, check that all processes train the same channels."""
        if num_processes() > 1 and any(p.requires_grad for n, p in self.model.named_parameters() if PREFIX in n):
            held, self._uncompared = self._uncompared, {}
            check_training({f"{name} of {adapter}": d for adapter, its in held.items() for name, d in its.items()})
            self._frozen_copies = frozen_copies(self.model)

    def delete_adapter(self, adapter_name: str) -> None:
        """As in PEFT. If it was the only active adapter, the first remaining one by name becomes active in all layers.

        PEFT lets every layer choose for itself, but two ACT adapters may be on different modules.
        """
        was_alone = list(self.active_adapters) == [adapter_name]
        super().delete_adapter(adapter_name)
        if was_alone and self.peft_config:
            self.set_adapter(min(self.peft_config))

    def set_scale(self, adapter: str, scale: float) -> None:
        """Multiply the deltas of one adapter by `scale` (1.0: as trained), merged or not. The factor is not saved.

        Args:
            adapter: name of the adapter.
            scale: any finite number. 0 switches the adapter off, -1 subtracts its deltas.

        Raises:
            ActValueError: if there is no such adapter or the scale is not finite.
        """
        if adapter not in self.peft_config:
            raise ActValueError(f"set_scale: got adapter {adapter!r}, expected one of {sorted(self.peft_config)}")
        for layer in self._layers(adapter).values():
            layer.set_scale(adapter, scale)

    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: str | CombinationType = CombinationType.LINEAR,
        *,
        density: float | None = None,
        majority_sign_method: str | MajoritySign = MajoritySign.TOTAL,
    ) -> None:
        """Combine adapters of this model into a new one with the channels of all of them.

            delta[i] = Σ weight * scale * delta_adapter[i]      over the adapters that have channel i       ("linear")

        With this default the new adapter has the same effect, up to rounding, as all its parts together, each with
        `set_scale(adapter, weight * scale)`. The type matters only for channels that several adapters have
        (`CombinationType`); a channel of one adapter gets weight * scale * delta. `act_peft.combine` does the same
        with saved adapters.

        As in LoRA, the current factor of `set_scale` counts, and the new adapter is not active and does not train yet.
        Its deltas are float32, or wider if those of an adapter are. Merged adapters are unmerged first, with PEFT's
        warning, as always when an adapter is added.

        Args:
            adapters: names of adapters of this model, all with channel deltas only.
            weights: a finite factor for each, of any sign.
            adapter_name: name of the new adapter.
            combination_type: a `CombinationType` or its value. LoRA's `"cat"` and `"svd"` types are refused: they
                combine factors, and ACT has no factors.
            density: share of the values of shared channels that the pruning types keep, in (0, 1]; only for those.
            majority_sign_method: `"total"` or `"frequency"`, for `"ties"` and `"dare_ties"`.

        Raises:
            ActValueError: no such adapter, a name that exists already, settings that contradict each other, deltas
                that are not finite, modules that an adapter saves as a whole. The model is then unchanged.
            ActTypeError: names, weights or a density of a wrong type.
        """
        rule = make_rule(combination_type, density=density, majority_sign_method=majority_sign_method)
        check_new_name(adapter_name, self.peft_config)
        config, deltas = combined_adapter(self, adapters, weights, rule)
        self.peft_config[adapter_name] = config
        with same_gradients(self):
            try:
                self._inject(self.model, adapter_name, None)  # the donor in the configuration is a record
            except BaseException:
                self.peft_config.pop(adapter_name, None)
                raise
        for name, parts in deltas.items():
            for part, delta in parts.items():
                parameter = getattr(self.model.get_submodule(name), f"{PREFIX}{part}")[adapter_name]
                parameter.data = delta.to(parameter.device)

    # -------------------------------------------------------------------------------------------------- loading ---

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: ActConfig,
        adapter_name: str,
        state_dict: dict[str, torch.Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, torch.Tensor]:
        tensors = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        # Deltas on the meta device have no values to save, and the known channels of such an adapter are no state yet.
        without_values = {key: tensor for key, tensor in tensors.items() if tensor.device.type == "meta"}
        if without_values:
            return without_values
        tuner = getattr(model, "base_model", None)
        copies = tuner._frozen_copies if isinstance(tuner, ActModel) else {}
        return complete_state(model, adapter_name, tensors, copies)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: ActConfig, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        tuner = getattr(model, "base_model", None)
        if isinstance(tuner, ActModel):
            tuner._accept(adapter_name, remapped, OUTER, complete=True)
        return remapped

    def _load_from_state_dict(
        self, state_dict: dict[str, torch.Tensor], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        # torch calls this before it copies a tensor of any module inside: an adapter loads completely or not at all.
        for adapter_name in list(self.peft_config):
            self._accept(adapter_name, state_dict, f"{prefix}model.", complete=False)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _accept(self, adapter_name: str, state_dict: dict[str, torch.Tensor], prefix: str, *, complete: bool) -> None:
        """Check tensors before they are loaded. An adapter that waits for them is removed if they do not fit."""
        layers = self._layers(adapter_name)
        states = {n: layer.adapter_state(state_dict, f"{prefix}{n}.", adapter_name) for n, layer in layers.items()}
        awaited = self._awaited().get(adapter_name)
        if awaited is None and not any(states.values()):
            return
        with nullcontext() if awaited is None else awaited.removed_if_refused():
            if complete:
                check_names(state_dict, self.model, prefix)
            elif awaited:
                check_whole(state_dict, self.model, prefix)
            for name, layer in layers.items():
                expected = layer.expected_state(adapter_name)
                # PEFT's `ignore_mismatched_sizes` drops tensors of other shapes after the first check.
                check_state(expected, states[name], name, complete=complete, with_shapes=not complete)
        if awaited is not None and complete:
            awaited.seen_whole()
        elif awaited is not None and awaited.is_complete(states):
            indices = {name: state[INDEX] for name, state in states.items() if INDEX in state}
            self._uncompared = {**self._uncompared, adapter_name: digests(indices)}
            # Weights of the base that come with the adapter are not there yet.
            awaited.accepted(
                {name: i for name, i in indices.items() if f"{prefix}{name}.base_layer.weight" not in state_dict}
            )

    def _awaited(self) -> dict[str, Awaited]:
        """The adapters that are being loaded."""
        layers = act_layers(self.model).values()
        return {name: cast(Awaited, awaited) for layer in layers for name, awaited in layer._awaited.items()}
