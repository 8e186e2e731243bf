"""The C++ CPU kernel of LoKr beside the base, called with tensors."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from fastlora_kernels.native_library import DTYPES, library
from fastlora_kernels.native_views import by_rows, check, pointer

Factors = tuple[Tensor, Tensor, Tensor | None]


def _prepared(factors: Factors) -> tuple[ctypes.Array[ctypes.c_int64], Factors]:
    """Return the sizes that csrc/fastlora.h names, and the factors as the kernel reads them."""
    w1, p, q = (None if w is None else w.detach().float().contiguous() for w in factors)
    assert w1 is not None and p is not None
    n2 = p.shape[0] if q is None else q.shape[0]
    size = (*w1.shape, n2, p.shape[1], p.shape[0])
    return (ctypes.c_int64 * 5)(*size), (w1, p, q)


def add_kron(y: Tensor, x: Tensor, factors: Factors) -> None:
    """``y += x kron(w1, w2)^T`` in place, with w2 = p, or q p; computed in float32, rounded once.

    Args:
        y: (M, n1 n2), float32, bfloat16 or float16, contiguous.
        x: (M, k1 k2), the same dtype.
        factors: w1 (n1, k1); p (n2, k2) and None, or p (c, k2) and q (n2, c); any float.
    """
    x = by_rows(x)
    size, (w1, p, q) = _prepared(factors)
    status = library().fastlora_add_kron(
        DTYPES[x.dtype],
        x.shape[0],
        x.data_ptr(),
        x.stride(0),
        size,
        w1.data_ptr(),
        p.data_ptr(),
        pointer(q),
        y.data_ptr(),
        torch.get_num_threads(),
    )
    check(status, "fastlora_add_kron")


def add_kron_backward(
    dy: Tensor, x: Tensor, factors: Factors, dx: Tensor | None, need_factors: bool
) -> list[Tensor]:
    """Gradients of `add_kron` for the output gradient dy (M, n1 n2).

    Args:
        dy: (M, n1 n2).
        x: (M, k1 k2), dy's dtype.
        factors: as in `add_kron`.
        dx: (M, k1 k2), dy's dtype, contiguous: x's gradient is added to it in place; or None.
        need_factors: whether the gradients of the factors are wanted.

    Returns:
        The gradients of w1, p and, where given, q, float32; empty where not needed.
    """
    dy, x = by_rows(dy), by_rows(x)
    size, used = _prepared(factors)
    shapes = [w.shape for w in used if w is not None]
    flat = torch.empty(sum(s.numel() for s in shapes)) if need_factors else None
    w1, p, q = used
    status = library().fastlora_add_kron_backward(
        DTYPES[dy.dtype],
        dy.shape[0],
        dy.data_ptr(),
        dy.stride(0),
        x.data_ptr(),
        x.stride(0),
        size,
        w1.data_ptr(),
        p.data_ptr(),
        pointer(q),
        pointer(dx),
        pointer(flat),
        torch.get_num_threads(),
    )
    check(status, "fastlora_add_kron_backward")
    if flat is None:
        return []
    parts = torch.split(flat, [shape.numel() for shape in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
