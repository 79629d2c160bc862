"""Models and tokenizers by name, on a device."""

from __future__ import annotations

import os
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from act_peft.data.failures import reason_of
from act_peft.errors import ActError, ActValueError


def open_device(name: str | None) -> str:
    """The name of a device that can be used; None stands for the GPU if there is one.

    Raises:
        ActValueError: there is no such device here.
    """
    if name is None:
        # Of several processes on one machine each takes its own GPU.
        return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=name).item()
    except (AssertionError, RuntimeError) as error:  # an assertion: torch was built without support for the device
        raise ActValueError(
            f"device: got {name!r}, expected one that torch can use here ({str(error)[:120]}; try --device cpu)"
        ) from error
    return name


def load_model(name: str, *, dtype: str = "auto", device: str = "cpu") -> Any:
    """Load a causal language model.

    Args:
        name: folder or Hub id.
        dtype: name of a floating dtype; `auto` is that of the checkpoint.
        device: the device.

    Raises:
        ActValueError: there is no model of this name.
    """
    _check_place(name, "a model")
    try:
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, trust_remote_code=False)
    except Exception as error:  # damaged files fail anywhere inside transformers
        raise ActValueError(
            f"{name}: cannot be loaded, expected the folder or Hub id of a causal language model ({reason_of(error)})"
        ) from error
    return model.to(device)


def load_adapter(model: Any, name: str, *, trainable: bool = False) -> PeftModel:
    """Put an adapter on a model.

    Args:
        model: its base.
        name: folder or Hub id of the adapter.
        trainable: whether it will train.

    Raises:
        ActValueError: there is no adapter of this name, or PEFT refuses it.
    """
    _check_place(name, "an adapter")
    try:
        return PeftModel.from_pretrained(model, name, is_trainable=trainable)
    except ActError:
        raise
    except Exception as error:  # damaged files fail anywhere inside PEFT
        raise ActValueError(
            f"{name}: cannot be loaded, expected the folder or Hub id of an adapter ({reason_of(error)})"
        ) from error


def _check_place(name: str, what: str) -> None:
    """Check, without asking the Hub, that a name which can only be a path is there.

    Raises:
        ActValueError: it is not.
    """
    is_path = os.path.isabs(name) or name[:1] in (".", "~") or name.count("/") > 1
    if is_path and not os.path.isdir(name):
        raise ActValueError(f"{name}: there is no such folder, expected {what} (check the path)")


def load_tokenizer(name: str) -> Any:
    """Load the tokenizer of a model.

    Raises:
        ActValueError: there is none.
    """
    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # damaged files fail anywhere inside transformers
        raise ActValueError(
            f"{name}: its tokenizer cannot be loaded, expected one in the folder of the model "
            f"({reason_of(error)}; save it there)"
        ) from error
