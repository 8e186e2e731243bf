# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Triton kernels of the linear of stacked experts, one launch for all of them.

Rows are sorted by expert, and `ends` (E,) says where each one's stop. A program takes BLOCK_M rows
of one expert e, which it finds from `ends` by itself: the host waits for nothing. With x (M, K),
dy (M, N), W (E, N, K), A (E, R, K), B (E, N, R):

- first: ``s = x A_e^T``, or ``ds = c dy B_e``;
- linear_fwd: ``y = x W_e^T + b_e + c s B_e^T``;
- linear_bwd_dx: ``dx = dy W_e + ds A_e``;
- gradient: ``dA_e = ds^T x`` and ``dB_e = c dy^T s``, a program per expert and tile, its rows in
  order: no atomics, so two runs give the same bits.

x, dy, y, dx: float32, bfloat16 or float16, contiguous; W: their dtype, or packed as in `dequantize`
with each expert's bytes and magnitudes one behind the other; A and B: their dtype or float32; s and
ds float32; sums float32, products as in `_tiles`.

Work: 2 M N K flops a product; traffic: every expert's weights once per BLOCK_M of its rows. Rows of
no expert are not touched.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastlora_kernels._decode import weight_tile
from fastlora_kernels._tiles import dot, low_rank_dot, mixed_dot, total


