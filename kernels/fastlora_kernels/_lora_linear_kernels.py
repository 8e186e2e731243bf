# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Triton kernels of the LoRA linear over a packed 4-bit weight, for few tokens.

Forward ``y = x W^T + b + c s B^T``, ``s = spans(drop(x) A^T)``, and its input gradient
``dx = dy W + drop(ds A)``, ``ds = spans(c dy B)``, have one shape: a product with the weight and a
product with the first low-rank factor, both summed over the same long axis, then the second factor.
So each direction takes two launches:

1. a partial kernel: programs [0, tiles) of axis 1 multiply with decoded weight tiles, the others
   with the low-rank factor; axis 2 cuts the long sum into parts, so that few tokens still fill the
   device. Operands are swapped (Y^T = W X^T): the weight takes the long side of the matrix
   instruction and the tokens its short one. Forward, weights go from the decoder to the matrix
   instruction in registers (`_decode.permute_k`).
2. `lora_linear_finish_kernel`: adds the parts in a fixed order (no atomics, so two runs give the
   same bits), then bias and second factor.

- x (M, K), dy (M, N): float32, bfloat16 or float16, any strides
- W: packed uint8, row-major over the flattened (N, K); see `dequantize`
- lora_A (R, K), lora_B (N, R): x's dtype or float32, any strides; R of any size
- part (parts, M, out) and low (parts, M, R): float32

Work: 2 M N K flops in the matrix unit and about 4 machine instructions to decode each weight and
multiply it; traffic: 0.5 + 1 / blocksize bytes per weight and 8 parts M out bytes of partial sums,
which stay in the second-level cache.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastlora_kernels._decode import permute_k, weight_tile
from fastlora_kernels._tiles import (
    covered,
    kept,
    low_rank_dot,
    mixed_dot,
    row_keys,
    span_bounds,
    total,
)

