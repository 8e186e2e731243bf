# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Triton kernels of the low-rank update: everything that reads or writes a wide tensor once.

With drop and spans as in `low_rank`, over x (M, K), dy (M, N), A (R, K), B (N, R):

- first: ``low[p] = drop(x) A^T`` (or ``dy B``) over a part of the long axis; x read once per
  BLOCK_R ranks;
- finish: ``out = sum of part + bias + drop(low factor)``, ``low = spans(sum of low[p])``; in place
  where a matrix product has filled `out`: one read and one write of it;
- gradient: ``dA[p] = ds^T drop(x)`` or ``dB[p] = s^T dy`` over a part of the tokens;
- both: ``ds[p] = dy B`` over a part of the columns and ``dB[q] = s^T dy`` over a part of the
  tokens, dy read once;
- reduce: the parts added in a fixed order, so that two runs give the same bits.

x and dy: float32, bfloat16 or float16, any strides; A and B: their dtype or float32, any strides;
low, ds, s and every part float32, sums in float32. 16-bit operands times float32 ones run on
matrix instructions, exactly (`_tiles.mixed_dot`).

Source: Hu et al. 2021, arXiv:2106.09685, eq. 3.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastlora_kernels._low_rank_tiles import NO_SPECIAL
from fastlora_kernels._tiles import (
    covered,
    kept,
    low_rank_dot,
    mixed_dot,
    row_keys,
    span_bounds,
    total,
)


