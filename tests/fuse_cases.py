"""Models whose linears are fed the same tensor, and what a call of them gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastlora import LoHaConfig, LoKrConfig, LoraConfig, fuse_groups, ops, patch_model, sharing
from fastlora.adapters import AdapterConfig
from tests.models import fill_adapters

IDS = torch.arange(12).view(2, 6)
X = torch.randn(5, 16, generator=torch.Generator().manual_seed(3))
CONFIGS: dict[str, AdapterConfig] = {
    "lora": LoraConfig(r=3),
    "dora": LoraConfig(r=3, use_dora=True),
    "loha": LoHaConfig(r=2),
    "lokr": LoKrConfig(r=2),
    "lokr, full": LoKrConfig(r=20),
}
Forward = Callable[[Any, Tensor], Tensor]


class Three(nn.Module):
    """Three linears of one width; a test gives it its forward."""

    def __init__(self, run: Forward) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(16, 8), nn.Linear(16, 4, bias=False), nn.Linear(16, 8)
        self.run = run

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


class Outer(nn.Module):
    """A module that calls its parts one after the other."""

    def __init__(self, *parts: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([part(x) for part in self.parts], -1)


def joined(m: Any, x: Tensor) -> Tensor:
    return torch.cat([m.q(x), m.k(x), m.v(x)], -1)


def model_of(
    run: Forward,
    config: AdapterConfig | None = None,
    parts: int = 1,
    backend: str = "reference",
) -> Any:
    """Return a patched model with values in its adapters."""
    torch.manual_seed(0)
    model = Outer(*(Three(run) for _ in range(parts)))
    patch_model(model, config or LoraConfig(r=3), quantize="nf4", backend=backend)
    fill_adapters(model)
    return model


def results(model: nn.Module, x: Tensor = X) -> list[Tensor]:
    """Return y and every gradient."""
    x = x.clone().requires_grad_()
    model.zero_grad()
    y = model(x)
    y.square().sum().backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    assert x.grad is not None
    return [y.detach(), x.grad, *grads]


def assert_same(mine: list[Tensor], theirs: list[Tensor]) -> None:
    """Assert the same bits, but for dx, where autograd's order of sums follows that of calls."""
    for i, (one, other) in enumerate(zip(mine, theirs, strict=True)):
        assert torch.equal(one, other) or i == 1
        torch.testing.assert_close(one, other)


def fused(run: Forward, config: AdapterConfig | None = None, backend: str = "reference") -> Any:
    """Return the model with its groups found in a first call."""
    model: Any = fuse_groups(model_of(run, config, backend=backend))
    model(X)
    return model


def watch_sizes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return the sizes of the groups that are computed, as they come."""
    sizes: list[int] = []
    real = ops.linear_group

    def linear_group(x: Tensor, weights: Any, *rest: Any) -> Any:
        sizes.append(len(weights))
        return real(x, weights, *rest)

    monkeypatch.setattr(sharing, "linear_group", linear_group)
    return sizes
