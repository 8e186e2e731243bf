# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Triton kernels of the LoRA linear over a packed 4-bit weight, for few tokens.

Forward ``y = x W^T + b + s (x A^T) B^T`` and its input gradient ``dx = dy W + s (dy B) A`` have one
shape: a product with the weight and a product with the first low-rank factor, both summed over the
same long axis, then the second factor. So each direction takes two launches:

1. a partial kernel: programs [0, tiles) of axis 1 multiply with decoded weight tiles, the others
   with the low-rank factor; axis 2 cuts the long sum into parts, so that few tokens still fill the
   device. Operands are swapped (Y^T = W X^T): the weight takes the long side of the matrix
   instruction and the tokens its short one.
2. `lora_linear_finish_kernel`: adds the parts in a fixed order (no atomics, so two runs give the
   same bits), then bias and second factor.

- x (M, K), dy (M, N): float32, bfloat16 or float16, any strides
- W: packed uint8, row-major over the flattened (N, K); see `dequantize`
- lora_A (R, K), lora_B (N, R): x's dtype or float32, any strides; R of any size
- part (parts, M, out) and low (parts, M, R): float32

Work: 2 M N K flops in the matrix unit and about 10 machine instructions to decode each weight;
traffic: 0.5 + 1 / blocksize bytes per weight and 8 parts M out bytes of partial sums, which stay in
the second-level cache.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastlora_kernels._tiles import dot, low_rank_dot, weight_tile


