"""The fused linear under torch.compile, activation checkpointing and autocast."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from fastlora_kernels.formats import StoredWeight
from fastlora_kernels.low_rank import LowRank
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from fastlora import ops
from tests.ops_cases import Case, gradients, make


@pytest.fixture
def compiler() -> Iterator[Callable[..., Any]]:
    """torch.compile that starts afresh and allows no graph break."""
    torch._dynamo.reset()
    yield functools.partial(torch.compile, fullgraph=True)
    torch._dynamo.reset()


def block(case: Case, backend: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def run(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        y = ops.linear(x, case.weight, case.bias, LowRank(A, B, 0.5), backend)
        return functional.silu(y) * 2

    return run


@pytest.mark.parametrize("format", ["dense", "nf4"])
def test_compile_without_breaks(format: str, backend: str, compiler: Callable[..., Any]) -> None:
    case = make(6, 10, 32, 3, torch.float32, format)
    run = block(case, backend)
    compiled = compiler(run, backend="aot_eager")
    for rows in (6, 5, 9):
        inputs = (torch.randn(2, rows, 32), case.lora_A, case.lora_B)
        for ours, eager in zip(gradients(compiled, *inputs), gradients(run, *inputs), strict=True):
            assert torch.equal(ours, eager)


@pytest.mark.slow
def test_compile_with_inductor(compiler: Callable[..., Any]) -> None:
    case = make(6, 10, 32, 3, torch.float32, "nf4")
    run = block(case, "reference")
    inputs = (case.x, case.lora_A, case.lora_B)
    compiled = gradients(compiler(run), *inputs)
    for ours, eager in zip(compiled, gradients(run, *inputs), strict=True):
        torch.testing.assert_close(ours, eager)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(reentrant: bool, backend: str) -> None:
    case = make(6, 10, 32, 3, torch.float32, "nf4")
    run = block(case, backend)

    def again(*inputs: Tensor) -> Tensor:
        result: Tensor = checkpoint(run, *inputs, use_reentrant=reentrant)
        return result

    inputs = (case.x, case.lora_A, case.lora_B)
    for ours, plain in zip(gradients(again, *inputs), gradients(run, *inputs), strict=True):
        assert torch.equal(ours, plain)


@pytest.mark.parametrize("format", ["dense", "nf4"])
@pytest.mark.parametrize("compiled", [False, True])
def test_autocast(format: str, compiled: bool, backend: str, compiler: Callable[..., Any]) -> None:
    case = make(6, 10, 32, 3, torch.float32, format)
    run: Callable[..., Tensor] = block(case, backend)
    if compiled:
        run = compiler(run, backend="aot_eager")
    inputs = (case.x, case.lora_A, case.lora_B)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, dx, dA, dB = gradients(run, *inputs)
        assert functional.linear(case.x, torch.zeros(2, 32)).dtype == y.dtype == torch.bfloat16
    weight = case.weight
    if format == "dense":
        weight = weight._replace(data=weight.data.bfloat16())
    alone = block(case._replace(weight=weight), backend)
    by_hand = gradients(lambda x, A, B: alone(x.bfloat16(), A, B), *inputs)
    assert dx.dtype == dA.dtype == dB.dtype == torch.float32
    for ours, expected in zip((y, dx, dA, dB), by_hand, strict=True):
        assert torch.equal(ours, expected)


def dropped_block(case: Case, backend: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def run(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        update = LowRank(A, B, 0.5, 0.3, ops.dropout_seed(x))
        return ops.linear(x, case.weight, case.bias, update, backend).sin()

    return run


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_new_seed_is_the_same_when_recomputed(
    reentrant: bool, compiled: bool, backend: str, compiler: Callable[..., Any]
) -> None:
    case = make(6, 10, 32, 3, torch.float32, "nf4")
    run: Callable[..., Tensor] = dropped_block(case, backend)
    inputs = (case.x, case.lora_A, case.lora_B)
    torch.manual_seed(11)
    expected = gradients(run, *inputs)
    if compiled:
        run = compiler(run, backend="aot_eager")

    def again(*inputs: Tensor) -> Tensor:
        result: Tensor = checkpoint(run, *inputs, use_reentrant=reentrant)
        return result

    torch.manual_seed(11)
    for ours, plain in zip(gradients(again, *inputs), expected, strict=True):
        assert torch.equal(ours, plain)
    other = gradients(run, *inputs)
    assert not torch.equal(other[0], expected[0])


class Decoder(torch.nn.Module):
    """A layer of a model whose weight is a buffer, as a 4-bit layer holds it."""

    def __init__(self, index: int, backend: str) -> None:
        super().__init__()
        case = make(4, 32, 32, 3, torch.float32, "nf4")
        data, absmax, nested, offset, *self.kind = case.weight
        assert absmax is not None and nested is not None and offset is not None
        for name, part in zip("dano", (data, absmax, nested, offset + index), strict=True):
            self.register_buffer(name, part)
        self.A = torch.nn.Parameter(case.lora_A + index)
        self.B = torch.nn.Parameter(case.lora_B)
        self.backend = backend

    def forward(self, x: Tensor) -> Tensor:
        weight = StoredWeight(self.d, self.a, self.n, self.o, *self.kind)  # type: ignore[arg-type]
        update = LowRank(self.A, self.B, 0.5, 0.1, ops.dropout_seed(x))
        return x + ops.linear(x, weight, None, update, self.backend).tanh()


def test_one_compiled_layer_serves_all_layers(backend: str, compiler: Callable[..., Any]) -> None:
    """Layers that differ in their tensors alone share a graph: offset, magnitudes, parameters."""
    layers = [Decoder(i, backend) for i in range(12)]
    seen: list[Any] = []

    def count(graph: Any, inputs: Any) -> Any:
        seen.append(graph)
        return graph.forward

    for layer in layers:
        layer.compile(backend=count, fullgraph=True)
    x = torch.randn(4, 32, requires_grad=True)
    results = []
    for call in (Decoder.__call__, Decoder.forward):
        torch.manual_seed(3)
        y = x
        for layer in layers:
            y = call(layer, y)
        wanted = [x, *(p for layer in layers for p in layer.parameters())]
        results.append((y.detach(), *torch.autograd.grad(y.sum(), wanted)))
    assert len(seen) == 1
    for ours, eager in zip(*results, strict=True):
        assert torch.equal(ours, eager)
