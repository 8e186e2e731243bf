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
        y = native_kron.kron_linear(base, x, (w1, p, q))
        dx, grads = native_kron.kron_linear_backward(dy, x, (w1, p, q), True, True)
    assert dx is not None
    plain = with_gradients(base, x, factors, dy)
    truth = with_gradients(base.double(), x.double(), [w.double() for w in factors], dy.double())
    names = ("y", "dx", "dw1", "dp", "dq")
    for name, ours, unfused, exact in zip(names, [y, dx, *grads], plain, truth, strict=False):
        contract.compare(f"{isa} {shape} {name}", ours, unfused, exact)
    again, _ = native_kron.kron_linear_backward(dy, x, (w1, p, q), True, False)
    assert torch.equal(again if again is not None else dx, dx)


def test_any_number_of_threads_gives_the_same_bits(isa: str) -> None:
    torch.manual_seed(0)
    x, dy, w1 = torch.randn(200, 48), torch.randn(200, 60), torch.randn(6, 6)
    p, found, threads = torch.randn(10, 8), [], torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(native_kron.kron_linear_backward(dy, x, (w1, p, None), True, True))
    finally:
        torch.set_num_threads(threads)
    for dx, grads in found[1:]:
        assert dx is not None and found[0][0] is not None and torch.equal(dx, found[0][0])
        assert all(torch.equal(a, b) for a, b in zip(grads, found[0][1], strict=True))


def test_strides_and_no_rows() -> None:
    w1, p = torch.randn(2, 3), torch.randn(4, 5)
    wide = torch.randn(6, 30)
    base = torch.randn(6, 8)
    close = native_kron.kron_linear(base, wide[:, :15], (w1, p, None))
    torch.testing.assert_close(close, definition(base, wide[:, :15].contiguous(), w1, p, None))
    assert native_kron.kron_linear(base[:0], wide[:0, :15], (w1, p, None)).shape == (0, 8)
