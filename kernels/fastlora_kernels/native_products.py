"""The C++ CPU kernels for the factors of LoHa and LoKr, and for the row norms of DoRA."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from fastlora_kernels.native_library import DTYPES, library
from fastlora_kernels.native_views import check

KINDS = {"rows": 0, "columns": 1, "kron": 2}


def _sizes(kind: str, u: Tensor, v: Tensor) -> tuple[int, ...]:
    """The sizes that csrc/fastlora.h names for a kind."""
    if kind == "rows":
        return u.shape[0], v.shape[0], u.shape[1]
    return (*u.shape, v.shape[1]) if kind == "columns" else (*u.shape, *v.shape)


def products(kind: str, u: Tensor, v: Tensor) -> Tensor:
    """The products of every row, column or entry of u with every one of v.

    Args:
        kind: "rows": u (r1, K), v (r2, K). "columns": u (N, r1), v (N, r2). "kron": u (a, b),
            v (c, d).
        u: float32, bfloat16 or float16.
        v: the same dtype.

    Returns:
        "rows": (r1 r2, K). "columns": (N, r1 r2). "kron": (a c, b d). In their dtype.
    """
    u, v = u.contiguous(), v.contiguous()
    size = _sizes(kind, u, v)
    if kind == "rows":
        out = u.new_empty(size[0] * size[1], size[2])
    elif kind == "columns":
        out = u.new_empty(size[0], size[1] * size[2])
    else:
        out = u.new_empty(size[0] * size[2], size[1] * size[3])
    status = library().fastlora_products(
        DTYPES[u.dtype],
        KINDS[kind],
        (ctypes.c_int64 * len(size))(*size),
        u.data_ptr(),
        v.data_ptr(),
        out.data_ptr(),
        torch.get_num_threads(),
    )
    check(status, "fastlora_products")
    return out


def products_backward(kind: str, g: Tensor, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of `products`.

    Args:
        kind: as in `products`.
        g: the gradient of its result.
        u: as in `products`.
        v: as in `products`.

    Returns:
        du and dv, summed in float32, in their dtype.
    """
    g, u, v = g.contiguous(), u.contiguous(), v.contiguous()
    size = _sizes(kind, u, v)
    du, dv = torch.empty_like(u), torch.empty_like(v)
    status = library().fastlora_products_backward(
        DTYPES[u.dtype],
        KINDS[kind],
        (ctypes.c_int64 * len(size))(*size),
        g.data_ptr(),
        u.data_ptr(),
        v.data_ptr(),
        du.data_ptr(),
        dv.data_ptr(),
        torch.get_num_threads(),
    )
    check(status, "fastlora_products_backward")
    return du, dv


def row_norms(squares: Tensor, dots: Tensor, b: Tensor, gram: Tensor, scaling: float) -> Tensor:
    """``||W + scaling B A||`` of each row, by the Gram identity.

    Args:
        squares: (N,) float32, the row sums of squares of W.
        dots: (R, N) float32, A W^T.
        b: (N, R) float32, bfloat16 or float16.
        gram: (R, R) float32, A A^T.
        scaling: dimensionless.

    Returns:
        (N,) float32.
    """
    squares, dots, b, gram = (t.contiguous() for t in (squares, dots, b, gram))
    out = squares.new_empty(squares.shape)
    status = library().fastlora_row_norms(
        DTYPES[b.dtype],
        *b.shape,
        squares.data_ptr(),
        dots.data_ptr(),
        b.data_ptr(),
        gram.data_ptr(),
        scaling,
        out.data_ptr(),
        torch.get_num_threads(),
    )
    check(status, "fastlora_row_norms")
    return out
