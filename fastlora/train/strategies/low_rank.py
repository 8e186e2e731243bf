"""What LoRA, DoRA, LoHa and LoKr have in common: fastlora's adapters, PEFT's files."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from torch import nn

import fastlora
from fastlora.adapters import AdapterConfig
from fastlora.linears import is_linear
from fastlora.train.models import Loaded
from fastlora.train.refusal import Refusal
from fastlora.train.strategies.base import Strategy


class LowRankStrategy(Strategy):
    """Freeze the base and train an adapter of low rank beside each linear.

    The section `adapter` holds the fields of the method's config.

    Attributes:
        config_class: fastlora's config.
        fixed: fields that the method itself sets.
    """

    config_class: ClassVar[type[AdapterConfig]]
    fixed: ClassVar[Mapping[str, Any]] = {}
    mergeable = True

    def __init__(self, adapter: Mapping[str, Any]) -> None:
        super().__init__(adapter)
        names = {field.name for field in dataclasses.fields(self.config_class)}
        fields = self.take(*(names - set(self.fixed) - {"task_type"}))
        try:
            self.config = self.config_class(
                **{"target_modules": "all-linear", **fields, **self.fixed}
            )
        except (TypeError, ValueError, NotImplementedError) as error:
            raise Refusal(f"adapter: {error}") from error

    def apply(self, loaded: Loaded, task_type: str, seed: int) -> nn.Module:
        """Add the adapters; the final layer is trained whole."""
        saved = [*(self.config.modules_to_save or ()), *loaded.head]
        config = dataclasses.replace(self.config, modules_to_save=saved or None)
        if config.all_linear:
            convolutions = convolutions_instead(loaded.model, loaded.head, config.r)
            if convolutions:
                loaded.notes.append(
                    f"the model has no linears beside its final layer: {len(convolutions)}"
                    f" convolutions get adapters, those with a side below r={config.r} do not"
                )
                config = dataclasses.replace(config, target_modules=convolutions)
                self.config = dataclasses.replace(self.config, target_modules=convolutions)
        try:
            return fastlora.patch_model(loaded.model, config, seed=seed)
        except (TypeError, ValueError, NotImplementedError) as error:
            raise Refusal(str(error)) from error

    def save(self, model: Any, directory: Path) -> None:
        """Write PEFT's files."""
        fastlora.save_adapter(model, directory, overwrite=True)

    def load(self, model: Any, directory: Path) -> None:
        """Read PEFT's files."""
        try:
            fastlora.load_adapter(model, directory)
        except (OSError, TypeError, ValueError) as error:
            raise Refusal(str(error)) from error

    def merged(self, model: Any) -> nn.Module:
        """Fold the update into dense weights."""
        return fastlora.merge(super().merged(model))


def convolutions_instead(model: nn.Module, head: list[str], r: int) -> list[str]:
    """Return the convolutions of a model that has no linear beside its head, else nothing.

    Those with a side that is smaller than the rank are left out.
    """
    inside = tuple(f"{name}." for name in head)
    body = [(n, m) for n, m in model.named_modules() if not f"{n}.".startswith(inside or ("\0",))]
    if any(is_linear(module) for _, module in body):
        return []
    kinds = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    found = [(name, module.weight) for name, module in body if isinstance(module, kinds)]
    return [name for name, weight in found if r <= min(weight.shape[0], weight[0].numel())]
