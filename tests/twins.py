"""Compare a patched model with PEFT's, which is made from its adapter file."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fastlora import save_adapter, unpatch


def twin(ours: nn.Module, directory: Path) -> Any:
    """Return PEFT's model with the same adapter, trainable, on the decoded base."""
    from peft import PeftModel

    save_adapter(ours, directory)
    dense = unpatch(copy.deepcopy(ours), dequantize=True)
    return PeftModel.from_pretrained(dense, str(directory), is_trainable=True)


def step(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Return y, and the gradients of x and of every parameter by its name without PEFT's parts."""
    x = x.clone().requires_grad_()
    model.zero_grad()
    y = model(x)
    y.float().square().mean().backward()
    assert x.grad is not None
    found = {"y": y.detach(), "dx": x.grad}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            plain = name.removeprefix("base_model.model.").replace(".default", "")
            found[plain.removesuffix(".weight")] = parameter.grad.clone()
    return found


def assert_same(ours: nn.Module, theirs: nn.Module, x: Tensor, tolerance: float) -> None:
    """Assert that outputs and gradients agree, relative to the largest value of each."""
    one, other = step(ours, x), step(theirs, x)
    assert one.keys() == other.keys() and len(one) > 2
    for name, value in one.items():
        size = other[name].abs().max().item()
        assert value.dtype == other[name].dtype, name
        assert (value - other[name]).abs().max() <= tolerance * size, name
