"""`PeftModel.save_pretrained` and `push_to_hub` of a model with ACT adapters: whole or not at all, with card and twin.

PEFT writes card, tensors and configuration one after the other into the folder itself, and asks the method for nothing
before the tensors are there. So its method is replaced by one that lets it write into a hidden folder first. Models
without an ACT adapter are saved as before. `push_to_hub` saves, and then writes the Hub's template over our card: it
gets a method that adds our section again before the upload.
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from peft import PeftModel
from peft.utils import CONFIG_NAME

from act_peft.adapter.card import write_model_card
from act_peft.adapter.config import ActConfig
from act_peft.checks import yes_or_no
from act_peft.disk.update import updated_folder
from act_peft.export.twin import check_twins, remove_twin, write_twin

_CARD = "README.md"
_TWIN = "lora_twin"  # the argument that PEFT does not have
_MARK = "saves_whole_folders"


def save_whole_folders_() -> None:
    """Replace `PeftModel.save_pretrained`. A second call is harmless, also after a reload of the library."""
    for name, wrapped in (("save_pretrained", _saving), ("push_to_hub", _pushing)):
        method = getattr(PeftModel, name)
        setattr(PeftModel, name, wrapped(getattr(method, _MARK, method)))


def _saving(method: Callable[..., None]) -> Callable[..., None]:
    signature = inspect.signature(method)

    @functools.wraps(method)
    def save_pretrained(self: PeftModel, *args: Any, **kwargs: Any) -> None:
        given = signature.bind(self, *args, **kwargs)
        folder = given.arguments["save_directory"]
        names = [name for name, config in self.peft_config.items() if isinstance(config, ActConfig)]
        saved = list(self.peft_config if (chosen := given.arguments.get("selected_adapters")) is None else chosen)
        ours = {name: self.peft_config[name] for name in saved if name in names}
        if ours and _TWIN in given.arguments.get("kwargs", {}):
            wanted = yes_or_no(given.arguments["kwargs"].pop(_TWIN), _TWIN)
            for config in ours.values():
                config.lora_twin = wanted
        twins = [name for name, config in ours.items() if config.lora_twin]
        check_twins(saved, twins)
        if not names or not given.arguments.get("is_main_process", True) or os.path.isfile(folder):
            method(*given.args, **given.kwargs)
            return
        cards = [_CARD, *(f"{name}/{_CARD}" for name in self.peft_config if name != "default")]
        with updated_folder(folder, read=cards, last=CONFIG_NAME) as hidden:
            given.arguments["save_directory"] = os.fspath(hidden)
            method(*given.args, **given.kwargs)
            for name in twins:
                write_twin(self, hidden, name)
        for name in ours:
            if name not in twins:
                remove_twin(Path(folder), name)

    setattr(save_pretrained, _MARK, method)
    return save_pretrained


def _pushing(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def push_to_hub(self: PeftModel, *args: Any, **kwargs: Any) -> Any:
        config = self.peft_config.get("default")
        if not isinstance(config, ActConfig):
            return method(self, *args, **kwargs)
        upload = self._upload_modified_files

        def with_card(folder: str, *more: Any, **others: Any) -> Any:
            write_model_card(folder, config.to_dict())
            return upload(folder, *more, **others)

        vars(self)["_upload_modified_files"] = with_card
        try:
            return method(self, *args, **kwargs)
        finally:
            vars(self).pop("_upload_modified_files", None)

    setattr(push_to_hub, _MARK, method)
    return push_to_hub
