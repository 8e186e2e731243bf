"""The definition of every op in plain PyTorch, unfused: dequantise, matmul, adapter, add.

It takes every problem, float64 included, and is what the other backends are tested against. For
fp8 compute it rounds operands to 8 bits and multiplies them in float32, however few tokens there
are, when it is asked for by name.
Rounding is that of the usual unfused path: base matmul in x's dtype, adapter in its own dtype,
the sum in the wider of the two, then one rounding to x's dtype.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from fastlora_kernels import fp8
from fastlora_kernels.experts import ExpertsUpdate, one_by_one, one_by_one_backward
from fastlora_kernels.formats import StoredWeight, dequantize
from fastlora_kernels.low_rank import LowRank, keep_mask, keep_scale, span_mask
from torch import Tensor
from torch.nn import functional

if TYPE_CHECKING:
    from fastlora.dispatch import Problem

PRIORITY = 0
AUTO_COMPUTES = ("auto",)  # what it does in 8 bits is slow: to look at, and to test against
__all__ = [
    "PRIORITY",
    "dequantize",
    "experts_linear",
    "experts_linear_backward",
    "lora_linear",
    "lora_linear_backward",
    "scale_columns",
    "scale_columns_backward",
    "weight_dots",
    "weight_squares",
    "why_not",
]


def why_not(problem: Problem) -> str | None:
    """Return None: the reference takes everything, but for shapes that no fp8 product takes."""
    return fp8.why_not_shape(problem.n, problem.k) if problem.compute == "fp8" else None


def lora_linear(
    x: Tensor, weight: StoredWeight, bias: Tensor | None, update: LowRank | None
) -> tuple[Tensor, Tensor]:
    """Return ``y = x W^T + bias + scaling s B^T`` and ``s = mask_spans(drop(x) A^T)``.

    Args:
        x: (M, K), floating.
        weight: the stored (N, K) weight.
        bias: (N,) in x's dtype, or None.
        update: the low-rank term, or None.

    Returns:
        y (M, N) in x's dtype; s (M, R) float32 (float64 for float64 x), shape (0,) without update.

    Source: Hu et al. 2021, arXiv:2106.09685, eq. 3.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    n, k = _shape(weight, x.shape[1])
    y = _product(x, weight, n, k, bias)
    if update is None:
        return y, x.new_empty(0, dtype=wide)
    A, B = update.A, update.B
    dropped, scale = _drop(x, update)
    s = functional.linear(dropped.to(A.dtype), A).to(wide) * scale  # (M, R)
    s = _only_spans(s, update)
    return (y + functional.linear(s.to(B.dtype), B) * update.scaling).to(x.dtype), s


