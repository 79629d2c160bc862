"""Private names of other libraries: `act_peft/doors.py` is the one place that imports them, and they still exist.

If a test here fails with a new version of a library, its message names the line of act_peft that needs the name.
"""

from __future__ import annotations

import ast
import copy
import importlib
import importlib.util
import inspect
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import peft.utils
import pytest
import torch
import trl
from accelerate.optimizer import AcceleratedOptimizer
from huggingface_hub import constants as hub_constants
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM

import act_peft.doors
from act_peft import ActConfig, ActModel
from act_peft.doors import (
    COMPILED,
    DENSITY_WARNING,
    HAS_ADAPTERS,
    MISSING_WARNING,
    OUTER,
    READS_FILES,
    REFERENCE,
    is_read_by_mamba_kernel,
    merge_utils,
)
from act_peft.layers import ActLayer, Linear

PACKAGE = Path(act_peft.doors.__file__).parent
DOORS = {"act_peft.doors": PACKAGE / "doors.py", "act_peft.disk.rules": PACKAGE / "disk" / "rules.py"}
LIBRARIES = ("accelerate", "bitsandbytes", "datasets", "huggingface_hub", "peft", "safetensors", "torchao")
LIBRARIES += ("transformers", "trl")
# The documented modules of these libraries, each with its names; None: all names without an underscore.
PUBLIC: dict[str, set[str] | None] = {
    **dict.fromkeys(LIBRARIES),
    "datasets.exceptions": None,
    "huggingface_hub.errors": None,
    "peft.tuners.tuners_utils": {"BaseTuner", "BaseTunerLayer"},
    "peft.utils": set(peft.utils.__all__),
    "safetensors.torch": None,
    "torchao.quantization": {"Int8WeightOnlyConfig", "quantize_"},
    "transformers.utils": {"ModelOutput", "logging"},
}
# The methods that PEFT calls on these classes, and that they override.
HOOKS = {
    (ActModel, BaseTuner): {
        "inject_adapter",
        "delete_adapter",
        "merge_adapter",
        "unmerge_adapter",
        "_cast_adapter_dtype",
        "_check_target_module_exists",
        "_create_and_replace",
        "_get_adapter_state_dict",
        "_load_from_state_dict",
        "_prepare_adapter_config",
        "_remap_adapter_state_dict_for_load",
        "_replace_module",
        "_unload_and_optionally_merge",
    },
    (Linear, BaseTunerLayer): {
        "delete_adapter",
        "merge",
        "set_adapter",
        "set_requires_grad",
        "supports_lora_conversion",
        "unmerge",
        "_move_adapter_to_device_of_base_layer",
    },
    (ActConfig, PeftConfig): {"from_json_file", "from_pretrained", "save_pretrained", "to_dict"},
    (ActLayer, nn.Module): {"forward", "_apply", "_load_from_state_dict"},
}
HELD_BY_WRAPPERS = ("active_adapters", "disable_adapters", "enable_adapters", "modules_to_save", "original_module")


# ---------------------------------------------------------------------------------------------------- who imports ---


