"""Products of small matrices, the factors of LoHa and LoKr, with their gradients.

On CPU tensors the C++ kernels compute them, with backend="auto" or "native"; elsewhere, and where a
graph is traced, torch does.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, cast

import torch
from fastlora_kernels import native_library, native_products
from torch import Tensor

from fastlora.ops.library import is_plain

Pair = tuple[Tensor, Tensor]


def native_takes(backend: str, *tensors: Tensor) -> bool:
    """Return whether the C++ library takes these: plain tensors on the CPU, of one dtype."""
    first = tensors[0]
    return (
        backend in ("auto", "native")
        and is_plain(*tensors)
        and first.dtype in native_library.DTYPES
        and all(t.device.type == "cpu" and t.dtype == first.dtype for t in tensors)
        and is_built()
    )


@cache
def is_built() -> bool:
    """Return whether the library is there; without it torch computes these products too."""
    try:
        native_library.library()
    except ImportError:
        return False
    return True


def _rows(u: Tensor, v: Tensor) -> Tensor:
    return (u.unsqueeze(1) * v).reshape(-1, u.shape[1])


def _rows_backward(g: Tensor, u: Tensor, v: Tensor) -> Pair:
    g = g.reshape(u.shape[0], *v.shape)  # (r1, r2, K)
    return (g * v).sum(1), (g * u.unsqueeze(1)).sum(0)


def _columns(u: Tensor, v: Tensor) -> Tensor:
    return (u.unsqueeze(2) * v.unsqueeze(1)).reshape(u.shape[0], -1)


def _columns_backward(g: Tensor, u: Tensor, v: Tensor) -> Pair:
    g = g.reshape(*u.shape, v.shape[1])  # (N, r1, r2)
    return (g @ v.unsqueeze(2)).squeeze(2), (u.unsqueeze(1) @ g).squeeze(1)


def _kron(u: Tensor, v: Tensor) -> Tensor:
    product = u[:, None, :, None] * v[:, None, :]  # (a, c, b, d)
    return product.reshape(u.shape[0] * v.shape[0], -1)


def _kron_backward(g: Tensor, u: Tensor, v: Tensor) -> Pair:
    (a, b), (c, d) = u.shape, v.shape
    g = g.reshape(a, c, b, d)
    du = (g @ v.unsqueeze(2)).squeeze(3).sum(1)  # (a, c, b) -> (a, b)
    return du, (u[:, None, None, :] @ g).squeeze(2).sum(0)  # (a, c, d) -> (c, d)


_FORMS: dict[str, tuple[Callable[..., Tensor], Callable[..., Pair]]] = {
    "rows": (_rows, _rows_backward),
    "columns": (_columns, _columns_backward),
    "kron": (_kron, _kron_backward),
}


class _Products(torch.autograd.Function):
    """u, v -> their products of one kind."""

    @staticmethod
    def forward(ctx: Any, kind: str, backend: str, u: Tensor, v: Tensor) -> Tensor:
        ctx.kind, ctx.backend = kind, backend
        ctx.save_for_backward(u, v)
        if native_takes(backend, u, v):
            return native_products.products(kind, u, v)
        return _FORMS[kind][0](u, v)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[None, None, Tensor, Tensor]:
        u, v = ctx.saved_tensors
        if native_takes(ctx.backend, g, u, v) and not torch.is_grad_enabled():
            return None, None, *native_products.products_backward(ctx.kind, g, u, v)
        return None, None, *_FORMS[ctx.kind][1](g.contiguous(), u, v)


def _apply(kind: str, u: Tensor, v: Tensor, backend: str) -> Tensor:
    return cast(Tensor, _Products.apply(kind, backend, u, v))  # type: ignore[no-untyped-call]


def row_products(u: Tensor, v: Tensor, backend: str = "auto") -> Tensor:
    """Return (r1 r2, K): every row of u (r1, K) times every row of v (r2, K)."""
    return _apply("rows", u, v, backend)


def column_products(u: Tensor, v: Tensor, backend: str = "auto") -> Tensor:
    """Return (N, r1 r2): every column of u (N, r1) times every column of v (N, r2)."""
    return _apply("columns", u, v, backend)


def kronecker(u: Tensor, v: Tensor, backend: str = "auto") -> Tensor:
    """Return (a c, b d), the Kronecker product of u (a, b) and v (c, d)."""
    return _apply("kron", u, v, backend)
