"""Private and undocumented names of other libraries. Every file that needs one imports it from here.

A new version of a library may change or remove such a name. `tests/test_doors.py` then names the line. It also checks
the hooks of PEFT that act_peft overrides and the attributes that it reads. Public names do not belong here: import
them from their public place.
"""

from __future__ import annotations

from types import SimpleNamespace

import huggingface_hub.constants as hub_constants  # HF_HUB_OFFLINE: the variable is read at import only
from accelerate.utils import (
    align_module_device,  # brings the parameters of a module in that are kept in CPU memory or on the disk
    has_offloaded_params,  # whether they are
)
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING  # a second registration has to remove the entry of the first
from peft.tuners._buffer_dict import BufferDict  # a tensor for each adapter that PEFT saves, moves and deletes
from peft.tuners.lora import LoraLayer  # the factors of an adapter in a layer, for what fills them
from peft.tuners.trainable_tokens import TrainableTokensLayer  # the rows of tokens, for what fills them
from peft.tuners.tuners_utils import (
    _check_lora_target_modules_mamba,  # the only place where PEFT lists the models with fused Mamba kernels
    check_adapters_to_merge,  # the names to merge, with PEFT's own warnings
    check_target_module_exists,  # the one rule of PEFT for target_modules, exclude_modules and layers_to_transform
    onload_layer,  # brings the weights of a layer in, and puts changed ones back
)
from peft.tuners.tuners_utils import (
    _maybe_include_all_linear_layers as include_all_linear_layers_,  # "all-linear" -> names; writes the configuration
)
from peft.utils import merge_utils  # the functions of TIES, DARE and magnitude pruning, and the warning below
from peft.utils.integrations import (
    dequantize_bnb_weight,  # the values of bitsandbytes' 4 bit weights on every device
    skip_init_on_device,  # creates tensors with data inside PEFT's low_cpu_mem_usage
)
from peft.utils.other import (
    EMBEDDING_LAYER_NAMES,  # names in target_modules for which PEFT saves the whole embedding
)
from torch import distributed, nn

__all__ = [
    "CHECKPOINTED",
    "COMPILED",
    "COMPILED_MODULE",
    "DENSITY_WARNING",
    "EMBEDDING_LAYER_NAMES",
    "FLATTENED",
    "HAS_ADAPTERS",
    "MISSING_WARNING",
    "OUTER",
    "PEFT_TYPE_TO_PREFIX_MAPPING",
    "POLICY",
    "READS_FILES",
    "REFERENCE",
    "BufferDict",
    "LoraLayer",
    "TrainableTokensLayer",
    "align_module_device",
    "check_adapters_to_merge",
    "check_target_module_exists",
    "default_store",
    "dequantize_bnb_weight",
    "has_offloaded_params",
    "hub_constants",
    "include_all_linear_layers_",
    "is_read_by_mamba_kernel",
    "merge_utils",
    "onload_layer",
    "skip_init_on_device",
]

OUTER = "base_model.model."  # PEFT: before the names of modules in an adapter's file and in a PeftModel's state dict
COMPILED_MODULE = "_orig_mod"  # torch.compile: the module inside its wrapper
COMPILED = f"{COMPILED_MODULE}."  # so it stands before the names of a model's modules
FLATTENED = "_fsdp_wrapped_module"  # FSDP1: the module inside its wrapper
CHECKPOINTED = "_checkpoint_wrapped_module"  # torch's activation checkpointing, as accelerate uses it: the same
HAS_ADAPTERS = "_hf_peft_config_loaded"  # transformers: a model's flag for adapters that `load_adapter` put into it
READS_FILES = "_load_pretrained_model"  # transformers: the method of a model by which `load_adapter` reads files
MISSING_WARNING = "Found missing adapter keys"  # PEFT: start of its warning about tensors that a file does not have
DENSITY_WARNING = "The density 1.0 is greater than or equal to 1"  # PEFT's merge_utils: start of a harmless warning
# TRL: its trainers add an adapter of the first name with the configuration of the second one, and expect a copy of it.
# They copy only parameters whose names go on after the adapter's name. ACT has none of these.
REFERENCE, POLICY = "ref", "default"


def default_store() -> distributed.Store | None:
    """What the processes of the default group share: text under names. None without a group, or if it has none."""
    # torch gives no public way to it, and a second store would need a port of its own.
    return distributed.distributed_c10d._get_default_store() if distributed.is_initialized() else None


def is_read_by_mamba_kernel(model: nn.Module, target_name: str) -> bool:
    """Whether a fused kernel reads the weight of a module and never calls the module.

    Args:
        model: the base model.
        target_name: last part of the module's name.
    """
    try:
        _check_lora_target_modules_mamba(SimpleNamespace(peft_type="LORA"), model, target_name)
    except ValueError:
        return True
    return False