@triton.jit
def low_rank_partial(
    x_ptr,
    factor_ptr,
    low_ptr,
    first_m,
    tile,
    part,
    start,
    stop,
    M,
    R,
    stride_xm,
    stride_xi,
    stride_fr,
    stride_fi,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    """Store one tile of low[part] = x[:, start:stop] @ factor[:, start:stop]^T.

    Tiles count through the BLOCK_M tokens from `first_m` in steps of BLOCK_R, then through the
    ranks: they are small, because a float32 factor is multiplied without matrix instructions.
    """
    TILES_M: tl.constexpr = BLOCK_M // BLOCK_R
    rm = first_m + tile % TILES_M * BLOCK_R + tl.arange(0, BLOCK_R)
    rr = tile // TILES_M * BLOCK_R + tl.arange(0, BLOCK_R)
    WIDE: tl.constexpr = x_ptr.dtype.element_ty != factor_ptr.dtype.element_ty
    STEP: tl.constexpr = 32 if WIDE else BLOCK_I  # float32 operands take twice the registers
    acc = tl.zeros((BLOCK_R, BLOCK_R), tl.float32)
    for i in range(start, stop, STEP):
        ri = (i + tl.arange(0, STEP)).to(tl.int64)
        x_mask = (ri[:, None] < stop) & (rm[None, :] < M)
        x_tile = tl.load(
            x_ptr + ri[:, None] * stride_xi + rm[None, :] * stride_xm, mask=x_mask, other=0.0
        )  # (STEP, BLOCK_R)
        f_mask = (rr[:, None] < R) & (ri[None, :] < stop)
        f_tile = tl.load(
            factor_ptr + rr[:, None] * stride_fr + ri[None, :] * stride_fi, mask=f_mask, other=0.0
        )  # (BLOCK_R, STEP)
        if WIDE:
            acc = dot(f_tile.to(tl.float32), x_tile.to(tl.float32), acc)
        else:
            acc = dot(f_tile, x_tile, acc)
    pointers = low_ptr + (part * M + rm)[None, :] * R + rr[:, None]
    tl.store(pointers, acc, mask=(rr[:, None] < R) & (rm[None, :] < M))


@triton.jit
def lora_linear_fwd_kernel(
    x_ptr,
    packed_ptr,
    absmax_ptr,
    nested_ptr,
    nested_code_ptr,
    code_ptr,
    nested_offset,
    factor_ptr,
    part_ptr,
    low_ptr,
    M,
    N,
    K,
    R,
    span,
    stride_xm,
    stride_xk,
    stride_fr,
    stride_fk,
    LOG_BLOCK: tl.constexpr,
    NESTED: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """part[p] = x W^T and low[p] = x A^T over columns [p span, (p + 1) span) of K."""
    first_m = tl.program_id(0).to(tl.int64) * BLOCK_M
    rm = first_m + tl.arange(0, BLOCK_M)
    tile = tl.program_id(1).to(tl.int64)
    part = tl.program_id(2).to(tl.int64)
    start = tl.program_id(2) * span
    stop = tl.minimum(start + span, K)
    tiles = tl.cdiv(N, BLOCK_O)
    if tile < tiles:
        rn = tile * BLOCK_O + tl.arange(0, BLOCK_O)
        code = tl.load(code_ptr + tl.arange(0, 16))
        acc = tl.zeros((BLOCK_O, BLOCK_M), tl.float32)
        for k in range(start, stop, BLOCK_I):
            rk = (k + tl.arange(0, BLOCK_I)).to(tl.int64)
            x_tile = tl.load(
                x_ptr + rk[:, None] * stride_xk + rm[None, :] * stride_xm,
                mask=(rk[:, None] < stop) & (rm[None, :] < M),
                other=0.0,
            )  # (BLOCK_I, BLOCK_M)
            w_tile = weight_tile(
                packed_ptr, absmax_ptr, nested_ptr, nested_code_ptr, nested_offset, code,
                rn, k, N, K, LOG_BLOCK, NESTED, ALIGNED, BLOCK_O, BLOCK_I,
            )  # fmt: skip
            acc = dot(w_tile.to(x_tile.dtype), x_tile, acc)
        pointers = part_ptr + (part * M + rm)[None, :] * N + rn[:, None]
        tl.store(pointers, acc, mask=(rn[:, None] < N) & (rm[None, :] < M))
    else:
        low_rank_partial(
            x_ptr, factor_ptr, low_ptr, first_m, tile - tiles, part, start, stop, M, R,
            stride_xm, stride_xk, stride_fr, stride_fk, BLOCK_M, BLOCK_R, BLOCK_I,
        )  # fmt: skip


@triton.jit
def lora_linear_bwd_dx_kernel(
    dy_ptr,
    packed_ptr,
    absmax_ptr,
    nested_ptr,
    nested_code_ptr,
    code_ptr,
    nested_offset,
    factor_ptr,
    part_ptr,
    low_ptr,
    M,
    N,
    K,
    R,
    span,
    stride_ym,
    stride_yn,
    stride_fr,
    stride_fn,
    LOG_BLOCK: tl.constexpr,
    NESTED: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """part[p] = dy W and low[p] = dy B over rows [p span, (p + 1) span) of N."""
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
        code = tl.load(code_ptr + tl.arange(0, 16))
        acc = tl.zeros((BLOCK_O, BLOCK_M), tl.float32)
        for n in range(start, stop, BLOCK_I):
            rn = (n + tl.arange(0, BLOCK_I)).to(tl.int64)
            dy_tile = tl.load(
                dy_ptr + rn[:, None] * stride_yn + rm[None, :] * stride_ym,
                mask=(rn[:, None] < stop) & (rm[None, :] < M),
                other=0.0,
            )  # (BLOCK_I, BLOCK_M)
            w_tile = weight_tile(
                packed_ptr, absmax_ptr, nested_ptr, nested_code_ptr, nested_offset, code,
                rn, col, N, K, LOG_BLOCK, NESTED, ALIGNED, BLOCK_I, BLOCK_O,
            )  # fmt: skip
            acc = dot(tl.trans(w_tile.to(dy_tile.dtype)), dy_tile, acc)
        pointers = part_ptr + (part * M + rm)[None, :] * K + rk[:, None]
        tl.store(pointers, acc, mask=(rk[:, None] < K) & (rm[None, :] < M))
    else:
        low_rank_partial(
            dy_ptr, factor_ptr, low_ptr, first_m, tile - tiles, part, start, stop, M, R,
            stride_ym, stride_yn, stride_fr, stride_fn, BLOCK_M, BLOCK_R, BLOCK_I,
        )  # fmt: skip


@triton.jit
def lora_linear_finish_kernel(
    part_ptr,
    bias_ptr,
    low_ptr,
    factor_ptr,
    out_ptr,
    low_out_ptr,
    M,
    O,
    R,
    parts,
    scaling,
    stride_fr,
    stride_fo,
    HAS_BIAS: tl.constexpr,
    HAS_LOW: tl.constexpr,
    STORE_LOW: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Store out = sum of part + bias + scaling (sum of low) factor, and low_out = sum of low.

    part (parts, M, O), low (parts, M, R), factor (R, O) by its strides, out (M, O), low_out (M, R).
    With one part, `part_ptr` may be `out_ptr`: the adapter is then added in place.
    """
    rm = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    ro = tl.program_id(1).to(tl.int64) * BLOCK_O + tl.arange(0, BLOCK_O)
    acc = tl.zeros((BLOCK_M, BLOCK_O), tl.float32)
    if HAS_LOW:
        EXACT: tl.constexpr = out_ptr.dtype.element_ty == tl.float32
        for r in range(0, R, BLOCK_R):
            rr = r + tl.arange(0, BLOCK_R)
            low_mask = (rm[:, None] < M) & (rr[None, :] < R)
            low = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
            for p in range(0, parts):
                pointers = low_ptr + (p * M.to(tl.int64) + rm)[:, None] * R + rr[None, :]
                low += tl.load(pointers, mask=low_mask, other=0.0)
            if STORE_LOW:  # noqa: SIM102 (decided at compile time)
                if tl.program_id(1) == 0:
                    tl.store(low_out_ptr + rm[:, None] * R + rr[None, :], low, mask=low_mask)
            pointers = factor_ptr + rr.to(tl.int64)[:, None] * stride_fr + ro[None, :] * stride_fo
            f_mask = (rr[:, None] < R) & (ro[None, :] < O)
            factor = tl.load(pointers, mask=f_mask, other=0.0)  # (BLOCK_R, BLOCK_O)
            acc = low_rank_dot(low, factor, acc, EXACT)
        acc *= scaling
    mask = (rm[:, None] < M) & (ro[None, :] < O)
    base = tl.zeros((BLOCK_M, BLOCK_O), tl.float32)
    for p in range(0, parts):
        pointers = part_ptr + (p * M.to(tl.int64) + rm)[:, None] * O + ro[None, :]
        base += tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
    if HAS_BIAS:
        base += tl.load(bias_ptr + ro, mask=ro < O, other=0.0).to(tl.float32)[None, :]
    out = (base + acc).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + rm[:, None] * O + ro[None, :], out, mask=mask)
