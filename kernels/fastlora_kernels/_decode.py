# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Device helpers that decode tiles of a packed 4-bit weight.

A weight is ``float32(code[nibble] * absmax[block])`` rounded once to the target dtype, and a
double-quantised absmax is ``nested_code[byte] * nested_absmax[block // 256] + offset`` with the
product rounded before the sum: both bit-equal to bitsandbytes. Kernels that decode are launched
with ``enable_fp_fusion=False``, or the compiler would fuse that product and sum.

Three ways, the same bits:

- "prmt" (NVIDIA, 16-bit values): the sixteen products of a block are rounded once, split into two
  planes of bytes in eight registers, and the byte-permute instruction looks four weights up at a
  time: 21 instructions for eight weights, no access to memory. `permute_k` then orders the columns
  so that a thread's weights are those that its part of the matrix instruction takes;
- "gather" (any GPU and dtype): each nibble is looked up in a 16-word table in shared memory;
- "ragged": as "gather", for rows that share bytes or blocks, value by value.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Eight nibbles of $4 through the tables $5..$8 (low bytes) and $9..$12 (high bytes): $0..$3 each
# hold two 16-bit values, in the order of memory. m: three bits of each nibble, which select in a
# table of eight bytes; h: the fourth bit, which selects between two such tables.
_LOOKUP = """{
.reg .b32 m, h, p, q, l, g, c4, c3;
mov.b32 c4, 0x44444444;
mov.b32 c3, 0x32103210;
and.b32 m, $4, 0x77777777;
shr.u32 h, $4, 1;
lop3.b32 h, h, c4, c3, 0xEA;
prmt.b32 p, $5, $6, m;
prmt.b32 q, $7, $8, m;
prmt.b32 l, p, q, h;
prmt.b32 p, $9, $10, m;
prmt.b32 q, $11, $12, m;
prmt.b32 g, p, q, h;
prmt.b32 $0, l, g, 0x4051;
prmt.b32 $1, l, g, 0x6273;
shr.u32 m, m, 16;
shr.u32 h, h, 16;
prmt.b32 p, $5, $6, m;
prmt.b32 q, $7, $8, m;
prmt.b32 l, p, q, h;
prmt.b32 p, $9, $10, m;
prmt.b32 q, $11, $12, m;
prmt.b32 g, p, q, h;
prmt.b32 $2, l, g, 0x4051;
prmt.b32 $3, l, g, 0x6273;
}"""
LOOKUP = tl.constexpr(_LOOKUP)
LOOKUP_REGISTERS = tl.constexpr("=&r,=&r,=&r,=&r,r,r,r,r,r,r,r,r,r")
PAIR_BF16 = tl.constexpr("cvt.rn.bf16x2.f32 $0, $2, $1;")
PAIR_FP16 = tl.constexpr("cvt.rn.f16x2.f32 $0, $2, $1;")
LOW_BYTES = tl.constexpr("prmt.b32 $0, $1, $2, 0x6420;")
HIGH_BYTES = tl.constexpr("prmt.b32 $0, $1, $2, 0x7531;")


@triton.jit
def load_absmax(
    absmax_ptr, nested_ptr, nested_code_ptr, nested_offset, block, mask, NESTED: tl.constexpr
):
    """Return the float32 magnitudes of the blocks `block` (int64, any shape)."""
    if NESTED:
        code = tl.load(absmax_ptr + block, mask=mask, other=0).to(tl.int32)
        scale = tl.load(nested_ptr + (block >> 8), mask=mask, other=0.0)
        return tl.load(nested_code_ptr + code) * scale + nested_offset
    else:
        return tl.load(absmax_ptr + block, mask=mask, other=0.0)


@triton.jit
def lookup(code, nibbles, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Return code[nibbles], (ROWS, COLS) float32; code (16,) float32, nibbles int32."""
    return tl.gather(code, nibbles.reshape(ROWS * COLS), 0).reshape(ROWS, COLS)


@triton.jit
def unpack(packed, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Return (ROWS, COLS) int32 nibbles of (ROWS, COLS // 2) bytes, the high half first."""
    wide = packed.to(tl.int32)
    return tl.join(wide >> 4, wide & 15).reshape(ROWS, COLS)


@triton.jit
def pair(absmax, FIRST: tl.constexpr, SECOND: tl.constexpr, DTYPE: tl.constexpr):
    """Return the rounded products of two code values as one int32."""
    ASM: tl.constexpr = PAIR_BF16 if tl.bfloat16 == DTYPE else PAIR_FP16
    both = [absmax * FIRST, absmax * SECOND]
    return tl.inline_asm_elementwise(ASM, "=r,f,f", both, dtype=tl.int32, is_pure=True, pack=1)


@triton.jit
def byte_planes(first, second):
    """Return the low bytes of four values given as two int32, and their high bytes."""
    both = [first, second]
    low = tl.inline_asm_elementwise(LOW_BYTES, "=r,r,r", both, tl.int32, is_pure=True, pack=1)
    high = tl.inline_asm_elementwise(HIGH_BYTES, "=r,r,r", both, tl.int32, is_pure=True, pack=1)
    return low, high


@triton.jit
def halves(pairs, DTYPE: tl.constexpr):
    """Return (..., 2) values of int32 that hold two 16-bit ones each."""
    low = pairs.to(tl.int16).to(DTYPE, bitcast=True)
    high = (pairs >> 16).to(tl.int16).to(DTYPE, bitcast=True)
    return tl.join(low, high)


@triton.jit
def lookup_words(words, absmax, CODE: tl.constexpr, DTYPE: tl.constexpr):
    """Return the values of packed words by byte permutes.

    Args:
        words: (ROWS, BLOCKS, WORDS) int32, eight nibbles each.
        absmax: (ROWS, BLOCKS) float32.
        CODE: the sixteen float32 values of the format.
        DTYPE: tl.bfloat16 or tl.float16.

    Returns:
        Four (ROWS, BLOCKS, WORDS) int32, each two values in the order of memory, low half first.
    """
    l0, h0 = byte_planes(
        pair(absmax, CODE[0], CODE[1], DTYPE), pair(absmax, CODE[2], CODE[3], DTYPE)
    )
    l1, h1 = byte_planes(
        pair(absmax, CODE[4], CODE[5], DTYPE), pair(absmax, CODE[6], CODE[7], DTYPE)
    )
    l2, h2 = byte_planes(
        pair(absmax, CODE[8], CODE[9], DTYPE), pair(absmax, CODE[10], CODE[11], DTYPE)
    )
    l3, h3 = byte_planes(
        pair(absmax, CODE[12], CODE[13], DTYPE), pair(absmax, CODE[14], CODE[15], DTYPE)
    )
    operands = [
        words,
        l0[:, :, None], l1[:, :, None], l2[:, :, None], l3[:, :, None],
        h0[:, :, None], h1[:, :, None], h2[:, :, None], h3[:, :, None],
    ]  # fmt: skip
    return tl.inline_asm_elementwise(
        LOOKUP,
        LOOKUP_REGISTERS,
        operands,
        dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
        is_pure=True,
        pack=1,
    )


@triton.jit
def decode_words(words, absmax, CODE: tl.constexpr, DTYPE: tl.constexpr):
    """Return the values of `lookup_words` as (ROWS, BLOCKS, WORDS, 4, 2) DTYPE."""
    p0, p1, p2, p3 = lookup_words(words, absmax, CODE, DTYPE)
    pairs = tl.join(tl.join(p0, p2), tl.join(p1, p3))  # (ROWS, BLOCKS, WORDS, 2, 2)
    shape: tl.constexpr = [words.shape[0], words.shape[1], words.shape[2], 4]
    return halves(pairs.reshape(shape), DTYPE)


@triton.jit
def permute_k(tile, ROWS: tl.constexpr, COLS: tl.constexpr, ORDER: tl.constexpr):
    """Return (ROWS, COLS) with its columns in the order `ORDER`, the same for every tile.

    A sum over the columns of two tiles does not depend on it. With 16 consecutive columns (a
    quarter of COLS) per thread, "wgmma" and "mma" are the orders in which wgmma and mma.sync take
    a thread's registers; "mma8" is that of mma.sync when one of the loads is of single bytes, by
    which Triton chooses the width of its operands.
    """
    if ORDER == "wgmma":
        return tile.reshape(ROWS, 4, COLS // 16, 2, 2).permute(0, 2, 3, 1, 4).reshape(ROWS, COLS)
    elif ORDER == "mma":
        parts = tile.reshape(ROWS, 4, COLS // 32, 2, 2, 2)
        return parts.permute(0, 2, 4, 1, 3, 5).reshape(ROWS, COLS)
    elif ORDER == "mma8":
        parts = tile.reshape(ROWS, 4, COLS // 64, 4, 2, 2)
        return parts.permute(0, 2, 4, 1, 3, 5).reshape(ROWS, COLS)
    else:
        return tile


@triton.jit
def weight_tile(
    packed_ptr,
    absmax_ptr,
    nested_ptr,
    nested_code_ptr,
    nested_offset,
    code_ptr,
    rows,
    col,
    N,
    K,
    words_per_row,
    CODE: tl.constexpr,
    LOG_BLOCK: tl.constexpr,
    NESTED: tl.constexpr,
    DECODE: tl.constexpr,
    DTYPE: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """Return W[rows, col : col + COLS] of a packed (N, K) weight, (ROWS, COLS) DTYPE.

    `rows` is (ROWS,) int64. Unless DECODE is "ragged", K and `col` are multiples of COLS, and of
    the block size where that is smaller, so that no byte straddles rows and equal parts of a row of
    the tile have one absmax each. Elements outside of the matrix are finite; the caller multiplies
    them with zero or masks them.
    """
    if DECODE == "ragged":
        code = tl.load(code_ptr + tl.arange(0, 16))
        cols = col + tl.arange(0, COLS)
        mask = (rows[:, None] < N) & (cols[None, :] < K)
        element = rows[:, None] * K + cols[None, :]  # (ROWS, COLS)
        packed = tl.load(packed_ptr + (element >> 1), mask=mask, other=0).to(tl.int32)
        nibbles = tl.where((element & 1) == 0, packed >> 4, packed & 15)
        absmax = load_absmax(
            absmax_ptr, nested_ptr, nested_code_ptr, nested_offset,
            element >> LOG_BLOCK, mask, NESTED,
        )  # fmt: skip
        return (lookup(code, nibbles, ROWS, COLS) * absmax).to(DTYPE)
    else:
        PART: tl.constexpr = COLS if COLS < (1 << LOG_BLOCK) else (1 << LOG_BLOCK)
        BLOCKS: tl.constexpr = COLS // PART
        inside = (rows < N)[:, None]
        block = ((rows * K)[:, None] + (col + tl.arange(0, BLOCKS) * PART)[None, :]) >> LOG_BLOCK
        absmax = load_absmax(
            absmax_ptr, nested_ptr, nested_code_ptr, nested_offset, block, inside, NESTED
        )  # (ROWS, BLOCKS)
        if DECODE == "prmt":
            words_ptr = packed_ptr.to(tl.pointer_type(tl.int32))
            word = (rows * words_per_row)[:, None] + (col // 8 + tl.arange(0, COLS // 8))[None, :]
            words = tl.load(words_ptr + word, mask=inside, other=0)
            words = words.reshape(ROWS, BLOCKS, PART // 8)
            return decode_words(words, absmax, CODE, DTYPE).reshape(ROWS, COLS)
        else:
            code = tl.load(code_ptr + tl.arange(0, 16))
            byte = (rows * (K // 2))[:, None] + (col // 2 + tl.arange(0, COLS // 2))[None, :]
            packed = tl.load(packed_ptr + byte, mask=inside, other=0)
            values = lookup(code, unpack(packed, ROWS, COLS), ROWS, COLS)
            values = values.reshape(ROWS, BLOCKS, PART) * absmax[:, :, None]
            return values.reshape(ROWS, COLS).to(DTYPE)