def lora_linear_backward(
    dy: Tensor,
    x: Tensor | None,
    s: Tensor | None,
    weight: StoredWeight,
    update: LowRank | None,
    need_dx: bool,
    need_dlora: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients ``dx``, ``dA``, ``dB``.

    With ``ds = mask_spans(scaling dy B)``: ``dx = dy W + drop(ds A)``, ``dA = ds^T drop(x)``,
    ``dB = scaling dy^T s``.

    Args:
        dy: (M, N).
        x: (M, K) of the forward; needed for `need_dlora`, or when a packed weight has odd K.
        s: (M, R) of the forward; needed for `need_dlora`.
        weight: the stored (N, K) weight.
        update: the low-rank term, or None.
        need_dx: compute dx; otherwise it comes back without elements.
        need_dlora: compute dA and dB; otherwise they come back without elements.

    Returns:
        dx (M, K) in dy's dtype; dA (R, K) and dB (N, R) in the adapter's dtype.
    """
    dx, dA, dB = dy.new_empty(0), dy.new_empty(0), dy.new_empty(0)
    if need_dx:
        n, k = _shape(weight, None if x is None else x.shape[1])
        if weight.compute == "fp8":
            dx = fp8.product(dy, weight, n, k, transposed=True)
        else:
            dx = dy @ dequantize(weight, n, k, dy.dtype)
    if update is None:
        return dx, dA, dB
    A, B = update.A, update.B
    ds = _only_spans((dy.to(B.dtype) @ B) * update.scaling, update)  # (M, R)
    if need_dx:
        dropped, scale = _drop(ds @ A, update)
        dx = (dx + dropped * scale).to(dy.dtype)
    if need_dlora:
        if x is None or s is None:
            raise ValueError("the gradient of the adapter needs x and s, got None; pass both")
        dropped, scale = _drop(x, update)
        dA = (ds.t() @ dropped.to(ds.dtype)) * scale
        dB = (dy.to(ds.dtype).t() @ s.to(ds.dtype)) * update.scaling
    return dx, dA, dB


def experts_linear(
    x: Tensor,
    weight: StoredWeight,
    n: int,
    bias: Tensor | None,
    update: ExpertsUpdate | None,
    ends: Tensor,
) -> tuple[Tensor, Tensor]:
    """Return `lora_linear` of each expert's rows with its own weight, bias and update.

    Args:
        x: (M, K), rows sorted by expert.
        weight: the stacked (N, K) weights, see `fastlora_kernels.experts.expert_weight`.
        n: N.
        bias: (E, N) in x's dtype, or None.
        update: the low-rank terms, or None.
        ends: (E,) int64, the row after each expert's last.

    Returns:
        y (M, N) in x's dtype and s (M, r); zero in the rows of no expert.
    """
    return one_by_one(lora_linear, x, weight, n, bias, update, ends)


def experts_linear_backward(
    dy: Tensor,
    x: Tensor | None,
    s: Tensor | None,
    weight: StoredWeight,
    k: int,
    update: ExpertsUpdate | None,
    ends: Tensor,
    need_dx: bool,
    need_dlora: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dx (M, K), dA (E, r, K) and dB (E, N, r): `lora_linear_backward` per expert."""
    rest = (weight, k, update, ends, need_dx, need_dlora)
    return one_by_one_backward(lora_linear_backward, dy, x, s, *rest)


def weight_dots(a: Tensor, weight: StoredWeight, n: int, dtype: torch.dtype) -> Tensor:
    """Return ``a W^T``, with W decoded to `dtype` and sums in float32.

    Args:
        a: (R, K) float32 or `dtype`.
        weight: the stored (N, K) weight.
        n: N.
        dtype: to which W is decoded.

    Returns:
        (R, N) float32 (float64 for float64).
    """
    wide = torch.promote_types(dtype, torch.float32)
    return a.to(wide) @ dequantize(weight, n, a.shape[1], dtype).to(wide).t()


def weight_squares(weight: StoredWeight, n: int, k: int, dtype: torch.dtype) -> Tensor:
    """Return the sum of squares of each row of W decoded to `dtype`: (N,) float32 (or float64)."""
    wide = torch.promote_types(dtype, torch.float32)
    return dequantize(weight, n, k, dtype).to(wide).square().sum(1)


def scale_columns(z: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """Return ``z * scale + bias``, computed in float32 and rounded once.

    Args:
        z: (M, N), floating.
        scale: (N,) float32 (float64 for float64 z).
        bias: (N,), or None.

    Returns:
        (M, N) in z's dtype.
    """
    y = z * scale
    return (y if bias is None else y + bias).to(z.dtype)


def scale_columns_backward(
    dy: Tensor, z: Tensor | None, scale: Tensor, need_dz: bool, need_dscale: bool
) -> tuple[Tensor, Tensor]:
    """Return ``dz = dy * scale`` (M, N) in dy's dtype and ``dscale = sum_m dy * z`` (N,).

    What is not needed comes back without elements; z is needed for `need_dscale`.
    """
    dz = (dy * scale).to(dy.dtype) if need_dz else dy.new_empty(0)
    if not need_dscale:
        return dz, scale.new_empty(0)
    if z is None:
        raise ValueError("the gradient of the scale needs z, got None; pass it")
    return dz, (dy.to(scale.dtype) * z).sum(0)


def _product(x: Tensor, weight: StoredWeight, n: int, k: int, bias: Tensor | None) -> Tensor:
    """Return ``x W^T + bias`` as the weight is to be multiplied: (M, N) in x's dtype."""
    if weight.compute != "fp8":
        return functional.linear(x, dequantize(weight, n, k, x.dtype), bias)
    y = fp8.product(x, weight, n, k, transposed=False)
    return y if bias is None else y + bias


def _drop(x: Tensor, update: LowRank) -> tuple[Tensor, float]:
    """Return x (M, K) without the dropped elements, and the factor of the others."""
    if update.seed is None:
        return x, 1.0
    keep = keep_mask(update.seed, x.shape[0], x.shape[1], update.dropout)
    return x.masked_fill(~keep, 0), keep_scale(update.dropout)


def _only_spans(s: Tensor, update: LowRank) -> Tensor:
    """Return s (M, R) with zeros outside of each row's ranks."""
    if update.spans is None:
        return s
    return s.masked_fill(~span_mask(update.spans, s.shape[1]), 0)


def _shape(weight: StoredWeight, k: int | None) -> tuple[int, int]:
    """Return (N, K) from the tensors; a packed weight with odd K is flat and needs K."""
    columns = weight.columns() if k is None else k
    return weight.rows(columns), columns
