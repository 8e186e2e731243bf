"""What counts as a linear: nn.Linear, and transformers' Conv1D, which keeps W (N, K) as (K, N)."""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor, nn


def conv1d_class() -> Any:
    """Return transformers' Conv1D (GPT-2's linear); None where transformers was not imported."""
    return getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", None)


def is_conv1d(module: nn.Module) -> bool:
    """Return whether a module is a Conv1D, exactly."""
    return type(module) is conv1d_class()


def is_usual(module: nn.Module) -> bool:
    """Return whether a module is exactly an nn.Linear or a Conv1D: its forward is known."""
    return type(module) is nn.Linear or is_conv1d(module)


def is_linear(module: nn.Module) -> bool:
    """Return whether a module is an nn.Linear, of any class, swapped ones too, or a Conv1D."""
    return isinstance(module, nn.Linear) or is_conv1d(module)


def linears(model: nn.Module) -> dict[str, Any]:
    """Return every linear of a model by name."""
    return {name: module for name, module in model.named_modules() if is_linear(module)}


def sizes(linear: Any) -> tuple[int, int]:
    """Return (N, K) of a linear."""
    if is_conv1d(linear):
        return linear.nf, linear.nx
    return linear.out_features, linear.in_features


def lay_by_outputs(conv1d: Any) -> None:
    """Lay the weight of a Conv1D out as kernels read it; shape and values stay."""
    conv1d.weight.data = conv1d.weight.data.t().contiguous().t()


def by_outputs(linear: Any) -> Tensor:
    """Return the weight of a linear that is not swapped, (N, K), sharing memory."""
    weight: Tensor = linear.weight
    return weight.t() if is_conv1d(linear) else weight
