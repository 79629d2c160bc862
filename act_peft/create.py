"""Creating adapters on disk: the rows of a donor become an adapter folder, and no model is ever loaded."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from peft import PeftModelForCausalLM
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel

from act_peft.arithmetic import scaled_difference, wide_dtype
from act_peft.channels import kind_of
from act_peft.checkpoint import Checkpoint
from act_peft.config import ActConfig, module_record
from act_peft.errors import ActValueError
from act_peft.fingerprint import fingerprint
from act_peft.folders import check_output, check_room, new_folder
from act_peft.layers.base import PREFIX
from act_peft.lineage import Resemblance, check_configs, check_shapes
from act_peft.masks import ChannelMask
from act_peft.names import key_for, prefix_change
from act_peft.plan import plan_channels
from act_peft.skeleton import build_skeleton, load_config, tied_weights


def create_adapter(
    base: str | os.PathLike[str],
    donor: str | os.PathLike[str],
    mask: ChannelMask | Mapping[str, Iterable[int]] | str | os.PathLike[str],
    output_dir: str | os.PathLike[str],
    *,
    transfer_scale: float = 0.4,
    overwrite: bool = False,
) -> None:
    """Make an ACT adapter from two checkpoints on disk.

        delta[i, :] = λ * (W_donor[i, :] - W_base[i, :])          for every selected channel i

    (arXiv 2601.09398, the transfer step.) The folder holds the same bytes as that of

        get_peft_model(base, ActConfig(channels=mask, donor=donor, transfer_scale=λ, task_type="CAUSAL_LM"))

    after `save_pretrained`. The modules are known from the base's `config.json`; of both checkpoints only the selected
    rows are read (the columns of embeddings and Conv1D lie apart: those tensors are read whole, piece by piece).

    Args:
        base: folder or Hub id of the base's checkpoint, in safetensors.
        donor: folder or Hub id of the donor's.
        mask: the selected channels, as in `ActConfig(channels=...)`.
        output_dir: the folder to write. It appears whole or not at all.
        transfer_scale: λ.
        overwrite: whether an older adapter at `output_dir` is replaced.

    Raises:
        ActValueError, ActTypeError: no or damaged checkpoint; channels that do not fit the base; a donor of another
            architecture, vocabulary or shape, or with selected weights that are not finite or quantised; an output
            that exists or lies inside an input; no room on the disk. Nothing is written then.

    Warns:
        ActWarning: once, if rotary base or context length differ or the weights look unrelated.
    """
    output = Path(os.path.abspath(output_dir))
    settings = ActConfig(
        channels=mask,
        donor=os.fspath(donor),
        transfer_scale=transfer_scale,
        task_type="CAUSAL_LM",
        inference_mode=True,
    )
    with Checkpoint.open(base) as mine, Checkpoint.open(donor) as theirs:
        check_output(output, [mine.folder, theirs.folder], overwrite=overwrite)
        base_config, donor_config = load_config(mine), load_config(theirs)
        notes = check_configs(base_config, donor_config)
        skeleton = build_skeleton(base_config)
        parameters = {n: list(p.shape) for n, p in skeleton.named_parameters(remove_duplicate=False)}
        keys = _find_keys(mine, parameters, tied_weights(base_config))
        donor_keys = _find_keys(theirs, parameters, tied_weights(donor_config))
        indices = plan_channels(settings, skeleton, None)
        _check_shapes(skeleton, mine, keys, theirs, donor_keys, targets=indices)
        tensors, settings.adapted_modules, resemblance = _transfer(
            skeleton, indices, mine, keys, theirs, donor_keys, settings
        )
    settings.base_model_name_or_path = skeleton.name_or_path
    if isinstance(settings.channels, ChannelMask):
        selected = sum(index.numel() for index in indices.values())
        settings.density = selected / sum(settings.channels.num_channels.values())
    resemblance.warn(notes, stacklevel=2)
    check_room(output, sum(t.numel() * t.element_size() for t in tensors.values()) + (1 << 20))
    with new_folder(output) as folder:
        _CardWriter(skeleton, settings).create_or_update_model_card(str(folder))
        save_file(tensors, folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
        settings.save_pretrained(str(folder))


class _CardWriter(PeftModelForCausalLM):
    """As much of a PEFT model as PEFT's own model card asks for."""

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


