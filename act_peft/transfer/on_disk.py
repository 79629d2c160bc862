"""Create adapters on disk: rows of a donor become an adapter folder, without loading a model."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace

import torch
from peft import PeftModelForCausalLM, TaskType
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedModel

from act_peft.adapter.base_record import fingerprint, module_record
from act_peft.adapter.config import ActConfig, record_adapter
from act_peft.adapter.models import record_of
from act_peft.channels.kinds import kind_of
from act_peft.channels.masks import ChannelMask
from act_peft.channels.rows import ChannelRows, wide_dtype
from act_peft.disk.atomic import new_folder
from act_peft.disk.checkpoint import Checkpoint
from act_peft.disk.folders import check_output, check_room
from act_peft.disk.locations import lasting_name
from act_peft.disk.parameters import Parameters
from act_peft.disk.skeleton import build_skeleton, load_config
from act_peft.doors import OUTER
from act_peft.errors import ActValueError
from act_peft.layers.deltas import PREFIX
from act_peft.layers.targets import find_targets, read_mask
from act_peft.transfer.difference import Transfer
from act_peft.transfer.donors import open_donor
from act_peft.transfer.in_model import origin_of
from act_peft.transfer.parameters import vocabulary_parameters


def create_adapter(
    base: str | os.PathLike[str],
    donor: str | os.PathLike[str],
    mask: ChannelMask | Mapping[str, Iterable[int]] | str | os.PathLike[str],
    output_dir: str | os.PathLike[str],
    *,
    transfer_scale: float = 0.4,
    include_bias: bool = True,
    overwrite: bool = False,
    show_progress: bool = False,
) -> None:
    """Create an ACT adapter from two checkpoints on disk.

        delta[i, :] = λ * (W_donor[i, :] - W_base[i, :])          for every selected channel i

    (arXiv 2601.09398, the transfer step.) The folder holds the same bytes as that of

        get_peft_model(base, ActConfig(channels=mask, donor=donor, transfer_scale=λ, task_type="CAUSAL_LM"))

    after `save_pretrained`. The modules follow from the base's `config.json`. Only the selected rows of both
    checkpoints are read (columns of embeddings and Conv1D are scattered: these tensors are read whole, in pieces).

    Args:
        base: folder or Hub id of the base's checkpoint, in safetensors.
        donor: folder or Hub id of the donor's checkpoint, or of a LoRA or ACT adapter of the base.
        mask: the selected channels, as in `ActConfig(channels=...)`.
        output_dir: the folder to write. It appears whole or not at all.
        transfer_scale: λ.
        include_bias: as in `ActConfig`.
        overwrite: whether an older adapter at `output_dir` is replaced.
        show_progress: show a progress bar over the modules, if the error stream is a terminal.

    Raises:
        ActValueError, ActTypeError: a missing or damaged checkpoint; channels that do not fit the base; a donor with a
            different architecture or shape, or with selected weights that are not finite or quantized; base and donor
            exchanged, compared with those that the mask was made with; an output that exists or lies inside an input;
            no room on the disk. Nothing is written then.

    Warns:
        ActWarning: once, if vocabulary (channels beyond the common tokens are left out), rotary base or context length
            differ or the weights look unrelated; if the mask was made with models of other weights.

    Example:
        >>> create_adapter(BASE, DONOR, mask, "ability", transfer_scale=0.4)
        >>> model = PeftModel.from_pretrained(base, "ability")
    """
    output = Path(os.path.abspath(output_dir))
    settings = ActConfig(
        channels=mask,
        donor=lasting_name(donor),
        transfer_scale=transfer_scale,
        include_bias=include_bias,
        inference_mode=True,
    )
    with Checkpoint.open(base) as checkpoint:
        inputs = [checkpoint.folder, *([Path(donor)] if os.path.isdir(donor) else [])]
        check_output(output, inputs, overwrite=overwrite)
        config = load_config(checkpoint)
        skeleton = build_skeleton(config, checkpoint)
        settings.task_type = _task_of(skeleton)
        shapes = {n: tuple(p.shape) for n, p in skeleton.named_parameters(remove_duplicate=False)}
        parameters = Parameters(checkpoint, list(shapes))
        settings.channels = read_mask(settings.channels)
        indices = find_targets(settings, skeleton, None).indices
        kinds = {name: kind_of(skeleton.get_submodule(name)) for name in indices}
        _check_shapes(checkpoint, parameters, shapes, needed=indices)
        axes = {name: kind.channel_dim for name, kind in kinds.items()}
        vocabulary = vocabulary_parameters(skeleton)
        opened = open_donor(donor, parameters, axes=axes, config=config, vocabulary=vocabulary)
        with Transfer(parameters, opened, axes, origin=origin_of(settings.channels)) as transfer:
            indices = transfer.common(indices)
            samples = record_of(parameters, indices).fingerprints
            tensors: dict[str, torch.Tensor] = {}
            records = {}
            read = transfer.deltas(indices, transfer_scale=transfer_scale)
            hidden = None if show_progress else True
            for name, rows, deltas in tqdm(read, desc="transfer", total=len(indices), unit="module", disable=hidden):
                if not include_bias:
                    rows, deltas = rows.without_bias(), deltas.without_bias()
                prefix = f"{OUTER}{name}.{PREFIX}"
                tensors |= {f"{prefix}{part}": delta for part, delta in _in_file_dtype(rows, deltas)}
                tensors[f"{prefix}index"] = rows.index
                records[name] = module_record(
                    kinds[name],
                    selected=rows.index.numel(),
                    channels=shapes[f"{name}.weight"][axes[name]],
                    base=fingerprint(rows.weight, rows.bias),
                    sample=samples.get(name),
                )
            transfer.warn(stacklevel=2)
    record_adapter(settings, records)
    settings.base_model_name_or_path = skeleton.name_or_path = lasting_name(skeleton.name_or_path)
    check_room(output, sum(t.numel() * t.element_size() for t in tensors.values()) + (1 << 20))
    with new_folder(output, overwrite=overwrite) as folder:
        _CardWriter(skeleton, settings).create_or_update_model_card(str(folder))
        save_file(tensors, folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
        settings.save_pretrained(str(folder))


def _task_of(skeleton: PreTrainedModel) -> TaskType | None:
    """The task of a model that generates text from text, in PEFT's words; None for other models."""
    if not skeleton.can_generate() or skeleton.main_input_name != "input_ids":
        return None
    return TaskType.SEQ_2_SEQ_LM if skeleton.config.is_encoder_decoder else TaskType.CAUSAL_LM


