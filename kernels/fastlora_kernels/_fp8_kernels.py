# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Kernels that write e4m3: rows of activations, and a 4-bit weight in one launch.

The definition, with the scales, is `fastlora_kernels.fp8`; values are equal to its bits.

- `fp8_quantize_fwd_kernel`: x (M, K), any float and strides -> q uint8 (M, K), the bits of e4m3,
  and s float32 (M,). Traffic: 2 bytes per value read from memory and again from the cache, 1
  written.
- `fp8_dequantize_fwd_kernel`: a packed weight -> p uint8 (N, K), or (K, N) with TRANSPOSE, the bits
  of e4m3, and t float32, one equal entry per row of p. Traffic: 0.5 + 4 / blocksize bytes per value
  read (0.5 + 1 / blocksize when double-quantised), 1 written.

On NVIDIA a weight is decoded by byte permutes: the sixteen products of a block are rounded once to
bytes in four registers, of which the permute takes four at a time: 13 instructions for eight
weights. Elsewhere each nibble is looked up and rounded by itself: the same bits.

Source: Dettmers et al. 2023, arXiv:2305.14314; Micikevicius et al. 2022, arXiv:2209.05433.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastlora_kernels._decode import load_absmax, lookup, unpack

# Eight nibbles of $2 through the table of sixteen bytes $3..$6: $0 and $1 each hold four e4m3
# values, in the order of memory. m: three bits of each nibble, which select in a table of eight
# bytes; h: the fourth bit, which selects between two such tables.
_LOOKUP8 = """{
.reg .b32 m, h, p, q, c4, c3;
mov.b32 c4, 0x44444444;
mov.b32 c3, 0x32103210;
and.b32 m, $2, 0x77777777;
shr.u32 h, $2, 1;
lop3.b32 h, h, c4, c3, 0xEA;
prmt.b32 p, $3, $4, m;
prmt.b32 q, $5, $6, m;
prmt.b32 p, p, q, h;
prmt.b32 $0, p, p, 0x2301;
shr.u32 m, m, 16;
shr.u32 h, h, 16;
prmt.b32 p, $3, $4, m;
prmt.b32 q, $5, $6, m;
prmt.b32 p, p, q, h;
prmt.b32 $1, p, p, 0x2301;
}"""
LOOKUP8 = tl.constexpr(_LOOKUP8)
LOOKUP8_REGISTERS = tl.constexpr("=&r,=&r,r,r,r,r,r")
_PAIR8 = """{
.reg .b16 h;
cvt.rn.satfinite.e4m3x2.f32 h, $2, $1;
cvt.u32.u16 $0, h;
}"""
PAIR8 = tl.constexpr(_PAIR8)
TINY = tl.constexpr(2.0**-100)


@triton.jit
def power_of_two(peak):
    """Return the least power of two s with peak / s <= 448, and 1 / s; see `fp8.power_of_two`."""
    bits = tl.maximum(peak, TINY).to(tl.int32, bitcast=True)
    scale = ((bits + 0x1FFFFF) & 0x7F800000) - (8 << 23)
    return scale.to(tl.float32, bitcast=True), ((254 << 23) - scale).to(tl.float32, bitcast=True)


@triton.jit
def fp8_quantize_fwd_kernel(x_ptr, q_ptr, scale_ptr, K, stride_m, stride_k, BLOCK_K: tl.constexpr):
    """Round one row of x to e4m3 with its own scale."""
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK_K)
    x_ptr += row * stride_m
    peaks = tl.zeros([BLOCK_K], tl.float32)
    for start in range(0, K, BLOCK_K):
        col = (start + cols).to(tl.int64)
        size = tl.abs(tl.load(x_ptr + col * stride_k, mask=col < K, other=0.0).to(tl.float32))
        peaks = tl.maximum(peaks, tl.where(size < float("inf"), size, float("inf")))
    peak = tl.max(peaks, 0)
    finite = peak < float("inf")
    scale, inverse = power_of_two(tl.where(finite, peak, 1.0))
    tl.store(scale_ptr + row, tl.where(finite, scale, float("nan")))
    for start in range(0, K, BLOCK_K):
        col = (start + cols).to(tl.int64)
        x = tl.load(x_ptr + col * stride_k, mask=col < K, other=0.0).to(tl.float32)
        q = tl.where(finite, x * inverse, 0.0).to(tl.float8e4nv)
        tl.store(q_ptr + row * K + col, q.to(tl.uint8, bitcast=True), mask=col < K)


@triton.jit
def pair8(absmax, FIRST: tl.constexpr, SECOND: tl.constexpr):
    """Return the products of two code values, rounded to e4m3, as the low bytes of an int32."""
    both = [absmax * FIRST, absmax * SECOND]
    return tl.inline_asm_elementwise(PAIR8, "=r,f,f", both, dtype=tl.int32, is_pure=True, pack=1)


@triton.jit
def quad8(absmax, CODE: tl.constexpr, FIRST: tl.constexpr):
    """Return the products of four code values from FIRST on as the bytes of an int32."""
    low = pair8(absmax, CODE[FIRST], CODE[FIRST + 1])
    return low | (pair8(absmax, CODE[FIRST + 2], CODE[FIRST + 3]) << 16)


