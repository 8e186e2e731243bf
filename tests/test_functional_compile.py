"""The public functions under torch.compile, forward and backward, without a graph break."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import fastlora
from tests.ops_cases import gradients
from tests.test_functional import OPS, operands, some_ids

NAMES = ["lora, dropout 0.4", "hada, dropout 0.4", "kron (1, 2), dropout 0.4",
         "kron (1, 1), dropout 0.4", "dora"]  # fmt: skip


@pytest.fixture(autouse=True)
def _afresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def close(compiled: Callable[..., Tensor], run: Callable[..., Tensor], *inputs: Tensor) -> None:
    for ours, eager in zip(gradients(compiled, *inputs), gradients(run, *inputs), strict=True):
        torch.testing.assert_close(ours, eager)


@pytest.mark.parametrize("name", NAMES)
def test_compile_without_breaks(name: str, backend: str) -> None:
    """The number of rows changes without another graph for each."""
    weight = fastlora.quantize_4bit(torch.randn(24, 32))
    seen: list[Any] = []

    def run(x: Tensor, *params: Tensor) -> Tensor:
        return OPS[name][1](x, weight, None, *params, backend).tanh()

    def count(graph: Any, inputs: Any) -> Any:
        seen.append(graph)
        return graph.forward

    graphs = torch.compile(run, backend=count, fullgraph=True)
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    for m in (6, 5, 9, 12):
        x, _, *params, _ = operands(name, m, 24, 32, torch.float32)
        graphs(x, *params)
        close(compiled, run, x, *params)
    assert len(seen) <= 2  # the second with a dynamic number of rows


def test_many_adapters_without_breaks(backend: str) -> None:
    weight, ids = fastlora.quantize_4bit(torch.randn(24, 32)), some_ids(6)

    def run(x: Tensor, *params: Tensor) -> Tensor:
        given = (list(params[:3]), list(params[3:]), (0.5, 0.7, 0.9), ids)
        y = fastlora.multi_lora_linear(x, weight, None, *given, backend=backend)
        return y.tanh()

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    x, _, *params, _ = operands("multi", 6, 24, 32, torch.float32)
    close(compiled, run, x, *params)


def test_new_seeds_in_a_graph_differ_from_call_to_call() -> None:
    weight = torch.randn(24, 32)
    x, _, A, B, _ = operands("lora, dropout 0.4", 6, 24, 32, torch.float32)

    def run(x: Tensor) -> Tensor:
        return fastlora.lora_linear(x, weight, None, A, B, dropout=0.5, backend="reference")

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    torch.manual_seed(1)
    first, second = compiled(x), compiled(x)
    torch.manual_seed(1)
    assert torch.equal(run(x), first) and not torch.equal(first, second)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_compile_with_inductor(name: str) -> None:
    weight = fastlora.quantize_4bit(torch.randn(24, 32))

    def run(x: Tensor, *params: Tensor) -> Tensor:
        return OPS[name][1](x, weight, None, *params, "reference").tanh()

    x, _, *params, _ = operands(name, 6, 24, 32, torch.float32)
    close(torch.compile(run, fullgraph=True), run, x, *params)
