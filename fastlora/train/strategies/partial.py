"""Partial freezing: the last blocks, or named modules, and the final layer are trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from fastlora.train.models import Loaded
from fastlora.train.refusal import Refusal
from fastlora.train.strategies.base import Strategy, blocks_of, only


class Partial(Strategy):
    """Train a part of the base.

    The section `adapter` holds `blocks`, how many of the last blocks are trained (default 2), or
    `modules`, the full names of the modules that are.
    """

    name = "partial"
    learning_rate = 1e-4
    freezes = False
    mergeable = True

    def __init__(self, adapter: Mapping[str, Any]) -> None:
        super().__init__(adapter)
        fields = self.take("blocks", "modules")
        self.modules = fields.get("modules")
        self.blocks = fields.get("blocks", 2)
        if self.modules is not None and "blocks" in fields:
            raise Refusal("adapter must have blocks or modules for method partial, got both")
        if isinstance(self.blocks, bool) or not isinstance(self.blocks, int) or self.blocks < 1:
            raise Refusal(
                f"adapter.blocks must be a whole number of at least 1, got {self.blocks!r}"
            )
        if self.modules is not None and (
            not isinstance(self.modules, list) or not all(isinstance(m, str) for m in self.modules)
        ):
            raise Refusal(f"adapter.modules must be a list of names, got {self.modules!r}")

    def apply(self, loaded: Loaded, task_type: str, seed: int) -> nn.Module:
        """Let the chosen modules and the final layer require a gradient."""
        model: nn.Module = loaded.model
        names = self.modules
        if names is None:
            name, blocks = blocks_of(model)
            if self.blocks > len(blocks):
                raise Refusal(
                    f"adapter.blocks must be at most {len(blocks)}, the number of blocks in {name},"
                    f" got {self.blocks}"
                )
            names = [f"{name}.{i}" for i in range(len(blocks) - self.blocks, len(blocks))]
        known = dict(model.named_modules())
        for name in names:
            if name not in known:
                raise Refusal(
                    f"adapter.modules must name modules of the model, but none is called {name!r}"
                )
        only(model, [*names, *loaded.head])
        return model


STRATEGY = Partial
