"""The C++ kernel of LoKr beside the base, by instruction set, against its definition."""

from __future__ import annotations

import pytest
import torch
from fastlora_kernels import native_kron
from torch import Tensor

from tests import contract

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# m, n1, k1, n2, k2, c (0: w2 is full): below, at and beyond vectors, blocks and chunks
SHAPES = [
    (1, 1, 1, 1, 1, 0),
    (5, 3, 2, 5, 7, 0),
    (37, 9, 8, 16, 24, 3),
    (70, 24, 17, 32, 20, 8),
    (130, 8, 16, 40, 33, 0),
]


def definition(base: Tensor, x: Tensor, w1: Tensor, p: Tensor, q: Tensor | None) -> Tensor:
    w2 = p if q is None else q @ p
    return (base + x.to(w1.dtype) @ torch.kron(w1, w2).t()).to(base.dtype)


def with_gradients(base: Tensor, x: Tensor, factors: list[Tensor], dy: Tensor) -> list[Tensor]:
    x = x.detach().requires_grad_()
    factors = [w.detach().requires_grad_() for w in factors]
    y = definition(base, x, factors[0], factors[1], factors[2] if len(factors) > 2 else None)
    return [y.detach(), *torch.autograd.grad(y, [x, *factors], dy)]


@pytest.mark.parametrize("dtype", DTYPES, ids=["f32", "bf16", "f16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_contract(isa: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    m, n1, k1, n2, k2, c = shape
    base, x = torch.randn(m, n1 * n2).to(dtype), torch.randn(m, k1 * k2).to(dtype)
    dy = torch.randn(m, n1 * n2).to(dtype)
    factors = [torch.randn(n1, k1), torch.randn(c or n2, k2)]
    factors += [torch.randn(n2, c)] if c else []
    w1, p, q = factors[0], factors[1], factors[2] if c else None
    with contract.poisoned():
        y = base.clone()
        native_kron.add_kron(y, x, (w1, p, q))
        dx = torch.zeros_like(x)
        grads = native_kron.add_kron_backward(dy, x, (w1, p, q), dx, True)
    plain = with_gradients(base, x, factors, dy)
    truth = with_gradients(base.double(), x.double(), [w.double() for w in factors], dy.double())
    names = ("y", "dx", "dw1", "dp", "dq")
    for name, ours, unfused, exact in zip(names, [y, dx, *grads], plain, truth, strict=False):
        contract.compare(f"{isa} {shape} {name}", ours, unfused, exact)
    again = torch.zeros_like(x)
    assert native_kron.add_kron_backward(dy, x, (w1, p, q), again, False) == []
    assert torch.equal(again, dx)
    twice = native_kron.add_kron_backward(dy, x, (w1, p, q), None, True)
    assert all(torch.equal(a, b) for a, b in zip(grads, twice, strict=True))
    into = torch.randn_like(x)
    sums = torch.zeros(x.shape)
    native_kron.add_kron_backward(dy.float(), x.float(), (w1, p, q), sums, False)
    expected = (into.float() + sums).to(dtype)
    native_kron.add_kron_backward(dy, x, (w1, p, q), into, False)
    assert torch.equal(into, expected)  # added in float32, rounded once


def test_any_number_of_threads_gives_the_same_bits(isa: str) -> None:
    torch.manual_seed(0)
    x, dy, w1 = torch.randn(200, 48), torch.randn(200, 60), torch.randn(6, 6)
    p, found, threads = torch.randn(10, 8), [], torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            dx = torch.zeros_like(x)
            found.append((dx, native_kron.add_kron_backward(dy, x, (w1, p, None), dx, True)))
    finally:
        torch.set_num_threads(threads)
    for dx, grads in found[1:]:
        assert torch.equal(dx, found[0][0])
        assert all(torch.equal(a, b) for a, b in zip(grads, found[0][1], strict=True))


def test_strides_and_no_rows() -> None:
    w1, p = torch.randn(2, 3), torch.randn(4, 5)
    wide = torch.randn(6, 30)
    base = torch.randn(6, 8)
    close = base.clone()
    native_kron.add_kron(close, wide[:, :15], (w1, p, None))
    torch.testing.assert_close(close, definition(base, wide[:, :15].contiguous(), w1, p, None))
    native_kron.add_kron(base[:0], wide[:0, :15], (w1, p, None))