def imported_names(path: Path) -> Iterator[tuple[int, str, str]]:
    """Line, module and name of every import of a file; the name is empty for `import module`."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and not node.level:
            yield from ((alias.lineno, node.module or "", alias.name) for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from ((alias.lineno, alias.name, "") for alias in node.names)


def is_private(module: str, name: str) -> bool:
    library = module.partition(".")[0]
    if any(part.startswith("_") for part in (*module.split("."), name)):
        return library in (*LIBRARIES, "torch")
    if library not in LIBRARIES:
        return False
    if module not in PUBLIC:
        return True
    names = PUBLIC[module]
    if names is None:  # a submodule is documented only if it is listed
        is_package = hasattr(importlib.import_module(module), "__path__")
        return bool(name) and is_package and importlib.util.find_spec(f"{module}.{name}") is not None
    return bool(name) and name not in names


def test_private_names_come_through_the_door():
    for path in PACKAGE.rglob("*.py"):
        for line, module, name in imported_names(path) if path not in DOORS.values() else ():
            assert not is_private(module, name), (
                f"{path.relative_to(PACKAGE.parent)}:{line} imports {name or module} of {module}, which is private or "
                "undocumented: import it in act_peft/doors.py with a reason and take it from there (or add its "
                "documented module to PUBLIC in this file)"
            )


@pytest.mark.parametrize("door", DOORS)
def test_what_comes_through_the_door_is_needed_and_has_a_reason(door):
    taken = {n for p in PACKAGE.rglob("*.py") for _, module, n in imported_names(p) if module == door}
    where = DOORS[door].relative_to(PACKAGE.parent)
    assert taken == set(importlib.import_module(door).__all__), f"{where}: __all__ and what other files take differ"
    lines = DOORS[door].read_text(encoding="utf-8").splitlines()
    for line, module, name in imported_names(DOORS[door]):
        if module.partition(".")[0] in LIBRARIES:
            what = f"{where}:{line}: {name or module}"
            assert "  # " in lines[line - 1], f"{what} has no reason, expected one as a comment in its line"
            assert is_private(module, name), f"{what} is public, expected an import where it is needed"


# ---------------------------------------------------------------------------------------------------------- hooks ---


def place(function: object) -> str:
    function = inspect.unwrap(getattr(function, "__func__", function))
    path = Path(inspect.getsourcefile(function)).relative_to(PACKAGE.parent)
    return f"{path}:{inspect.getsourcelines(function)[1]}"


def parameters(function: object) -> list[tuple[str, object]]:
    found = inspect.signature(function).parameters.values()
    return [(p.name, p.default) for p in found if p.name != "self" and p.kind < p.VAR_POSITIONAL] + [
        (p.name, p.default) for p in found if p.kind is p.KEYWORD_ONLY
    ]


def is_open(function: object) -> bool:
    return any(p.kind is p.VAR_POSITIONAL for p in inspect.signature(function).parameters.values())


@pytest.mark.parametrize(
    ("ours", "theirs", "name"),
    [
        pytest.param(*classes, name, id=f"{classes[1].__name__}.{name}")
        for classes, names in HOOKS.items()
        for name in sorted(names)
    ],
)
def test_a_hook_is_still_there_with_the_same_parameters(ours, theirs, name):
    mine = getattr(ours, name)
    assert hasattr(theirs, name), (
        f"{place(mine)} overrides {theirs.__name__}.{name}, which no longer exists: find what is called in its place"
    )
    if theirs is nn.Module and name == "forward":
        return
    expected, got = parameters(getattr(theirs, name)), parameters(mine)
    if is_open(mine):  # it hands on all that it does not name
        expected = expected[: len(got)]
    assert got == expected, (
        f"{place(mine)} overrides {theirs.__name__}.{name}, whose parameters are now "
        f"{inspect.signature(getattr(theirs, name))}: read what changed and give the override the same ones"
    )


@pytest.mark.parametrize(("ours", "theirs"), [c for c in HOOKS if c[1] is not nn.Module], ids=str)
def test_every_overridden_method_is_in_the_list(ours, theirs):
    own = {n for c in ours.__mro__ if c.__module__.startswith("act_peft") for n, v in vars(c).items() if callable(v)}
    own |= {n for n, v in vars(ours).items() if isinstance(v, (classmethod, staticmethod))}
    overridden = {n for n in own if not n.startswith("__") and callable(getattr(theirs, n, None))}
    missing = overridden - HOOKS[ours, theirs]
    assert not missing, f"{place(getattr(ours, min(missing)))}: add {sorted(missing)} to HOOKS in this file"


def test_peft_asks_the_tuner_for_forward_hooks_and_ddp_for_what_it_ignores():
    assert "base_model._enable_peft_forward_hooks" in inspect.getsource(PeftModel._enable_peft_forward_hooks), (
        f"{place(ActModel._enable_peft_forward_hooks)} is no longer called by PeftModel: it would ignore names"
    )
    ignored = "_ddp_params_and_buffers_to_ignore"
    assert ignored in inspect.getsource(DistributedDataParallel), (
        f"{places(ignored)}: DistributedDataParallel no longer asks for it: offloaded deltas would be moved"
    )


# ----------------------------------------------------------------------------------------------------- attributes ---


def places(text: str) -> str:
    """Where act_peft uses a name, as `file:line`."""
    found = [
        f"{path.relative_to(PACKAGE.parent)}:{number}"
        for path in sorted(PACKAGE.rglob("*.py"))
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if text in line
    ]
    assert found, f"act_peft no longer uses {text}: remove it from this test"
    return ", ".join(found)


def changed(text: str) -> str:
    """The message for a test of what the library does at the lines with this text."""
    return f"{places(text)}: the library changed what this line needs. Find the new name or form and change the line"


@pytest.mark.parametrize("name", ["_active_adapter", "_disable_adapters", "_cast_input_dtype", "_get_embed_scale"])
def test_private_members_of_peft_layers(name):
    assert hasattr(BaseTunerLayer, name), f"{places(name)}: BaseTunerLayer has no {name} any more"


def test_members_of_the_wrappers_of_whole_modules():
    wrapper = ModulesToSaveWrapper(nn.Linear(2, 2), "default")
    for name in HELD_BY_WRAPPERS:
        assert hasattr(wrapper, name), f"{places(name)}: PEFT's ModulesToSaveWrapper has no {name} any more"
    assert list(inspect.signature(wrapper.adapter_state_dict).parameters) == ["adapter_name", "state_dict"], changed(
        "adapter_state_dict"
    )
    assert isinstance(wrapper, AuxiliaryTrainingWrapper)


@pytest.mark.parametrize("name", ["step_was_skipped", "scaler"])
def test_attributes_of_accelerate_that_are_read_with_a_default(name):
    source, quoted = inspect.getsource(AcceleratedOptimizer), f'optimizer, "{name}"'
    assert re.search(rf"def {name}\(self\)|self\.{name} = ", source), (
        f"{places(quoted)}: accelerate's optimizer has no {name} any more, and the check there is "
        "silently without effect: find the new name"
    )


def test_trl_names_its_reference_adapter():
    source = (Path(trl.__file__).parent / "trainer" / "dpo_trainer.py").read_text(encoding="utf-8")
    assert re.search(rf'add_adapter\(\s*"{REFERENCE}"', source), (
        f"{places('REFERENCE, POLICY =')}: TRL no longer adds an adapter {REFERENCE!r}; put its new name there, or "
        "the reference model starts from zero"
    )


def test_bitsandbytes_classes_and_attributes():
    bnb = pytest.importorskip("bitsandbytes")
    where = changed("_FORMS = {")
    eight = bnb.nn.Int8Params(torch.randn(4, 4), requires_grad=False)
    assert [type(eight).__name__, hasattr(eight, "SCB"), hasattr(eight, "CB")] == ["Int8Params", True, True], where
    assert "has_fp16_weights" in inspect.signature(type(eight).__new__).parameters, where
    four = set(inspect.signature(bnb.nn.Params4bit.__new__).parameters)
    assert four >= {"blocksize", "compress_statistics", "quant_type", "quant_storage", "module"}, where
    state = bnb.functional.QuantState(torch.ones(1))
    assert all(hasattr(state, name) for name in ("absmax", "nested", "offset", "state2")), where
    assert callable(bnb.MatmulLtState.reset_grads), where
    modules = Path(inspect.getsourcefile(bnb.nn.Linear4bit)).read_text(encoding="utf-8")
    assert "packing_format_for_cpu" in modules, changed("packing_format_for_cpu")


def test_torchao_class_and_attributes():
    quantization = pytest.importorskip("torchao.quantization")
    layer = nn.Linear(4, 4, bias=False)
    quantization.quantize_(layer, quantization.Int8WeightOnlyConfig())
    weight = layer.weight
    assert type(weight).__name__ == "Int8Tensor", changed('"Int8Tensor"')
    assert list(weight.block_size) == [1, 4], changed("weight.block_size")
    assert weight.act_quant_kwargs is None, changed("act_quant_kwargs")


def test_private_members_of_transformers_and_the_hub():
    assert isinstance(LlamaForCausalLM._tied_weights_keys, dict), changed("_tied_weights_keys")
    assert hasattr(LlamaConfig(), "_name_or_path"), changed("config._name_or_path")
    assert isinstance(hub_constants.HF_HUB_OFFLINE, bool), changed("HF_HUB_OFFLINE")


# ----------------------------------------------------------------------------------------------------------- texts ---


def test_the_warning_of_pefts_pruning():
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        merge_utils.prune(torch.ones(2), 1.0, "magnitude")
    assert [str(w.message).startswith(DENSITY_WARNING) for w in found] == [True], changed("DENSITY_WARNING = ")


def test_the_warning_of_peft_about_tensors_that_a_file_lacks(tmp_path):
    base = nn.Sequential(nn.Linear(2, 2))
    get_peft_model(copy.deepcopy(base), LoraConfig(target_modules=["0"])).save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    save_file({name: value for name, value in load_file(path).items() if "lora_A" in name}, path)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        PeftModel.from_pretrained(base, str(tmp_path))
    assert any(str(w.message).startswith(MISSING_WARNING) for w in found), changed("MISSING_WARNING = ")


def test_transformers_reads_adapters_by_a_method_of_the_model():
    source = inspect.getsource(LlamaForCausalLM.load_adapter)
    assert f"self.{READS_FILES}(" in source, changed("READS_FILES = ")
    assert "checkpoint_files=checkpoint_files" in source, changed("checkpoint_files: Any = None")
    assert hasattr(LlamaForCausalLM, HAS_ADAPTERS), changed("HAS_ADAPTERS = ")


def test_prefixes_of_names():
    tuned = get_peft_model(nn.Sequential(nn.Linear(2, 2)), LoraConfig(target_modules=["0"]))
    assert all(name.startswith(OUTER) for name in tuned.state_dict()), changed("OUTER = ")
    assert all(name.startswith(COMPILED) for name in torch.compile(nn.Linear(2, 2), backend="eager").state_dict()), (
        changed("COMPILED = ")
    )


def test_peft_knows_the_models_with_fused_mamba_kernels():
    def answer(model_type, name):
        model = nn.Module()
        model.config = SimpleNamespace(model_type=model_type)
        return is_read_by_mamba_kernel(model, name)

    where = changed("def is_read_by_mamba_kernel")
    assert [answer("mamba", "out_proj"), answer("mamba", "in_proj"), answer("llama", "out_proj")] == [1, 0, 0], where
    assert not is_read_by_mamba_kernel(nn.Module(), "out_proj"), where
