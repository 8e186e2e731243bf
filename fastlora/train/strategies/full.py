"""Full fine-tuning: every weight is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from fastlora.train.models import Loaded
from fastlora.train.refusal import Refusal
from fastlora.train.strategies.base import Strategy, load_state, trained_state


class Full(Strategy):
    """Train the whole model; the result is a plain checkpoint of transformers."""

    name = "full"
    learning_rate = 5e-5
    freezes = False
    mergeable = True

    def apply(self, loaded: Loaded, task_type: str, seed: int) -> nn.Module:
        """Let every parameter require a gradient."""
        self.take()
        model: nn.Module = loaded.model
        return model.requires_grad_(True)

    def save(self, model: Any, directory: Path) -> None:
        """Write a checkpoint that transformers loads; of other models, the tensors."""
        if hasattr(model, "save_pretrained"):
            model.save_pretrained(directory)
        else:
            super().save(model, directory)

    def load(self, model: Any, directory: Path) -> None:
        """Read what `save` wrote."""
        if not hasattr(model, "save_pretrained"):
            return super().load(model, directory)
        try:
            saved = type(model).from_pretrained(directory, dtype=model.dtype)
        except (OSError, ValueError) as error:
            raise Refusal(f"the checkpoint {directory} can't be loaded: {error}") from error
        load_state(model, trained_state(saved.to(model.device)))


STRATEGY = Full
