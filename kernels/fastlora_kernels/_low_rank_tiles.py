# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Device helpers of the product with the first low-rank factor, inside the kernels of a linear."""

from __future__ import annotations

import triton
import triton.language as tl

from fastlora_kernels._tiles import kept, mixed_dot, row_keys, total

NO_SPECIAL = ["threshold"]  # a probability as an integer: its value must not make new kernels


@triton.jit
def low_rank_vector(
    x_ptr,
    factor_ptr,
    low_ptr,
    seed_ptr,
    tile,
    part,
    start,
    stop,
    R,
    threshold,
    stride_xi,
    stride_fr,
    stride_fi,
    DROP: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Store BLOCK_R ranks of low[part] for one token, without matrix instructions.

    Many short sums, added as a tree: as exact as a matrix-vector routine.
    """
    STEP: tl.constexpr = 64
    rr = tile * BLOCK_R + tl.arange(0, BLOCK_R)
    acc = tl.zeros((BLOCK_R, STEP), tl.float32)
    for i in range(start, stop, STEP):
        ri = (i + tl.arange(0, STEP)).to(tl.int64)
        mask = ri < stop
        if DROP:
            mask &= kept(row_keys(seed_ptr, ri * 0), ri, threshold)
        x = tl.load(x_ptr + ri * stride_xi, mask=mask, other=0.0).to(tl.float32)
        f_mask = (rr[:, None] < R) & (ri[None, :] < stop)
        factor = tl.load(
            factor_ptr + rr[:, None] * stride_fr + ri[None, :] * stride_fi, mask=f_mask, other=0.0
        )
        acc = tl.fma(factor.to(tl.float32), x[None, :], acc)
    tl.store(low_ptr + part * R + rr, tl.sum(acc, 1), mask=rr < R)


@triton.jit
def low_rank_partial(
    x_ptr,
    factor_ptr,
    low_ptr,
    seed_ptr,
    first_m,
    tile,
    part,
    start,
    stop,
    M,
    R,
    threshold,
    stride_xm,
    stride_xi,
    stride_fr,
    stride_fi,
    DROP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Store one tile of low[part] = drop(x)[:, start:stop] @ factor[:, start:stop]^T.

    Tiles count through the BLOCK_M tokens from `first_m` in steps of BLOCK_R, then through
    the ranks.
    """
    TILES_M: tl.constexpr = BLOCK_M // BLOCK_R
    MIXED: tl.constexpr = x_ptr.dtype.element_ty != factor_ptr.dtype.element_ty
    STEP: tl.constexpr = 32 if MIXED else 64  # the parts of a float32 factor take registers
    rm = first_m + tile % TILES_M * BLOCK_R + tl.arange(0, BLOCK_R)
    rr = tile // TILES_M * BLOCK_R + tl.arange(0, BLOCK_R)
    acc = tl.zeros((BLOCK_R, BLOCK_R), tl.float32)
    rest = tl.zeros((BLOCK_R, BLOCK_R), tl.float32)
    for i in range(start, stop, STEP):
        ri = (i + tl.arange(0, STEP)).to(tl.int64)
        mask = (rm[:, None] < M) & (ri[None, :] < stop)
        if DROP:
            mask &= kept(row_keys(seed_ptr, rm)[:, None], ri[None, :], threshold)
        x_tile = tl.load(
            x_ptr + rm[:, None] * stride_xm + ri[None, :] * stride_xi, mask=mask, other=0.0
        )  # (BLOCK_R, STEP)
        f_mask = (rr[:, None] < R) & (ri[None, :] < stop)
        f_tile = tl.load(
            factor_ptr + rr[:, None] * stride_fr + ri[None, :] * stride_fi, mask=f_mask, other=0.0
        )  # (BLOCK_R, STEP)
        acc, rest = mixed_dot(f_tile, tl.trans(x_tile), acc, rest)
    pointers = low_ptr + (part * M + rm)[None, :] * R + rr[:, None]
    tl.store(pointers, total(acc, rest), mask=(rr[:, None] < R) & (rm[None, :] < M))
