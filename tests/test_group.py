"""Linears of the same input, computed together: the same bits as one by one, dx rounded once."""

from __future__ import annotations

import pytest
import torch
from fastlora_kernels import native
from fastlora_kernels.formats import StoredWeight
from fastlora_kernels.low_rank import LowRank
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fastlora import ops
from tests import contract
from tests.kernels.native_problems import stored

SIZES, RANKS = (96, 33, 64), (8, 3, 0)
PAIRS = [
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.float32, torch.float32),
    (torch.float16, torch.float16),
]


class Layers:
    """Three frozen linears of one input, the last one without an adapter."""

    def __init__(
        self, k: int, dtype: torch.dtype, adapter: torch.dtype, kind: str = "nf4-64-double"
    ) -> None:
        torch.manual_seed(0)
        self.weights = [stored(n, k, dtype, kind) for n in SIZES]
        self.biases: list[Tensor | None] = [None, torch.randn(33).to(dtype).requires_grad_(), None]
        self.updates: list[LowRank | None] = [
            LowRank(
                (torch.randn(r, k) * k**-0.5).to(adapter).requires_grad_(),
                torch.randn(n, r).to(adapter).requires_grad_(),
                0.5 + i,
            )
            if r
            else None
            for i, (n, r) in enumerate(zip(SIZES, RANKS, strict=True))
        ]

    def group(self, x: Tensor) -> list[Tensor]:
        return ops.linear_group(x, self.weights, self.biases, self.updates)

    def one_by_one(self, x: Tensor) -> list[Tensor]:
        parts = zip(self.weights, self.biases, self.updates, strict=True)
        return [ops.linear(x, weight, bias, update) for weight, bias, update in parts]

    def parameters(self) -> list[Tensor]:
        given = [u for u in self.updates if u is not None]
        return [t for u in given for t in (u.A, u.B)] + [b for b in self.biases if b is not None]


def gradients(layers: Layers, ys: list[Tensor], x: Tensor) -> tuple[Tensor, ...]:
    torch.manual_seed(3)
    dys = [torch.randn(y.shape).to(y.dtype) for y in ys]
    return torch.autograd.grad(ys, [x, *layers.parameters()], dys)


@pytest.mark.parametrize("isa", native.ISAS)
@pytest.mark.parametrize(("dtype", "adapter"), PAIRS)
def test_the_same_as_one_by_one(isa: str, dtype: torch.dtype, adapter: torch.dtype) -> None:
    before = native.isa()
    try:
        native.set_isa(isa)
    except ValueError:
        pytest.skip(f"this CPU has no {isa}")
    try:
        for m, k, kind in ((3, 128, "nf4-64-double"), (70, 130, "dense"), (1, 65, "nf4-64-single")):
            layers = Layers(k, dtype, adapter, kind)
            x = torch.randn(m, k).to(dtype).requires_grad_()
            together, alone = layers.group(x), layers.one_by_one(x)
            assert all(torch.equal(a, b) for a, b in zip(together, alone, strict=True))
            got, want = gradients(layers, together, x), gradients(layers, alone, x)
            assert all(torch.equal(a, b) for a, b in zip(got[1:], want[1:], strict=True))
            contract.compare(f"dx {isa} {m}", got[0], want[0], exact_dx(layers, together, dtype))
    finally:
        native.set_isa(before)


def exact_dx(layers: Layers, ys: list[Tensor], dtype: torch.dtype) -> Tensor:
    """The sum over the layers in float64 on the stored weights."""
    torch.manual_seed(3)
    total = torch.zeros(())
    for y, weight, update in zip(ys, layers.weights, layers.updates, strict=True):
        dy = torch.randn(y.shape).to(y.dtype).double()
        dense = decoded(weight, y.shape[-1], dtype)
        total = total + dy @ dense
        if update is not None:
            total = total + update.scaling * (dy @ update.B.double()) @ update.A.double()
    return total.detach()


def decoded(weight: StoredWeight, n: int, dtype: torch.dtype) -> Tensor:
    if weight.format == "dense":
        return weight.data.double()
    from fastlora.backends import reference

    return reference.dequantize(weight, n, 2 * weight.data.numel() // n, dtype).double()


def test_any_number_of_threads_gives_the_same_bits() -> None:
    layers, threads = Layers(192, torch.bfloat16, torch.float32), torch.get_num_threads()
    x = torch.randn(300, 192).bfloat16().requires_grad_()
    results = []
    for count in (1, 2):
        torch.set_num_threads(count)
        ys = layers.group(x)
        results.append([*ys, *gradients(layers, ys, x)])
    torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_no_rows_no_gradients_and_unused_outputs() -> None:
    layers = Layers(64, torch.bfloat16, torch.float32)
    empty = torch.empty(0, 64, dtype=torch.bfloat16, requires_grad=True)
    grads = gradients(layers, layers.group(empty), empty)
    assert all(not g.any() for g in grads)
    with torch.no_grad():
        assert not any(y.requires_grad for y in layers.group(empty))
    x = torch.randn(5, 64).bfloat16().requires_grad_()
    wanted = [x, layers.parameters()[0]]
    got = torch.autograd.grad(layers.group(x)[0].float().sum(), wanted)
    want = torch.autograd.grad(layers.one_by_one(x)[0].float().sum(), wanted)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_under_activation_checkpointing() -> None:
    layers = Layers(64, torch.float32, torch.float32)
    x = torch.randn(2, 9, 64, requires_grad=True)
    plain = gradients(layers, layers.group(x), x)
    ys = checkpoint(layers.group, x, use_reentrant=False)
    assert all(torch.equal(a, b) for a, b in zip(gradients(layers, ys, x), plain, strict=True))


@pytest.mark.parametrize("case", ["dropout", "spans", "dtypes"])
def test_what_is_no_group_is_computed_one_by_one(case: str) -> None:
    layers = Layers(64, torch.bfloat16, torch.float32)
    x = torch.randn(6, 64).bfloat16().requires_grad_()
    first = layers.updates[0]
    assert first is not None
    if case == "dropout":
        layers.updates[0] = first._replace(dropout=0.5, seed=torch.tensor(7))
    elif case == "spans":
        layers.updates[0] = first._replace(spans=torch.tensor([[0, 4]] * 6, dtype=torch.int32))
    else:
        a, b = (t.detach().bfloat16().requires_grad_() for t in first[:2])
        layers.updates[0] = LowRank(a, b, 0.5)
    together, alone = layers.group(x), layers.one_by_one(x)
    assert all(torch.equal(a, b) for a, b in zip(together, alone, strict=True))
    got, want = gradients(layers, together, x), gradients(layers, alone, x)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
