"""A decoder layer compiled once serves every layer of the model, whatever its adapter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastlora
from fastlora import LoHaConfig, LoKrConfig, LoraConfig

CONFIGS = {
    "lora": LoraConfig(r=4),
    "lora with dropout": LoraConfig(r=4, lora_dropout=0.1),
    "dora": LoraConfig(r=4, use_dora=True),
    "loha": LoHaConfig(r=4),
    "lokr": LoKrConfig(r=2),
}


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = x + self.down(self.up(x).relu())
        return result


@pytest.mark.parametrize("name", CONFIGS)
def test_one_graph_for_twelve_layers(name: str, backend: str) -> None:
    """Double-quantised weights, whose offsets differ; forward and backward as in eager mode."""
    torch._dynamo.reset()
    layers = nn.ModuleList(Decoder() for _ in range(12))
    fastlora.patch_model(layers, CONFIGS[name], quantize="nf4", backend=backend)
    layers.train()
    seen: list[Any] = []

    def count(graph: Any, inputs: Any) -> Any:
        seen.append(graph)
        return graph.forward

    x = torch.randn(4, 32, requires_grad=True)
    wanted = [x, *(p for p in layers.parameters() if p.requires_grad)]
    results = []
    for compiled in (False, True):
        torch.manual_seed(5)
        y = x
        for layer in layers:
            if compiled:
                layer.compile(backend=count, fullgraph=True)
            y = layer(y)
        results.append([y.detach(), *torch.autograd.grad(y.square().sum(), wanted)])
    torch._dynamo.reset()
    assert len(seen) == 1
    for eager, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, eager)
