"""What prefix and prompt tuning have in common: PEFT's virtual tokens before a frozen base."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import peft
import torch
from torch import nn

from fastlora.train.models import Loaded
from fastlora.train.refusal import Refusal
from fastlora.train.strategies.base import Strategy
from fastlora.train.strategies.old_names import speak_old_names

_NOT_OURS = {
    "peft_type",
    "task_type",
    "inference_mode",
    "auto_mapping",
    "peft_version",
    "base_model_name_or_path",
    "revision",
    "num_transformer_submodules",
}


class PromptLearning(Strategy):
    """Freeze the base and train vectors that stand before its input.

    The section `adapter` holds the fields of PEFT's config.

    Attributes:
        config_class: PEFT's config.
    """

    config_class: ClassVar[Any]
    vision = False
    packs = False

    def __init__(self, adapter: Mapping[str, Any]) -> None:
        super().__init__(adapter)
        names = {field.name for field in dataclasses.fields(self.config_class)}
        fields = self.take(*(names - _NOT_OURS))
        count = fields.get("num_virtual_tokens", 20)
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise Refusal(f"adapter.num_virtual_tokens must be at least 1, got {count!r}")
        self.fields = {"num_virtual_tokens": count, **fields}
        self.virtual_tokens = count

    def apply(self, loaded: Loaded, task_type: str, seed: int) -> nn.Module:
        """Put PEFT's model around the base; the final layer is trained whole."""
        torch.manual_seed(seed)
        try:
            config = self.config_class(task_type=task_type, **self.fields)
            model: Any = peft.get_peft_model(loaded.model, config)
        except (TypeError, ValueError, KeyError, AttributeError, NotImplementedError) as error:
            said = " ".join(str(error).split())
            raise Refusal(f"the model can't take method {self.name}: {said}") from error
        speak_old_names(model)
        for name, parameter in model.named_parameters():
            if any(f".{head}." in f".{name}" for head in loaded.head):
                parameter.requires_grad_("original_module" not in name)
        wrapped: nn.Module = model
        return wrapped

    def save(self, model: Any, directory: Path) -> None:
        """Write PEFT's files, and the same tensors under this process's names."""
        model.save_pretrained(directory)
        super().save(model, directory)
