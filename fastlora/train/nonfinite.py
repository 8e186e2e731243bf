"""Steps whose loss or gradient is not finite: skipped, counted, and in the end fatal."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Diverged(RuntimeError):
    """Too many steps in a row were not finite; the message names step, batch, layer and rate."""


class Watch:
    """Counts steps that are not finite.

    Attributes:
        batch: the inputs of the last step.
        places: where its rows stand in the data.
        skipped: how many steps were skipped in all.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.batch: dict[str, Any] = {}
        self.places: list[str] = []
        self.skipped = 0
        self._in_a_row = 0
        self._since_log = 0

    def see(self, fine: bool, step: int, rate: float, model: nn.Module) -> None:
        """Count a step; one that is not fine loses its gradients, so that nothing changes.

        Raises:
            Diverged: it is the last of too many in a row.
        """
        if fine:
            self._in_a_row = 0
            return
        self.skipped += 1
        self._since_log += 1
        self._in_a_row += 1
        if self._in_a_row >= self.limit:
            raise Diverged(
                f"training stopped at step {step} after {self._in_a_row} steps in a row whose loss"
                f" or gradient was not finite: first in {culprit(model, self.batch)}, batch"
                f" {', '.join(self.places[:8])}, learning rate {rate:g}; lower the learning rate,"
                " or look at these rows"
            )
        for parameter in model.parameters():
            parameter.grad = None

    def take_skipped(self) -> int:
        """Return how many steps were skipped since this was last asked."""
        count, self._since_log = self._since_log, 0
        return count


def culprit(model: nn.Module, batch: dict[str, Any]) -> str:
    """Return the first layer whose output is not finite for a batch, or whose gradient is not."""
    found: list[str] = []
    handles = []

    def hook(name: str) -> Any:
        def look(module: nn.Module, inputs: Any, output: Any) -> None:
            first = output[0] if isinstance(output, tuple) and output else output
            floats = isinstance(first, Tensor) and first.is_floating_point() and not found
            if floats and not bool(torch.isfinite(first).all()):
                found.append(f"the output of {name} ({type(module).__name__})")

        return look

    for name, module in model.named_modules():
        if name and not any(True for _ in module.children()):
            handles.append(module.register_forward_hook(hook(name)))
    try:
        with torch.no_grad():
            model(**batch)
    finally:
        for handle in handles:
            handle.remove()
    if found:
        return found[0]
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and not bool(torch.isfinite(parameter.grad).all()):
            return f"the gradient of {name}"
    return "the loss"
