"""The C++ kernels for LoHa's and LoKr's factors and DoRA's row norms, by instruction set."""

from __future__ import annotations

import pytest
import torch
from fastlora_kernels import native_products
from torch import Tensor

from tests import contract

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# kind -> shapes of u and v: below, at and beyond the vector widths
CASES = {
    "rows": [((3, 17), (5, 17)), ((8, 640), (8, 640)), ((1, 1), (2, 1))],
    "columns": [((33, 3), (33, 5)), ((70, 8), (70, 8)), ((5, 20), (5, 17))],
    "kron": [((2, 3), (5, 7)), ((8, 8), (16, 40)), ((1, 4), (33, 1))],
}


def definition(kind: str, u: Tensor, v: Tensor) -> Tensor:
    if kind == "rows":
        return (u.unsqueeze(1) * v).reshape(-1, u.shape[1])
    if kind == "columns":
        return (u.unsqueeze(2) * v.unsqueeze(1)).reshape(u.shape[0], -1)
    return torch.kron(u, v)


def with_gradients(kind: str, u: Tensor, v: Tensor, g: Tensor) -> tuple[Tensor, ...]:
    u, v = u.detach().requires_grad_(), v.detach().requires_grad_()
    out = definition(kind, u, v)
    return out.detach(), *torch.autograd.grad(out, (u, v), g)


@pytest.mark.parametrize("dtype", DTYPES, ids=["f32", "bf16", "f16"])
@pytest.mark.parametrize("kind", list(CASES))
def test_products(isa: str, kind: str, dtype: torch.dtype) -> None:
    for left, right in CASES[kind]:
        torch.manual_seed(0)
        u, v = torch.randn(left).to(dtype), torch.randn(right).to(dtype)
        g = torch.randn(definition(kind, u, v).shape).to(dtype)
        with contract.poisoned():
            out = native_products.products(kind, u, v)
            got = (out, *native_products.products_backward(kind, g, u, v))
        plain = with_gradients(kind, u, v, g)
        truth = with_gradients(kind, u.double(), v.double(), g.double())
        for name, ours, unfused, exact in zip(("out", "du", "dv"), got, plain, truth, strict=True):
            contract.compare(f"{isa} {kind} {left} {name}", ours, unfused, exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=["f32", "bf16", "f16"])
@pytest.mark.parametrize(("n", "k", "r"), [(1, 8, 1), (37, 64, 5), (64, 96, 16), (70, 64, 20)])
def test_row_norms(isa: str, n: int, k: int, r: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight, a, b = torch.randn(n, k), torch.randn(r, k), torch.randn(n, r).to(dtype)
    squares, dots, gram = weight.square().sum(1), a @ weight.t(), a @ a.t()
    got = native_products.row_norms(squares, dots, b, gram, 0.7)
    whole = weight.double() + 0.7 * b.double() @ a.double()
    torch.testing.assert_close(got.double(), whole.norm(dim=1), rtol=2e-6, atol=0)


def test_a_row_that_the_update_cancels_has_norm_zero_or_nearly(isa: str) -> None:
    a, b = torch.eye(4), torch.ones(6, 4)
    weight = -b @ a
    squares, dots = weight.square().sum(1), a @ weight.t()
    assert (native_products.row_norms(squares, dots, b, a @ a.t(), 1.0) == 0).all()
