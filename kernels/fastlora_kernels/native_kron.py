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


def kron_linear(base: Tensor, x: Tensor, factors: Factors) -> Tensor:
    """``base + x kron(w1, w2)^T``, with w2 = p, or q p; computed in float32, rounded once.

    Args:
        base: (M, n1 n2), float32, bfloat16 or float16.
        x: (M, k1 k2), the same dtype.
        factors: w1 (n1, k1); p (n2, k2) and None, or p (c, k2) and q (n2, c); any float.

    Returns:
        (M, n1 n2) in base's dtype.
    """
    x, base = by_rows(x), base.contiguous()
    size, (w1, p, q) = _prepared(factors)
    out = torch.empty_like(base)
    status = library().fastlora_kron_linear(
        DTYPES[x.dtype],
        x.shape[0],
        x.data_ptr(),
        x.stride(0),
        size,
        w1.data_ptr(),
        p.data_ptr(),
        pointer(q),
        base.data_ptr(),
        out.data_ptr(),
        torch.get_num_threads(),
    )
    check(status, "fastlora_kron_linear")
    return out


def kron_linear_backward(
    dy: Tensor, x: Tensor, factors: Factors, need_dx: bool, need_factors: bool
) -> tuple[Tensor | None, list[Tensor]]:
    """Gradients of `kron_linear` for the output gradient dy (M, n1 n2).

    Returns:
        dx (M, k1 k2) in dy's dtype or None; the gradients of w1, p and, where given, q, float32
        (empty where not needed).
    """
    dy, x = by_rows(dy), by_rows(x)
    size, used = _prepared(factors)
    shapes = [w.shape for w in used if w is not None]
    dx = torch.empty(x.shape, dtype=dy.dtype) if need_dx else None
    flat = torch.empty(sum(s.numel() for s in shapes)) if need_factors else None
    w1, p, q = used
    status = library().fastlora_kron_linear_backward(
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
    check(status, "fastlora_kron_linear_backward")
    if flat is None:
        return dx, []
    parts = torch.split(flat, [shape.numel() for shape in shapes])
    return dx, [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
