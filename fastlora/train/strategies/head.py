"""Feature extraction: the base is frozen, and only the new final layer is trained."""

from __future__ import annotations

from torch import nn

from fastlora.train.models import Loaded
from fastlora.train.refusal import Refusal
from fastlora.train.strategies.base import Strategy, only


class Head(Strategy):
    """Train only the final layer that was made for the task."""

    name = "head"
    learning_rate = 1e-3
    mergeable = True

    def apply(self, loaded: Loaded, task_type: str, seed: int) -> nn.Module:
        """Let only the final layer require a gradient."""
        self.take()
        if not loaded.head:
            raise Refusal(
                "method head trains the final layer that a task makes anew, but this task keeps the"
                " model's own; choose another method"
            )
        only(loaded.model, loaded.head)
        model: nn.Module = loaded.model
        return model


STRATEGY = Head
