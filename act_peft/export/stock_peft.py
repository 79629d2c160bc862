"""What PEFT makes of a LoRA adapter: it is loaded into a model without data, before anything is written.

For some model types PEFT renames targets and tensors to those of fused experts, also where they belong to dense or
shared layers. Such factors would be lost without an error.
"""

from __future__ import annotations

import copy
import warnings

import torch
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from transformers import PreTrainedModel

from act_peft.channels.kinds import channel_kind, num_channels
from act_peft.disk.writing import TensorInfos
from act_peft.errors import ActValueError
from act_peft.export.config import module_of
from act_peft.export.targets import listed


def check_with_peft(config: LoraConfig, infos: TensorInfos, skeleton: PreTrainedModel) -> None:
    """Check that PEFT finds a place for every tensor, and a tensor for every place.

    Args:
        config: the adapter's configuration.
        infos: key -> dtype and shape of its tensors.
        skeleton: the base on the meta device; it is used up.

    Raises:
        ActValueError: it does not.
    """
    if not _fits(infos, skeleton):
        return
    tensors = {key: torch.empty(shape, dtype=dtype, device="meta") for key, (dtype, shape) in infos.items()}
    reason = "it takes them for parts of fused experts"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = get_peft_model(skeleton, copy.deepcopy(config), low_cpu_mem_usage=True)
            result = set_peft_model_state_dict(model, tensors, low_cpu_mem_usage=True)
        missing = [key for key in result.missing_keys if ".lora_" in key]
        lost = sorted({module_of(key) for key in (*result.unexpected_keys, *missing)})
        known = [name for name in lost if name in {module_of(key) for key in infos}]
        lost = known or lost
    except Exception as error:  # PEFT and transformers refuse in many ways
        reason = " ".join(str(error).split())[:300]
        modules = sorted({module_of(key) for key in infos})
        lost = [name for name in modules if name.rpartition(".")[2] in reason] or modules
    if lost:
        raise ActValueError(
            f"{listed(lost)}: PEFT cannot load factors of these modules of a {type(skeleton).__name__} ({reason}), "
            "expected modules that it can (merge the adapter with merge_checkpoint or merge_and_unload, make it "
            "without these modules, or name an engine that loads them as they are, such as target='vllm')"
        )


def _fits(infos: TensorInfos, skeleton: PreTrainedModel) -> bool:
    """Whether the skeleton has the adapter's modules in their shapes: a user's model may differ from its config."""
    for key, (_, shape) in infos.items():
        try:
            module = skeleton.get_submodule(module_of(key))
        except AttributeError:
            return False
        if ".lora_B.weight" in key and channel_kind(module) is not None and shape[0] != num_channels(module):
            return False
        own = getattr(module, key.rpartition(".")[2], None)
        # A whole embedding of a base with another number of tokens, which is resized before it gets the adapter.
        if "lora_" not in key and "token_adapter.trainable" not in key and own is not None and own.shape != shape:
            return False
    return True
