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
2. `low_rank_finish_kernel`: adds the parts in a fixed order (no atomics, so two runs give the same
   bits), then bias and second factor.

`lora_linear_gemv_kernel` is the forward's first launch for one token without matrix instructions.

The three partial kernels have one list of parameters, as one place launches them
(`fused.partial_product`); the gemv kernel has one token and so ignores M, stride_xm, ORDER, SINGLE
and BLOCK_M, and the backward kernel, whose weights pass through shared memory, ignores ORDER.

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
from fastlora_kernels._low_rank_tiles import NO_SPECIAL, low_rank_partial, low_rank_vector
from fastlora_kernels._tiles import dot, mixed_dot, total


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
    SINGLE: tl.constexpr,
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
        if x_ptr.dtype.element_ty != DTYPE:
            acc = total(acc, rest)
        tl.store(pointers, acc, mask=(rn[:, None] < N) & (rm[None, :] < M))
    elif SINGLE:
        low_rank_vector(
            x_ptr, factor_ptr, low_ptr, seed_ptr, tile - tiles, part, start, stop,
            R, threshold, stride_xk, stride_fr, stride_fk, DROP, BLOCK_R,
        )  # fmt: skip
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
    SINGLE: tl.constexpr,
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
        SWAP: tl.constexpr = BLOCK_M < 64  # else tokens fill the long side of the instruction
        acc = tl.zeros((BLOCK_O, BLOCK_M) if SWAP else (BLOCK_M, BLOCK_O), tl.float32)
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
            if SWAP:
                acc = dot(tl.trans(w_tile), tl.trans(dy_tile), acc)
            else:
                acc = dot(dy_tile, w_tile, acc)
        acc = tl.trans(acc) if SWAP else acc
        pointers = part_ptr + (part * M + rm)[:, None] * K + rk[None, :]
        tl.store(pointers, acc, mask=(rk[None, :] < K) & (rm[:, None] < M))
    elif SINGLE:
        low_rank_vector(
            dy_ptr, factor_ptr, low_ptr, seed_ptr, tile - tiles, part, start, stop,
            R, threshold, stride_yn, stride_fr, stride_fn, DROP, BLOCK_R,
        )  # fmt: skip
    else:
        low_rank_partial(
            dy_ptr, factor_ptr, low_ptr, seed_ptr, first_m, tile - tiles, part, start, stop,
            M, R, threshold, stride_ym, stride_yn, stride_fr, stride_fn, DROP, BLOCK_M, BLOCK_R,
        )  # fmt: skip


@triton.jit(do_not_specialize=NO_SPECIAL)
def lora_linear_gemv_kernel(
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
    SINGLE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """part[p] = x W^T and low[p] = drop(x) A^T over columns [p span, (p + 1) span) of K; M is 1.

    Every lane has sums of its own, BLOCK_I to a row; they are added as a tree at the end.
    """
    tile = tl.program_id(1).to(tl.int64)
    part = tl.program_id(2).to(tl.int64)
    start = tl.program_id(2) * span
    stop = tl.minimum(start + span, K)
    tiles = tl.cdiv(N, BLOCK_O)
    if tile < tiles:
        rn = tile * BLOCK_O + tl.arange(0, BLOCK_O)
        offset = tl.load(offset_ptr) if NESTED else 0.0
        acc = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
        for k in range(start, stop, BLOCK_I):
            rk = (k + tl.arange(0, BLOCK_I)).to(tl.int64)
            x = tl.load(x_ptr + rk * stride_xk, mask=rk < stop, other=0.0).to(tl.float32)
            w_tile = weight_tile(
                packed_ptr, absmax_ptr, nested_ptr, nested_code_ptr, offset, code_ptr,
                rn, k, N, K, words_per_row,
                CODE, LOG_BLOCK, NESTED, DECODE, DTYPE, BLOCK_O, BLOCK_I,
            )  # fmt: skip
            acc = tl.fma(w_tile.to(tl.float32), x[None, :], acc)
        tl.store(part_ptr + part * N + rn, tl.sum(acc, 1), mask=rn < N)
    else:
        low_rank_vector(
            x_ptr, factor_ptr, low_ptr, seed_ptr, tile - tiles, part, start, stop,
            R, threshold, stride_xk, stride_fr, stride_fk, DROP, BLOCK_R,
        )  # fmt: skip