@triton.jit(do_not_specialize=NO_SPECIAL)
def low_rank_first_kernel(
    x_ptr,
    factor_ptr,
    low_ptr,
    seed_ptr,
    spans_ptr,
    M,
    I,
    R,
    span,
    threshold,
    stride_xm,
    stride_xi,
    stride_fr,
    stride_fi,
    DROP: tl.constexpr,
    SPANS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """low[p] (M, R) = drop(x) factor^T over columns [p span, (p + 1) span) of x (M, I).

    Ranks that no row of the tile has come out as zero, without being computed.
    """
    rm = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    first_r = tl.program_id(1) * BLOCK_R
    rr = first_r + tl.arange(0, BLOCK_R).to(tl.int64)
    part = tl.program_id(2).to(tl.int64)
    start = tl.program_id(2) * span
    stop = tl.minimum(start + span, I)
    if SPANS:
        first, last = span_bounds(spans_ptr, rm, M, R, SPANS)
        low_r, high_r = covered(first, last, R)
        stop = tl.where((low_r < first_r + BLOCK_R) & (first_r < high_r), stop, start)
    acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    rest = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for i in range(start, stop, BLOCK_I):
        ri = (i + tl.arange(0, BLOCK_I)).to(tl.int64)
        mask = (rm[:, None] < M) & (ri[None, :] < stop)
        if DROP:
            mask &= kept(row_keys(seed_ptr, rm)[:, None], ri[None, :], threshold)
        x_tile = tl.load(
            x_ptr + rm[:, None] * stride_xm + ri[None, :] * stride_xi, mask=mask, other=0.0
        )  # (BLOCK_M, BLOCK_I)
        f_mask = (rr[:, None] < R) & (ri[None, :] < stop)
        f_tile = tl.load(
            factor_ptr + rr[:, None] * stride_fr + ri[None, :] * stride_fi, mask=f_mask, other=0.0
        )  # (BLOCK_R, BLOCK_I)
        acc, rest = mixed_dot(x_tile, tl.trans(f_tile), acc, rest)
    pointers = low_ptr + (part * M + rm)[:, None] * R + rr[None, :]
    tl.store(pointers, total(acc, rest), mask=(rm[:, None] < M) & (rr[None, :] < R))


@triton.jit
def low_tile(
    low_ptr,
    rows,
    r,
    first,
    last,
    M,
    R,
    parts,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Return the sum of the parts of low[rows, r : r + BLOCK_R], zero outside of the spans."""
    rr = r + tl.arange(0, BLOCK_R)
    mask = (rows[:, None] < M) & (rr[None, :] < R)
    mask &= (rr[None, :] >= first[:, None]) & (rr[None, :] < last[:, None])
    low = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for p in range(0, parts):
        pointers = low_ptr + (tl.cast(p, tl.int64) * M + rows)[:, None] * R + rr[None, :]
        low += tl.load(pointers, mask=mask, other=0.0)
    return low


@triton.jit(do_not_specialize=NO_SPECIAL)
def low_rank_finish_kernel(
    part_ptr,
    bias_ptr,
    low_ptr,
    factor_ptr,
    out_ptr,
    low_out_ptr,
    seed_ptr,
    spans_ptr,
    M,
    O,
    R,
    parts,
    low_parts,
    low_scale,
    out_scale,
    threshold,
    stride_fr,
    stride_fo,
    HAS_BIAS: tl.constexpr,
    HAS_LOW: tl.constexpr,
    STORE_LOW: tl.constexpr,
    DROP: tl.constexpr,
    SPANS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Store low_out = spans(low_scale sum of low), out = sum of part + bias + drop(low_out factor).

    part (parts, M, O), low (low_parts, M, R), factor (R, O) by its strides, out (M, O), low_out
    (M, R). The product with `factor` is scaled by `out_scale`; DROP drops elements of it. With one
    part, `part_ptr` may be `out_ptr`: the product is then added in place.
    """
    rm = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    ro = tl.program_id(1).to(tl.int64) * BLOCK_O + tl.arange(0, BLOCK_O)
    mask = (rm[:, None] < M) & (ro[None, :] < O)
    base = tl.zeros((BLOCK_M, BLOCK_O), tl.float32)
    for p in range(0, parts):
        pointers = part_ptr + (tl.cast(p, tl.int64) * M + rm)[:, None] * O + ro[None, :]
        base += tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
    if HAS_BIAS:
        base += tl.load(bias_ptr + ro, mask=ro < O, other=0.0).to(tl.float32)[None, :]
    if HAS_LOW:
        EXACT: tl.constexpr = out_ptr.dtype.element_ty == tl.float32
        first, last = span_bounds(spans_ptr, rm, M, R, SPANS)
        if STORE_LOW:  # noqa: SIM102 (decided at compile time)
            if tl.program_id(1) == 0:
                for r in range(0, R, BLOCK_R):
                    low = low_tile(low_ptr, rm, r, first, last, M, R, low_parts, BLOCK_M, BLOCK_R)
                    rr = r + tl.arange(0, BLOCK_R)
                    inside = (rm[:, None] < M) & (rr[None, :] < R)
                    pointers = low_out_ptr + rm[:, None] * R + rr[None, :]
                    tl.store(pointers, low * low_scale, mask=inside)
        start, stop = 0, R
        if SPANS:
            low_r, high_r = covered(first, last, R)
            start, stop = low_r // BLOCK_R * BLOCK_R, high_r
        acc = tl.zeros((BLOCK_M, BLOCK_O), tl.float32)
        rest = tl.zeros((BLOCK_M, BLOCK_O), tl.float32)
        for r in range(start, stop, BLOCK_R):
            rr = (r + tl.arange(0, BLOCK_R)).to(tl.int64)
            low = low_tile(low_ptr, rm, r, first, last, M, R, low_parts, BLOCK_M, BLOCK_R)
            pointers = factor_ptr + rr[:, None] * stride_fr + ro[None, :] * stride_fo
            f_mask = (rr[:, None] < R) & (ro[None, :] < O)
            factor = tl.load(pointers, mask=f_mask, other=0.0)  # (BLOCK_R, BLOCK_O)
            acc, rest = low_rank_dot(low * low_scale, factor, acc, rest, EXACT)
        acc = total(acc, rest) * out_scale
        if DROP:
            keys = row_keys(seed_ptr, rm)
            acc = tl.where(kept(keys[:, None], ro[None, :], threshold), acc, 0.0)
        base += acc
    tl.store(out_ptr + rm[:, None] * O + ro[None, :], base.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=NO_SPECIAL)
def low_rank_gradient_kernel(
    low_ptr,
    wide_ptr,
    out_ptr,
    seed_ptr,
    M,
    O,
    R,
    span,
    scale,
    threshold,
    stride_wm,
    stride_wo,
    stride_op,
    stride_or,
    stride_oo,
    DROP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """out[p] (R, O) = scale low^T drop(wide) over tokens [p span, (p + 1) span).

    low (M, R) float32, wide (M, O), out by its strides.
    """
    ro = tl.program_id(0).to(tl.int64) * BLOCK_O + tl.arange(0, BLOCK_O)
    rr = (tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
    part = tl.program_id(2).to(tl.int64)
    start = tl.program_id(2) * span
    stop = tl.minimum(start + span, M)
    acc = tl.zeros((BLOCK_O, BLOCK_R), tl.float32)
    rest = tl.zeros((BLOCK_O, BLOCK_R), tl.float32)
    for m in range(start, stop, BLOCK_M):
        rm = (m + tl.arange(0, BLOCK_M)).to(tl.int64)
        low = tl.load(
            low_ptr + rm[:, None] * R + rr[None, :],
            mask=(rm[:, None] < stop) & (rr[None, :] < R),
            other=0.0,
        )  # (BLOCK_M, BLOCK_R)
        mask = (rm[:, None] < stop) & (ro[None, :] < O)
        if DROP:
            mask &= kept(row_keys(seed_ptr, rm)[:, None], ro[None, :], threshold)
        wide = tl.load(
            wide_ptr + rm[:, None] * stride_wm + ro[None, :] * stride_wo, mask=mask, other=0.0
        )  # (BLOCK_M, BLOCK_O)
        acc, rest = mixed_dot(tl.trans(wide), low, acc, rest)
    pointers = out_ptr + part * stride_op + rr[None, :] * stride_or + ro[:, None] * stride_oo
    out = (total(acc, rest) * scale).to(out_ptr.dtype.element_ty)
    tl.store(pointers, out, mask=(rr[None, :] < R) & (ro[:, None] < O))


@triton.jit
def low_rank_both_kernel(
    dy_ptr,
    factor_ptr,
    s_ptr,
    ds_ptr,
    db_ptr,
    M,
    N,
    R,
    span,
    stride_ym,
    stride_yn,
    stride_fn,
    stride_fr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """ds[i] (M, R) = dy B over columns of tile i, db[p] (R, N) = s^T dy over tokens of part p.

    R is at most BLOCK_R; dy (M, N) by its strides is read once.
    """
    tile = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1).to(tl.int64)
    rn = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    rr = tl.arange(0, BLOCK_R)
    start = tl.program_id(1) * span
    stop = tl.minimum(start + span, M)
    n_inside, r_inside = rn[:, None] < N, rr[None, :] < R
    factor = tl.load(
        factor_ptr + rn[:, None] * stride_fn + rr[None, :] * stride_fr,
        mask=n_inside & r_inside,
        other=0.0,
    )  # (BLOCK_N, BLOCK_R)
    db = tl.zeros((BLOCK_R, BLOCK_N), tl.float32)
    db_rest = tl.zeros((BLOCK_R, BLOCK_N), tl.float32)
    for m in range(start, stop, BLOCK_M):
        rm = (m + tl.arange(0, BLOCK_M)).to(tl.int64)
        m_inside = rm[:, None] < stop
        dy = tl.load(
            dy_ptr + rm[:, None] * stride_ym + rn[None, :] * stride_yn,
            mask=m_inside & (rn[None, :] < N),
            other=0.0,
        )  # (BLOCK_M, BLOCK_N)
        s = tl.load(s_ptr + rm[:, None] * R + rr[None, :], mask=m_inside & r_inside, other=0.0)
        zero = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
        ds, ds_rest = mixed_dot(dy, factor, zero, zero)
        pointers = ds_ptr + (tile * M + rm)[:, None] * R + rr[None, :]
        tl.store(pointers, total(ds, ds_rest), mask=m_inside & r_inside)
        db, db_rest = mixed_dot(tl.trans(s), dy, db, db_rest)
    pointers = db_ptr + (part * R + rr)[:, None] * N + rn[None, :]
    tl.store(pointers, total(db, db_rest), mask=(rr[:, None] < R) & (rn[None, :] < N))


@triton.jit
def low_rank_reduce_kernel(
    part_ptr,
    out_ptr,
    spans_ptr,
    ROWS,
    COLS,
    parts,
    scale,
    stride_or,
    stride_oc,
    SPANS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Store out (ROWS, COLS) = scale spans(sum of part (parts, ROWS, COLS))."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    size = tl.cast(ROWS, tl.int64) * COLS
    row, col = i // COLS, i % COLS
    mask = i < size
    if SPANS:
        first, last = span_bounds(spans_ptr, row, ROWS, COLS, SPANS)
        keep = mask & (col >= first) & (col < last)
    else:
        keep = mask
    acc = tl.zeros((BLOCK,), tl.float32)
    for p in range(0, parts):
        acc += tl.load(part_ptr + tl.cast(p, tl.int64) * size + i, mask=keep, other=0.0)
    out = (acc * scale).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * stride_or + col * stride_oc, out, mask=mask)