class _CardWriter(PeftModelForCausalLM):
    """The parts of a PEFT model that PEFT needs to write its model card."""

    def __init__(self, skeleton: PreTrainedModel, settings: ActConfig) -> None:
        nn.Module.__init__(self)
        self.config = skeleton.config
        self.base_model = SimpleNamespace(model=skeleton, name_or_path=skeleton.name_or_path)
        self._settings = settings

    @property
    def active_peft_config(self) -> ActConfig:
        return self._settings

    def get_base_model(self) -> PreTrainedModel:
        return self.base_model.model


def _check_shapes(
    base: Checkpoint, parameters: Parameters, shapes: Mapping[str, tuple[int, ...]], *, needed: Iterable[str]
) -> None:
    """Check that the base has the tensors that its configuration describes."""
    modules = set(needed)
    parameters.check_unquantized({f"{name}.weight": shapes[f"{name}.weight"] for name in modules})
    for name, shape in shapes.items():
        if name not in parameters and name.rpartition(".")[0] in modules:
            base.file_of(name)  # raises an error that names the missing tensor
        if name in parameters and parameters.shape(name) != shape:
            raise ActValueError(
                f"{base.location}: {parameters.key(name)} has shape {list(parameters.shape(name))}, expected "
                f"{list(shape)} by its config.json (the checkpoint is damaged)"
            )


def _in_file_dtype(base: ChannelRows, deltas: ChannelRows) -> Iterator[tuple[str, torch.Tensor]]:
    """The deltas in the dtype of an adapter's file: float32, or the base's dtype if that is wider."""
    for part in ("weight", "bias"):
        rows, delta = getattr(base, part), getattr(deltas, part)
        if delta is not None:
            yield part, delta.to(wide_dtype(rows.dtype)).contiguous()