NO_SPECIAL = ["threshold"]  # a probability as an integer: its value must not make new kernels


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

    Tiles count through the BLOCK_M tokens from `first_m` in steps of BLOCK_R, then through the
    ranks.
    """
    TILES_M: tl.constexpr = BLOCK_M // BLOCK_R
    STEP: tl.constexpr = 64
    rm = first_m + tile % TILES_M * BLOCK_R + tl.arange(0, BLOCK_R)
    rr = tile // TILES_M * BLOCK_R + tl.arange(0, BLOCK_R)
    acc = tl.zeros((BLOCK_R, BLOCK_R), tl.float32)
    rest = tl.zeros((BLOCK_R, BLOCK_R), tl.float32)
    for i in range(start, stop, STEP):
        ri = (i + tl.arange(0, STEP)).to(tl.int64)
        mask = (rm[:, None] < M) & (ri[None, :] < stop)
        if DROP:
            keys = row_keys(seed_ptr, rm)
            mask &= kept(keys[:, None], ri[None, :], threshold)
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


@triton.jit(do_not_specialize=NO_SPECIAL)
def lora_linear_fwd_kernel(
    x_ptr,
    packed_ptr,
    absmax_ptr,
    nested_ptr,
    nested_code_ptr,
    offset_ptr,
    code_ptr,
    factor_ptr,
    part_ptr,
    low_ptr,
    seed_ptr,
    M,
    N,
    K,
    R,
    span,
    words_per_row,
    threshold,
    stride_xm,
    stride_xk,
    stride_fr,
    stride_fk,
    CODE: tl.constexpr,
    LOG_BLOCK: tl.constexpr,
    NESTED: tl.constexpr,
    DECODE: tl.constexpr,
    ORDER: tl.constexpr,
    DTYPE: tl.constexpr,
    DROP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """part[p] = x W^T and low[p] = drop(x) A^T over columns [p span, (p + 1) span) of K."""
    first_m = tl.program_id(0).to(tl.int64) * BLOCK_M
    rm = first_m + tl.arange(0, BLOCK_M)
    tile = tl.program_id(1).to(tl.int64)
    part = tl.program_id(2).to(tl.int64)
    start = tl.program_id(2) * span
    stop = tl.minimum(start + span, K)
    tiles = tl.cdiv(N, BLOCK_O)
    if tile < tiles:
        rn = tile * BLOCK_O + tl.arange(0, BLOCK_O)
        offset = tl.load(offset_ptr) if NESTED else 0.0
        acc = tl.zeros((BLOCK_O, BLOCK_M), tl.float32)
        rest = tl.zeros((BLOCK_O, BLOCK_M), tl.float32)
        for k in range(start, stop, BLOCK_I):
            rk = k + tl.arange(0, BLOCK_I)
            mask = rm[:, None] < M
            if DECODE == "ragged":
                mask &= rk[None, :] < stop
            x_tile = tl.load(
                x_ptr + rm[:, None] * stride_xm + rk[None, :].to(tl.int64) * stride_xk,
                mask=mask,
                other=0.0,
            )  # (BLOCK_M, BLOCK_I)
            w_tile = weight_tile(
                packed_ptr, absmax_ptr, nested_ptr, nested_code_ptr, offset, code_ptr,
                rn, k, N, K, words_per_row,
                CODE, LOG_BLOCK, NESTED, DECODE, DTYPE, BLOCK_O, BLOCK_I,
            )  # fmt: skip
            w_tile = permute_k(w_tile, BLOCK_O, BLOCK_I, ORDER)
            x_tile = permute_k(x_tile, BLOCK_M, BLOCK_I, ORDER)
            acc, rest = mixed_dot(w_tile, tl.trans(x_tile), acc, rest)
        pointers = part_ptr + (part * M + rm)[None, :] * N + rn[:, None]
        if DTYPE != x_ptr.dtype.element_ty:
            acc = total(acc, rest)
        tl.store(pointers, acc, mask=(rn[:, None] < N) & (rm[None, :] < M))
    else:
        low_rank_partial(
            x_ptr, factor_ptr, low_ptr, seed_ptr, first_m, tile - tiles, part, start, stop,
            M, R, threshold, stride_xm, stride_xk, stride_fr, stride_fk, DROP, BLOCK_M, BLOCK_R,
        )  # fmt: skip


@triton.jit(do_not_specialize=NO_SPECIAL)
def lora_linear_bwd_dx_kernel(
    dy_ptr,
    packed_ptr,
    absmax_ptr,
    nested_ptr,
    nested_code_ptr,
    offset_ptr,
    code_ptr,
    factor_ptr,
    part_ptr,
    low_ptr,
    seed_ptr,
    M,
    N,
    K,
    R,
    span,
    words_per_row,
    threshold,
    stride_ym,
    stride_yn,
    stride_fr,
    stride_fn,
    CODE: tl.constexpr,
    LOG_BLOCK: tl.constexpr,
    NESTED: tl.constexpr,
    DECODE: tl.constexpr,
    ORDER: tl.constexpr,
    DTYPE: tl.constexpr,
    DROP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """part[p] = dy W and low[p] = dy B over rows [p span, (p + 1) span) of N; DROP is False."""
    first_m = tl.program_id(0).to(tl.int64) * BLOCK_M
    rm = first_m + tl.arange(0, BLOCK_M)
    tile = tl.program_id(1).to(tl.int64)
    part = tl.program_id(2).to(tl.int64)
    start = tl.program_id(2) * span
    stop = tl.minimum(start + span, N)
    tiles = tl.cdiv(K, BLOCK_O)
    if tile < tiles:
        rk = tile * BLOCK_O + tl.arange(0, BLOCK_O)
        col = tl.program_id(1) * BLOCK_O
        offset = tl.load(offset_ptr) if NESTED else 0.0
        acc = tl.zeros((BLOCK_O, BLOCK_M), tl.float32)
        for n in range(start, stop, BLOCK_I):
            rn = (n + tl.arange(0, BLOCK_I)).to(tl.int64)
            dy_tile = tl.load(
                dy_ptr + rm[:, None] * stride_ym + rn[None, :] * stride_yn,
                mask=(rm[:, None] < M) & (rn[None, :] < stop),
                other=0.0,
            )  # (BLOCK_M, BLOCK_I)
            w_tile = weight_tile(
                packed_ptr, absmax_ptr, nested_ptr, nested_code_ptr, offset, code_ptr,
                rn, col, N, K, words_per_row,
                CODE, LOG_BLOCK, NESTED, DECODE, DTYPE, BLOCK_I, BLOCK_O,
            )  # fmt: skip
            acc, _ = mixed_dot(tl.trans(w_tile), tl.trans(dy_tile), acc, acc)
        pointers = part_ptr + (part * M + rm)[None, :] * K + rk[:, None]
        tl.store(pointers, acc, mask=(rk[:, None] < K) & (rm[None, :] < M))
    else:
        low_rank_partial(
            dy_ptr, factor_ptr, low_ptr, seed_ptr, first_m, tile - tiles, part, start, stop,
            M, R, threshold, stride_ym, stride_yn, stride_fr, stride_fn, DROP, BLOCK_M, BLOCK_R,
        )  # fmt: skip


@triton.jit(do_not_specialize=NO_SPECIAL)
def lora_linear_finish_kernel(
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
        pointers = part_ptr + (p.to(tl.int64) * M + rm)[:, None] * O + ro[None, :]
        base += tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
    if HAS_BIAS:
        base += tl.load(bias_ptr + ro, mask=ro < O, other=0.0).to(tl.float32)[None, :]
    if HAS_LOW:
        EXACT: tl.constexpr = out_ptr.dtype.element_ty == tl.float32
        first, last = span_bounds(spans_ptr, rm, M, R, SPANS)
        acc = tl.zeros((BLOCK_M, BLOCK_O), tl.float32)
        rest = tl.zeros((BLOCK_M, BLOCK_O), tl.float32)
        for r in range(0, R, BLOCK_R):
            rr = r + tl.arange(0, BLOCK_R)
            inside = (rm[:, None] < M) & (rr[None, :] < R)
            low_mask = inside & (rr[None, :] >= first[:, None]) & (rr[None, :] < last[:, None])
            low = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
            for p in range(0, low_parts):
                pointers = low_ptr + (p.to(tl.int64) * M + rm)[:, None] * R + rr[None, :]
                low += tl.load(pointers, mask=low_mask, other=0.0)
            low *= low_scale
            if tl.program_id(1) == 0:
                tl.store(low_out_ptr + rm[:, None] * R + rr[None, :], low, mask=inside)
            pointers = factor_ptr + rr.to(tl.int64)[:, None] * stride_fr + ro[None, :] * stride_fo
            f_mask = (rr[:, None] < R) & (ro[None, :] < O)
            factor = tl.load(pointers, mask=f_mask, other=0.0)  # (BLOCK_R, BLOCK_O)
            acc, rest = low_rank_dot(low, factor, acc, rest, EXACT)
        acc = total(acc, rest) * out_scale
        if DROP:
            keys = row_keys(seed_ptr, rm)
            acc = tl.where(kept(keys[:, None], ro[None, :], threshold), acc, 0.0)
        base += acc
    tl.store(
        out_ptr + rm[:, None] * O + ro[None, :], base.to(out_ptr.dtype.element_ty), mask=mask
    )
