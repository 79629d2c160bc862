"""The models of a recipe."""

from __future__ import annotations

from typing import Any

from peft import PeftModel

from act_peft.data.models import load_adapter, load_model
from act_peft.recipes.schema import Recipe
from act_peft.transfer.donors import is_adapter


class Models:
    """Loads the base and the donors of a recipe, each time anew.

    Args:
        recipe: the recipe.
        device: where the models are put.
    """

    def __init__(self, recipe: Recipe, device: str) -> None:
        self.recipe, self.device = recipe, device

    def load(self, name: str) -> Any:
        """A model of this name."""
        return load_model(name, dtype=self.recipe.dtype, device=self.device)

    def base(self) -> Any:
        """The base."""
        return self.load(self.recipe.base)

    def donor(self, name: str) -> Any:
        """A donor for this library: a model, or the name of an adapter."""
        return name if is_adapter(name) else self.load(name)

    def whole_donor(self, name: str) -> Any:
        """A donor as a model that runs by itself."""
        return self.adapted(name) if is_adapter(name) else self.load(name)

    def adapted(self, folder: str, *, trainable: bool = False) -> PeftModel:
        """The base with an adapter."""
        return load_adapter(self.base(), folder, trainable=trainable)