@triton.jit
def lookup8(words, absmax, CODE: tl.constexpr):
    """Return the e4m3 values of packed words by byte permutes.

    Args:
        words: (ROWS, BLOCKS, WORDS) int32, eight nibbles each.
        absmax: (ROWS, BLOCKS) float32, divided by the scale.
        CODE: the sixteen float32 values of the format.

    Returns:
        Two (ROWS, BLOCKS, WORDS) int32, each four values in the order of memory.
    """
    t0, t1 = quad8(absmax, CODE, 0), quad8(absmax, CODE, 4)
    t2, t3 = quad8(absmax, CODE, 8), quad8(absmax, CODE, 12)
    operands = [words, t0[:, :, None], t1[:, :, None], t2[:, :, None], t3[:, :, None]]
    return tl.inline_asm_elementwise(
        LOOKUP8, LOOKUP8_REGISTERS, operands, dtype=(tl.int32, tl.int32), is_pure=True, pack=1
    )


@triton.jit
def bytes_of(words):
    """Return the four bytes of each int32 in the order of memory: (..., 2, 2) int8."""
    even, odd = tl.join(words, words >> 16), tl.join(words >> 8, words >> 24)
    return tl.join(even, odd).to(tl.int8)


@triton.jit
def fp8_dequantize_fwd_kernel(
    packed_ptr,
    absmax_ptr,
    nested_ptr,
    nested_code_ptr,
    offset_ptr,
    code_ptr,
    peak_ptr,
    out_ptr,
    scale_ptr,
    N,
    K,
    CODE: tl.constexpr,
    LOG_BLOCK: tl.constexpr,
    NESTED: tl.constexpr,
    DECODE: tl.constexpr,
    TRANSPOSE: tl.constexpr,
    PART: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """Decode ROWS x COLS values; PART consecutive ones of a row, aligned, have one magnitude."""
    left, top = tl.program_id(0).to(tl.int64) * COLS, tl.program_id(1).to(tl.int64) * ROWS
    row, col = top + tl.arange(0, ROWS), left + tl.arange(0, COLS)
    offset = tl.load(offset_ptr) if NESTED else 0.0
    peak = tl.load(peak_ptr)
    if NESTED:
        peak += tl.abs(offset)
    scale, inverse = power_of_two(peak)
    scale = tl.where(peak < float("inf"), scale, float("nan"))
    part = left + tl.arange(0, COLS // PART) * PART
    first = row[:, None] * K + part[None, :]  # (ROWS, COLS // PART)
    inside = (row < N)[:, None] & (part < K)[None, :]
    absmax = inverse * load_absmax(
        absmax_ptr, nested_ptr, nested_code_ptr, offset, first >> LOG_BLOCK, inside, NESTED
    )
    if DECODE == "prmt":
        word = (first >> 3)[:, :, None] + tl.arange(0, PART // 8)[None, None, :]
        words_ptr = packed_ptr.to(tl.pointer_type(tl.int32))
        words = tl.load(words_ptr + word, mask=inside[:, :, None], other=0)
        low, high = lookup8(words, absmax, CODE)
        values = tl.join(low, high)  # four bytes each
        if TRANSPOSE:
            values = bytes_of(values).reshape(ROWS, COLS)
        else:
            values = values.reshape(ROWS, COLS // 4)
    else:
        code = tl.load(code_ptr + tl.arange(0, 16))
        pair = (left >> 1) + tl.arange(0, COLS // 2)
        known = (row < N)[:, None] & (pair < (K >> 1))[None, :]
        byte = (row * (K >> 1))[:, None] + pair[None, :]
        packed = tl.load(packed_ptr + byte, mask=known, other=0)
        found = lookup(code, unpack(packed, ROWS, COLS), ROWS, COLS)
        found = found.reshape(ROWS, COLS // PART, PART) * absmax[:, :, None]
        values = found.reshape(ROWS, COLS).to(tl.float8e4nv).to(tl.int8, bitcast=True)
    if TRANSPOSE:
        mask = (row < N)[:, None] & (col < K)[None, :]
        tl.store(out_ptr + col[None, :] * N + row[:, None], values, mask=mask)
        if top == 0:
            tl.store(scale_ptr + col, scale + tl.zeros([COLS], tl.float32), mask=col < K)
    else:
        WIDE: tl.constexpr = 4 if DECODE == "prmt" else 1  # values per element of the tile
        group = (left // WIDE) + tl.arange(0, COLS // WIDE)
        pointer = out_ptr.to(tl.pointer_type(tl.int32)) if DECODE == "prmt" else out_ptr
        mask = (row < N)[:, None] & (group < K // WIDE)[None, :]
        tl.store(pointer + (row * (K // WIDE))[:, None] + group[None, :], values, mask=mask)
        if left == 0:
            tl.store(scale_ptr + row, scale + tl.zeros([ROWS], tl.float32), mask=row < N)
