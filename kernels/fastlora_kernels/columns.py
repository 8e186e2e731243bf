"""Launchers of the kernels of DoRA's magnitude, and of the sums over a weight that its norm needs.

With ``||W + c B A||^2 = ||W||^2 + 2 c <W A^T, B> + c^2 diag(B A A^T B^T)`` row by row, the norm
needs the squares of W's rows and ``A W^T``, never a second matrix of W's shape.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastlora_kernels import regimes
from fastlora_kernels._column_kernels import (
    scale_columns_bwd_kernel,
    scale_columns_fwd_kernel,
    weight_squares_kernel,
)
from fastlora_kernels._launch import (
    OPTIONS,
    TYPES,
    on_device,
    split_reduction,
    stored_arguments,
)
from fastlora_kernels.formats import StoredWeight
from fastlora_kernels.fused import decode_width, how_to_decode, partial_product
from fastlora_kernels.low_rank_products import Masks, first_product, reduced
from fastlora_kernels.regimes import Plan, Tile

FORWARD = {"BLOCK_M": 16, "BLOCK_N": 256, "num_warps": 4}
BACKWARD = {"BLOCK_M": 16, "BLOCK_N": 64, "num_warps": 4}
ROWS, COLS = 16, 256  # of a tile of squares; not measured yet
WIDE_DOTS = {16: Tile(16, 64, 64, 4, 2), 64: Tile(64, 64, 64, 8, 2)}  # a is float32, W is not


def scale_columns(z: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """Return ``z * scale + bias``, computed in float32 and rounded once.

    Args:
        z: (M, N), float32, bfloat16 or float16, any strides.
        scale: (N,) float32.
        bias: (N,), or None.

    Returns:
        (M, N) in z's dtype.
    """
    m, n = z.shape
    y = torch.empty(m, n, dtype=z.dtype, device=z.device)
    if y.numel():
        grid = (-(-m // FORWARD["BLOCK_M"]), -(-n // FORWARD["BLOCK_N"]))
        with on_device(z):
            scale_columns_fwd_kernel[grid](
                z, scale.contiguous(), y if bias is None else bias.contiguous(), y, m, n,
                z.stride(0), z.stride(1), HAS_BIAS=bias is not None, **FORWARD, **OPTIONS,
            )  # fmt: skip
    return y


def scale_columns_backward(
    dy: Tensor, z: Tensor | None, scale: Tensor, need_dz: bool, need_dscale: bool
) -> tuple[Tensor, Tensor]:
    """Return ``dz = dy * scale`` (M, N) in dy's dtype and ``dscale = sum_m dy * z`` (N,) float32.

    What is not needed comes back without elements; z is needed for `need_dscale`.

    Raises:
        ValueError: the gradient of the scale is needed and z is missing.
    """
    if need_dscale and z is None:
        raise ValueError("the gradient of the scale needs z, got None; pass it")
    m, n = dy.shape
    tiles = -(-n // BACKWARD["BLOCK_N"])
    parts, span = split_reduction(tiles, m, BACKWARD["BLOCK_M"], dy.device)
    dz = torch.empty(m, n, dtype=dy.dtype, device=dy.device) if need_dz else dy.new_empty(0)
    part = scale.new_empty(0)
    if need_dscale:
        part = torch.empty(parts, 1, n, dtype=torch.float32, device=dy.device)
    if n and (need_dz or need_dscale):
        other = dy if z is None else z
        with on_device(dy):
            scale_columns_bwd_kernel[(tiles, parts)](
                dy, other, scale.contiguous(), dz, part, m, n, span,
                dy.stride(0), dy.stride(1), other.stride(0), other.stride(1),
                NEED_DZ=need_dz, NEED_DSCALE=need_dscale, **BACKWARD, **OPTIONS,
            )  # fmt: skip
    return dz, _row(part) if need_dscale else part


def weight_squares(weight: StoredWeight, n: int, k: int, dtype: torch.dtype) -> Tensor:
    """Return the sum of squares of each row of W (n, k) decoded to `dtype`: (n,) float32."""
    data, tile = weight.data, Tile(1, ROWS, COLS, 4, 1)
    if weight.format == "dense":
        stored: tuple[Tensor, ...] = (data, data, data, data, data, data)
        how = "dense"
        meta = {"CODE": (0.0,), "LOG_BLOCK": 0, "NESTED": False}
    else:
        tile = decode_width(tile, k, True)
        stored, meta = stored_arguments(weight)
        how = how_to_decode(stored[0], tile, k, dtype, True)
    tiles = -(-n // ROWS)
    parts, span = split_reduction(tiles, k, tile.block_i, data.device)
    part = torch.empty(parts, 1, n, dtype=torch.float32, device=data.device)
    if n:
        with on_device(data):
            weight_squares_kernel[(tiles, parts)](
                *stored, part, n, k, span, k // 8, data.stride(0), data.stride(1),
                **meta, **OPTIONS, DECODE=how, DTYPE=TYPES[dtype], ROWS=ROWS, COLS=tile.block_i,
                num_warps=tile.num_warps,
            )  # fmt: skip
    return _row(part)


def weight_dots(a: Tensor, weight: StoredWeight, n: int, dtype: torch.dtype) -> Tensor:
    """Return ``a W^T``, with W decoded to `dtype` and sums in float32.

    Args:
        a: (R, K) float32 or `dtype`, any strides.
        weight: the stored (N, K) weight.
        n: N.
        dtype: to which W is decoded: float32, bfloat16 or float16.

    Returns:
        (R, N) float32.
    """
    r, k = a.shape
    out = torch.empty(r, n, dtype=torch.float32, device=a.device)
    if weight.format == "dense":
        reduced(first_product(weight.data.to(dtype), a, Masks(), False), out.t())
        return out
    plan = _dots_plan(a, k, dtype)
    part, _ = partial_product(plan, a, weight, n, k, dtype, None, Masks(), True)
    return reduced(part, out)


def _dots_plan(a: Tensor, k: int, dtype: torch.dtype) -> Plan:
    """Return a plan that decodes inside the product, however many rows `a` has."""
    if a.dtype != dtype and not regimes.ragged(k):
        return Plan("mma", WIDE_DOTS[16 if a.shape[0] <= 16 else 64])
    return regimes.fused_plan(a.device, dtype, a.shape[0], k)


def _row(part: Tensor) -> Tensor:
    """Return the sum of parts (parts, 1, n): (n,) float32."""
    out = torch.empty(1, part.shape[2], dtype=torch.float32, device=part.device)
    return reduced(part, out)[0]