def _find_keys(checkpoint: Checkpoint, names: Iterable[str], tied: Mapping[str, str]) -> dict[str, str]:
    """Parameter name -> key in the checkpoint, for those that it has; tied ones have the key of their partner."""
    names = list(names)
    change = prefix_change(names, checkpoint.names)
    keys = {name: key for name in names if (key := key_for(name, change)) in checkpoint}
    for one, other in [*tied.items(), *((b, a) for a, b in tied.items())]:
        if one in names and one not in keys and other in keys:
            keys[one] = keys[other]
    return keys


def _check_shapes(
    skeleton: PreTrainedModel,
    base: Checkpoint,
    base_keys: Mapping[str, str],
    donor: Checkpoint,
    donor_keys: Mapping[str, str],
    *,
    targets: Mapping[str, torch.Tensor],
) -> None:
    """Check that base, its configuration and the donor have the same tensors."""
    parameters = {n: list(p.shape) for n, p in skeleton.named_parameters(remove_duplicate=False)}
    mine = {name: list(base.shape(key)) for name, key in base_keys.items()}
    theirs = {name: list(donor.shape(key)) for name, key in donor_keys.items()}
    for name in parameters:
        if name not in mine and name.rpartition(".")[0] in targets:
            base.file_of(name)  # raises, and says what is missing
        if name in mine and mine[name] != parameters[name]:
            raise ActValueError(
                f"{base.location}: {base_keys[name]} has shape {mine[name]}, expected {parameters[name]} by its "
                "config.json (the checkpoint is damaged)"
            )
    theirs |= _surplus(donor, parameters, donor_keys)
    check_shapes(mine, theirs, donor_name=str(donor.location))


def _surplus(donor: Checkpoint, parameters: Mapping[str, Any], donor_keys: Mapping[str, str]) -> dict[str, list[int]]:
    """Weights and biases of the donor that the base should have too: more layers, a bias where it has none.

    Other surplus tensors (buffers of old versions, the other parts of a multimodal model) do not matter.
    """
    old, new = prefix_change(list(parameters), donor.names)
    used = set(donor_keys.values())
    modules = {re.sub(r"\.\d+\.", ".#.", name.rpartition(".")[0]) for name in parameters}
    surplus = {}
    for key in donor.names:
        if key in used or not key.startswith(new):
            continue
        name = old + key.removeprefix(new)
        module, _, part = name.rpartition(".")
        if part in ("weight", "bias") and re.sub(r"\.\d+\.", ".#.", module) in modules and name not in parameters:
            surplus[name] = list(donor.shape(key))
    return surplus


def _transfer(
    skeleton: PreTrainedModel,
    indices: Mapping[str, torch.Tensor],
    base: Checkpoint,
    base_keys: Mapping[str, str],
    donor: Checkpoint,
    donor_keys: Mapping[str, str],
    settings: ActConfig,
) -> tuple[dict[str, torch.Tensor], dict[str, Any], Resemblance]:
    """The adapter's tensors, what its configuration records, and how alike the selected weights are."""
    tensors: dict[str, torch.Tensor] = {}
    records: dict[str, Any] = {}
    resemblance = Resemblance()
    for name, index in indices.items():
        kind = kind_of(skeleton.get_submodule(name))
        rows = {}
        for part, dim in (("weight", kind.channel_dim), ("bias", 0)):
            parameter = f"{name}.{part}"
            if parameter not in base_keys:
                continue
            mine = _plain_rows(base, base_keys[parameter], index, dim)
            theirs = _plain_rows(donor, donor_keys[parameter], index, dim)
            resemblance.add_(name, mine, theirs)
            delta = scaled_difference(theirs, mine, settings.transfer_scale)
            tensors[f"base_model.model.{name}.{PREFIX}{part}"] = delta.to(wide_dtype(mine.dtype)).contiguous()
            rows[part] = mine
        tensors[f"base_model.model.{name}.{PREFIX}index"] = index
        records[name] = module_record(
            kind,
            selected=index.numel(),
            channels=base.shape(base_keys[f"{name}.weight"])[kind.channel_dim],
            base=fingerprint(rows["weight"], rows.get("bias")),
        )
    return tensors, records, resemblance


def _plain_rows(checkpoint: Checkpoint, key: str, index: torch.Tensor, dim: int) -> torch.Tensor:
    info = checkpoint.info(key)
    if not info.is_plain:
        raise ActValueError(
            f"{checkpoint.location}: {key} is {info.dtype}, expected F64, F32, F16 or BF16 (the checkpoint is "
            "quantised: take the original one)"
        )
    return checkpoint.rows(key, index, dim)
