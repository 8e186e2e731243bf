# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Triton kernels of DoRA's magnitude: ``y = z * scale + bias``, its gradient, and row norms.

- z, dy (M, N): float32, bfloat16 or float16, any strides, read once; scale, dscale (N,) float32
- W (N, K): dense, or packed as in `dequantize`; squares (N,) float32

Products and sums are float32 and rounded once. ``dscale`` adds parts over tokens in a fixed order.

Source: DoRA, Liu et al. 2024, arXiv:2402.09353, eq. 5.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastlora_kernels._decode import weight_tile


@triton.jit
def scale_columns_fwd_kernel(
    z_ptr,
    scale_ptr,
    bias_ptr,
    y_ptr,
    M,
    N,
    stride_zm,
    stride_zn,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Y = z * scale + bias; y (M, N) contiguous."""
    rm = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    rn = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (rm[:, None] < M) & (rn[None, :] < N)
    z = tl.load(z_ptr + rm[:, None] * stride_zm + rn[None, :] * stride_zn, mask=mask, other=0.0)
    y = z.to(tl.float32) * tl.load(scale_ptr + rn, mask=rn < N, other=0.0)[None, :]
    if HAS_BIAS:
        y += tl.load(bias_ptr + rn, mask=rn < N, other=0.0).to(tl.float32)[None, :]
    tl.store(y_ptr + rm[:, None] * N + rn[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def scale_columns_bwd_kernel(
    dy_ptr,
    z_ptr,
    scale_ptr,
    dz_ptr,
    part_ptr,
    M,
    N,
    span,
    stride_ym,
    stride_yn,
    stride_zm,
    stride_zn,
    NEED_DZ: tl.constexpr,
    NEED_DSCALE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Store dz = dy * scale (M, N) and part[p] (N,), the sum of dy * z over part p of tokens."""
    part = tl.program_id(1).to(tl.int64)
    rn = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    start = tl.program_id(1) * span
    stop = tl.minimum(start + span, M)
    scale = tl.load(scale_ptr + rn, mask=rn < N, other=0.0)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for m in range(start, stop, BLOCK_M):
        rm = (m + tl.arange(0, BLOCK_M)).to(tl.int64)
        mask = (rm[:, None] < stop) & (rn[None, :] < N)
        pointers = dy_ptr + rm[:, None] * stride_ym + rn[None, :] * stride_yn
        dy = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
        if NEED_DZ:
            dz = (dy * scale[None, :]).to(dz_ptr.dtype.element_ty)
            tl.store(dz_ptr + rm[:, None] * N + rn[None, :], dz, mask=mask)
        if NEED_DSCALE:
            pointers = z_ptr + rm[:, None] * stride_zm + rn[None, :] * stride_zn
            acc = tl.fma(dy, tl.load(pointers, mask=mask, other=0.0).to(tl.float32), acc)
    if NEED_DSCALE:
        tl.store(part_ptr + part * N + rn, tl.sum(acc, 0), mask=rn < N)


@triton.jit
def weight_squares_kernel(
    packed_ptr,
    absmax_ptr,
    nested_ptr,
    nested_code_ptr,
    offset_ptr,
    code_ptr,
    part_ptr,
    N,
    K,
    span,
    words_per_row,
    stride_wn,
    stride_wk,
    CODE: tl.constexpr,
    LOG_BLOCK: tl.constexpr,
    NESTED: tl.constexpr,
    DECODE: tl.constexpr,
    DTYPE: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """part[p] (N,) = sum of W^2 over columns [p span, (p + 1) span), W decoded to DTYPE.

    With DECODE "dense", `packed_ptr` is W itself, by its strides.
    """
    part = tl.program_id(1).to(tl.int64)
    rn = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    start = tl.program_id(1) * span
    stop = tl.minimum(start + span, K)
    offset = tl.load(offset_ptr) if NESTED else 0.0
    acc = tl.zeros((ROWS, COLS), tl.float32)
    for k in range(start, stop, COLS):
        rk = (k + tl.arange(0, COLS)).to(tl.int64)
        inside = (rn[:, None] < N) & (rk[None, :] < stop)
        if DECODE == "dense":
            pointers = packed_ptr + rn[:, None] * stride_wn + rk[None, :] * stride_wk
            tile = tl.load(pointers, mask=inside, other=0.0).to(tl.float32)
        else:
            tile = weight_tile(
                packed_ptr, absmax_ptr, nested_ptr, nested_code_ptr, offset, code_ptr,
                rn, k, N, K, words_per_row,
                CODE, LOG_BLOCK, NESTED, DECODE, DTYPE, ROWS, COLS,
            ).to(tl.float32)  # fmt: skip
            tile = tl.where(inside, tile, 0.0)
        acc = tl.fma(tile, tile, acc)
    tl.store(part_ptr + part * N + rn, tl.sum(acc, 1), mask=rn < N)