@triton.jit
def expert_rows(ends_ptr, tile, E, BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr):
    """Return (expert, first row, end of its rows) of a tile, int64; past the last tile: (>= E)."""
    re = tl.arange(0, BLOCK_E)
    inside = re < E
    ends = tl.load(ends_ptr + re, mask=inside, other=0)
    starts = tl.load(ends_ptr + re - 1, mask=inside & (re > 0), other=0)
    tiles = tl.where(inside, (ends - starts + BLOCK_M - 1) // BLOCK_M, 0)
    last = tl.cumsum(tiles, 0)
    expert = tl.sum((last <= tile).to(tl.int64), 0)
    mine = re == expert
    first = tl.sum(tl.where(mine, starts + (tile - last + tiles) * BLOCK_M, 0), 0)
    return expert, first, tl.sum(tl.where(mine, ends, 0), 0)


@triton.jit
def expert_tile(
    packed_ptr,
    absmax_ptr,
    nested_ptr,
    nested_code_ptr,
    offset_ptr,
    code_ptr,
    expert,
    rows,
    col,
    N,
    K,
    CODE: tl.constexpr,
    LOG_BLOCK: tl.constexpr,
    NESTED: tl.constexpr,
    DECODE: tl.constexpr,
    DTYPE: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """Return W[expert, rows, col : col + COLS], (ROWS, COLS) DTYPE; see `_decode.weight_tile`."""
    size = tl.cast(N, tl.int64) * K
    if DECODE == "dense":
        rk = col + tl.arange(0, COLS)
        pointers = packed_ptr + expert * size + rows[:, None] * K + rk[None, :]
        return tl.load(pointers, mask=(rows[:, None] < N) & (rk[None, :] < K), other=0.0)
    else:
        blocks = (size + (1 << LOG_BLOCK) - 1) >> LOG_BLOCK
        offset = tl.load(offset_ptr + expert) if NESTED else 0.0
        return weight_tile(
            packed_ptr + expert * ((size + 1) // 2), absmax_ptr + expert * blocks,
            nested_ptr + expert * ((blocks + 255) // 256), nested_code_ptr, offset, code_ptr,
            rows, col, N, K, K // 8,
            CODE, LOG_BLOCK, NESTED, DECODE, DTYPE, ROWS, COLS,
        )  # fmt: skip


@triton.jit
def expert_update(
    low_ptr,
    factor_ptr,
    expert,
    rm,
    stop,
    ro,
    O,
    R,
    stride_fr,
    stride_fo,
    EXACT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Return ``low factor_e`` for rows rm and columns ro, (BLOCK_M, BLOCK_O) float32."""
    acc = tl.zeros((BLOCK_M, BLOCK_O), tl.float32)
    rest = tl.zeros((BLOCK_M, BLOCK_O), tl.float32)
    base = factor_ptr + expert * tl.cast(R, tl.int64) * O
    for r in range(0, R, BLOCK_R):
        rr = (r + tl.arange(0, BLOCK_R)).to(tl.int64)
        low = tl.load(
            low_ptr + rm[:, None] * R + rr[None, :],
            mask=(rm[:, None] < stop) & (rr[None, :] < R),
            other=0.0,
        )  # (BLOCK_M, BLOCK_R)
        factor = tl.load(
            base + rr[:, None] * stride_fr + ro[None, :] * stride_fo,
            mask=(rr[:, None] < R) & (ro[None, :] < O),
            other=0.0,
        )  # (BLOCK_R, BLOCK_O)
        acc, rest = low_rank_dot(low, factor, acc, rest, EXACT)
    return total(acc, rest)


@triton.jit
def experts_first_kernel(
    x_ptr,
    factor_ptr,
    low_ptr,
    ends_ptr,
    I,
    R,
    E,
    scale,
    stride_fr,
    stride_fi,
    BLOCK_M: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Store low (M, R) = scale x factor_e^T for x (M, I) and factor (E, R, I) by its strides."""
    expert, first, stop = expert_rows(ends_ptr, tl.program_id(0), E, BLOCK_M, BLOCK_E)
    if expert < E:
        rm = first + tl.arange(0, BLOCK_M)
        rr = (tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
        base = factor_ptr + expert * tl.cast(R, tl.int64) * I
        acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
        rest = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
        for i in range(0, I, BLOCK_I):
            ri = (i + tl.arange(0, BLOCK_I)).to(tl.int64)
            x_tile = tl.load(
                x_ptr + rm[:, None] * I + ri[None, :],
                mask=(rm[:, None] < stop) & (ri[None, :] < I),
                other=0.0,
            )  # (BLOCK_M, BLOCK_I)
            f_tile = tl.load(
                base + rr[:, None] * stride_fr + ri[None, :] * stride_fi,
                mask=(rr[:, None] < R) & (ri[None, :] < I),
                other=0.0,
            )  # (BLOCK_R, BLOCK_I)
            acc, rest = mixed_dot(x_tile, tl.trans(f_tile), acc, rest)
        pointers = low_ptr + rm[:, None] * R + rr[None, :]
        mask = (rm[:, None] < stop) & (rr[None, :] < R)
        tl.store(pointers, total(acc, rest) * scale, mask=mask)


@triton.jit
def experts_linear_fwd_kernel(
    x_ptr,
    packed_ptr,
    absmax_ptr,
    nested_ptr,
    nested_code_ptr,
    offset_ptr,
    code_ptr,
    bias_ptr,
    low_ptr,
    factor_ptr,
    y_ptr,
    ends_ptr,
    N,
    K,
    R,
    E,
    scale,
    CODE: tl.constexpr,
    LOG_BLOCK: tl.constexpr,
    NESTED: tl.constexpr,
    DECODE: tl.constexpr,
    DTYPE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_LOW: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Store y (M, N) = x W_e^T + bias_e + scale low B_e^T for low (M, R) and B (E, N, R)."""
    expert, first, stop = expert_rows(ends_ptr, tl.program_id(0), E, BLOCK_M, BLOCK_E)
    if expert < E:
        rm = first + tl.arange(0, BLOCK_M)
        rn = tl.program_id(1).to(tl.int64) * BLOCK_O + tl.arange(0, BLOCK_O)
        acc = tl.zeros((BLOCK_O, BLOCK_M), tl.float32)  # the weight on the instruction's long side
        for k in range(0, K, BLOCK_I):
            rk = (k + tl.arange(0, BLOCK_I)).to(tl.int64)
            x_tile = tl.load(
                x_ptr + rm[:, None] * K + rk[None, :],
                mask=(rm[:, None] < stop) & (rk[None, :] < K),
                other=0.0,
            )  # (BLOCK_M, BLOCK_I)
            w_tile = expert_tile(
                packed_ptr, absmax_ptr, nested_ptr, nested_code_ptr, offset_ptr, code_ptr,
                expert, rn, k, N, K,
                CODE, LOG_BLOCK, NESTED, DECODE, DTYPE, BLOCK_O, BLOCK_I,
            )  # fmt: skip
            acc = dot(w_tile, tl.trans(x_tile), acc)
        y = tl.trans(acc)
        inside = rn < N
        if HAS_BIAS:
            bias = tl.load(bias_ptr + expert * N + rn, mask=inside, other=0.0)
            y += bias.to(tl.float32)[None, :]
        if HAS_LOW:
            EXACT: tl.constexpr = tl.float32 == DTYPE
            y += scale * expert_update(
                low_ptr, factor_ptr, expert, rm, stop, rn, N, R, 1, R,
                EXACT, BLOCK_M, BLOCK_O, BLOCK_R,
            )  # fmt: skip
        pointers = y_ptr + rm[:, None] * N + rn[None, :]
        tl.store(pointers, y.to(DTYPE), mask=(rm[:, None] < stop) & inside[None, :])


@triton.jit
def experts_linear_bwd_dx_kernel(
    dy_ptr,
    packed_ptr,
    absmax_ptr,
    nested_ptr,
    nested_code_ptr,
    offset_ptr,
    code_ptr,
    low_ptr,
    factor_ptr,
    dx_ptr,
    ends_ptr,
    N,
    K,
    R,
    E,
    CODE: tl.constexpr,
    LOG_BLOCK: tl.constexpr,
    NESTED: tl.constexpr,
    DECODE: tl.constexpr,
    DTYPE: tl.constexpr,
    HAS_LOW: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Store dx (M, K) = dy W_e + low A_e for dy (M, N), low (M, R) and A (E, R, K)."""
    expert, first, stop = expert_rows(ends_ptr, tl.program_id(0), E, BLOCK_M, BLOCK_E)
    if expert < E:
        rm = first + tl.arange(0, BLOCK_M)
        col = tl.program_id(1) * BLOCK_O
        rk = (col + tl.arange(0, BLOCK_O)).to(tl.int64)
        acc = tl.zeros((BLOCK_O, BLOCK_M), tl.float32)
        for n in range(0, N, BLOCK_I):
            rn = (n + tl.arange(0, BLOCK_I)).to(tl.int64)
            dy_tile = tl.load(
                dy_ptr + rm[:, None] * N + rn[None, :],
                mask=(rm[:, None] < stop) & (rn[None, :] < N),
                other=0.0,
            )  # (BLOCK_M, BLOCK_I)
            w_tile = expert_tile(
                packed_ptr, absmax_ptr, nested_ptr, nested_code_ptr, offset_ptr, code_ptr,
                expert, rn, col, N, K,
                CODE, LOG_BLOCK, NESTED, DECODE, DTYPE, BLOCK_I, BLOCK_O,
            )  # fmt: skip
            acc = dot(tl.trans(w_tile), tl.trans(dy_tile), acc)
        dx = tl.trans(acc)
        if HAS_LOW:
            EXACT: tl.constexpr = tl.float32 == DTYPE
            dx += expert_update(
                low_ptr, factor_ptr, expert, rm, stop, rk, K, R, K, 1,
                EXACT, BLOCK_M, BLOCK_O, BLOCK_R,
            )  # fmt: skip
        pointers = dx_ptr + rm[:, None] * K + rk[None, :]
        tl.store(pointers, dx.to(DTYPE), mask=(rm[:, None] < stop) & (rk[None, :] < K))


@triton.jit
def experts_gradient_kernel(
    low_ptr,
    wide_ptr,
    out_ptr,
    ends_ptr,
    O,
    R,
    scale,
    stride_or,
    stride_oo,
    BLOCK_M: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Store out_e (R, O), by its strides, = scale low^T wide over the rows of e; wide (M, O)."""
    expert = tl.program_id(2)
    stop = tl.load(ends_ptr + expert)
    start = tl.load(ends_ptr + expert - 1, mask=expert > 0, other=0)
    ro = tl.program_id(0).to(tl.int64) * BLOCK_O + tl.arange(0, BLOCK_O)
    rr = (tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
    acc = tl.zeros((BLOCK_O, BLOCK_R), tl.float32)
    rest = tl.zeros((BLOCK_O, BLOCK_R), tl.float32)
    for m in range(start, stop, BLOCK_M):
        rm = (m + tl.arange(0, BLOCK_M)).to(tl.int64)
        low = tl.load(
            low_ptr + rm[:, None] * R + rr[None, :],
            mask=(rm[:, None] < stop) & (rr[None, :] < R),
            other=0.0,
        )  # (BLOCK_M, BLOCK_R)
        wide = tl.load(
            wide_ptr + rm[:, None] * O + ro[None, :],
            mask=(rm[:, None] < stop) & (ro[None, :] < O),
            other=0.0,
        )  # (BLOCK_M, BLOCK_O)
        acc, rest = mixed_dot(tl.trans(wide), low, acc, rest)
    base = out_ptr + tl.cast(expert, tl.int64) * R * O
    pointers = base + rr[None, :] * stride_or + ro[:, None] * stride_oo
    out = (total(acc, rest) * scale).to(out_ptr.dtype.element_ty)
    tl.store(pointers, out, mask=(rr[None, :] < R) & (ro[:, None] < O))
