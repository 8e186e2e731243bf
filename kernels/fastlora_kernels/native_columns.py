"""The C++ CPU kernels of DoRA, called with tensors: sums over the weight, and scaled columns."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastlora_kernels.formats import StoredWeight
from fastlora_kernels.low_rank import LowRank
from fastlora_kernels.native_library import DTYPES, library
from fastlora_kernels.native_views import by_rows, check, contiguous, describe, low_rank, pointer


def weight_dots(a: Tensor, weight: StoredWeight, n: int, dtype: torch.dtype) -> Tensor:
    """``a W^T``, with W decoded to `dtype` and sums in float32.

    Args:
        a: (R, K) float32 or `dtype`.
        weight: (N, K): 4-bit, or dense of `dtype`.
        n: rows of the weight.
        dtype: float32 or bfloat16.

    Returns:
        (R, N) float32.
    """
    a, weight = a.contiguous(), contiguous(weight)
    r, k = a.shape
    out = a.new_empty((r, n), dtype=torch.float32)
    view, threads = describe(weight, n, k), torch.get_num_threads()
    status = library().fastlora_weight_dots(
        DTYPES[dtype], DTYPES[a.dtype], r, a.data_ptr(), view, out.data_ptr(), threads
    )
    check(status, "fastlora_weight_dots")
    return out


def weight_squares(weight: StoredWeight, n: int, k: int, dtype: torch.dtype) -> Tensor:
    """Sum of squares of each row of a weight (n, k) decoded to `dtype`: (n,) float32."""
    weight = contiguous(weight)
    out = torch.empty(n, dtype=torch.float32)
    view, threads = describe(weight, n, k), torch.get_num_threads()
    status = library().fastlora_weight_squares(DTYPES[dtype], view, out.data_ptr(), threads)
    check(status, "fastlora_weight_squares")
    return out


def scale_columns(z: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """``z * scale + bias`` in float32, rounded once.

    Args:
        z: (M, N) float32 or bfloat16.
        scale: (N,) float32.
        bias: (N,) any float, or None.

    Returns:
        (M, N) in z's dtype.
    """
    z, scale = z.contiguous(), scale.contiguous()
    bias = None if bias is None else bias.to(torch.float32).contiguous()
    m, n = z.shape
    y = torch.empty_like(z)
    pointers = (z.data_ptr(), scale.data_ptr(), pointer(bias), y.data_ptr())
    status = library().fastlora_scale_columns(
        DTYPES[z.dtype], m, n, *pointers, torch.get_num_threads()
    )
    check(status, "fastlora_scale_columns")
    return y


def scale_columns_backward(
    dy: Tensor, z: Tensor | None, scale: Tensor, need_dz: bool, need_dscale: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of `scale_columns`: dz (M, N) in dy's dtype and dscale (N,) float32.

    What is not needed comes back without elements; z is needed for `need_dscale`.
    """
    dy, scale = by_rows(dy), scale.contiguous()
    z = None if z is None or not need_dscale else z.contiguous()
    m, n = dy.shape
    dz = dy.new_empty((m, n) if need_dz else (0,))
    dscale = scale.new_empty(n if need_dscale else 0)
    if m == 0:
        return dz, dscale.zero_()
    status = library().fastlora_scale_columns_backward(
        DTYPES[dy.dtype],
        m,
        n,
        dy.data_ptr(),
        dy.stride(0),
        pointer(z),
        scale.data_ptr(),
        dz.data_ptr() if need_dz else None,
        dscale.data_ptr() if need_dscale else None,
        torch.get_num_threads(),
    )
    check(status, "fastlora_scale_columns_backward")
    return dz, dscale


class Scaled(NamedTuple):
    """Outputs of `scaled_linear`.

    Attributes:
        y: (M, N) in x's dtype, ``z magnitude / norms + bias``.
        z: (M, N) in x's dtype, ``x W^T + scaling s B^T``.
        s: (M, R) float32, ``x A^T``.
        norms: (N,) float32, ``||W + scaling B A||`` of each row.
    """

    y: Tensor
    z: Tensor
    s: Tensor
    norms: Tensor


def scaled_linear(
    x: Tensor,
    weight: StoredWeight,
    bias: Tensor | None,
    update: LowRank,
    squares: Tensor,
    magnitude: Tensor,
) -> Scaled:
    """Return ``(x W^T + scaling s B^T) magnitude / norms + bias`` and what the backward needs.

    The norms come from the panels of W that the product decodes anyway.

    Args:
        x: (M, K) float32, bfloat16 or float16.
        weight: (N, K): 4-bit, or dense in x's dtype.
        bias: (N,) any float, or None.
        update: the low-rank term, float32 or in x's dtype, without dropout and spans.
        squares: (N,) float32, see `weight_squares`.
        magnitude: (N,) any float.
    """
    x, weight = by_rows(x), contiguous(weight)
    (m, k), n = x.shape, squares.shape[0]
    bias = None if bias is None else bias.to(torch.float32).contiguous()
    squares, magnitude = squares.contiguous(), magnitude.to(torch.float32).contiguous()
    lora, alive = low_rank(update)
    assert alive is not None
    y, z, norms = x.new_empty(m, n), x.new_empty(m, n), torch.empty_like(squares)
    s = x.new_empty(m, lora.r, dtype=torch.float32)
    status = library().fastlora_scaled_linear(
        DTYPES[x.dtype],
        m,
        x.data_ptr(),
        x.stride(0),
        describe(weight, n, k),
        lora,
        squares.data_ptr(),
        magnitude.data_ptr(),
        pointer(bias),
        norms.data_ptr(),
        s.data_ptr(),
        z.data_ptr(),
        y.data_ptr(),
        torch.get_num_threads(),
    )
    check(status, "fastlora_scaled_linear")
    return Scaled(y, z, s, norms)
