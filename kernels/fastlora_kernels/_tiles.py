# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Device helpers that the Triton kernels share: 4-bit decoding and the low-rank product.

Numerics, stated once for all kernels here:

- a weight is ``float32(code[nibble] * absmax[block])`` rounded once to the target dtype, and a
  double-quantised absmax is ``nested_code[byte] * nested_absmax[block // 256] + offset`` with the
  product rounded before the sum: both bit-equal to bitsandbytes. Kernels that decode are launched
  with ``enable_fp_fusion=False``, or the compiler would fuse that product and sum;
- sums are float32; float32 operands multiply with ``input_precision="ieee"``, never TF32;
- a masked element loads as zero, and offsets into tensors are int64.

The sixteen codes are looked up with `tl.gather` in a 16-word table in shared memory: its words lie
in different banks, so that a warp's lookup is one access. The forward's main loop then takes 8
(sm_80) to 10 (sm_90) machine instructions per weight, with a tree of selects it takes 22 to 27; a
double-quantised absmax adds one. These are counts in compiled code, not times.
"""

from __future__ import annotations

import triton
import triton.language as tl


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
def weight_tile(
    packed_ptr,
    absmax_ptr,
    nested_ptr,
    nested_code_ptr,
    nested_offset,
    code,
    rows,
    col,
    N,
    K,
    LOG_BLOCK: tl.constexpr,
    NESTED: tl.constexpr,
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """Return the float32 values W[rows, col : col + COLS] of a packed (N, K) weight.

    `rows` is (ROWS,) int64. ALIGNED says that K and `col` are multiples of COLS and that COLS
    divides the block size, so that no byte straddles rows and a row of the tile has one absmax.
    Elements outside the matrix are finite; the caller multiplies them with zero or masks them.
    """
    if ALIGNED:
        inside = rows < N
        half = col // 2 + tl.arange(0, COLS // 2)
        pointers = packed_ptr + rows[:, None] * (K // 2) + half[None, :]
        packed = tl.load(pointers, mask=inside[:, None], other=0)  # (ROWS, COLS // 2)
        block = (rows * K + col) >> LOG_BLOCK
        absmax = load_absmax(
            absmax_ptr, nested_ptr, nested_code_ptr, nested_offset, block, inside, NESTED
        )
        return lookup(code, unpack(packed, ROWS, COLS), ROWS, COLS) * absmax[:, None]
    else:
        cols = col + tl.arange(0, COLS)
        mask = (rows[:, None] < N) & (cols[None, :] < K)
        element = rows[:, None] * K + cols[None, :]  # (ROWS, COLS)
        packed = tl.load(packed_ptr + (element >> 1), mask=mask, other=0).to(tl.int32)
        nibbles = tl.where((element & 1) == 0, packed >> 4, packed & 15)
        absmax = load_absmax(
            absmax_ptr,
            nested_ptr,
            nested_code_ptr,
            nested_offset,
            element >> LOG_BLOCK,
            mask,
            NESTED,
        )
        return lookup(code, nibbles, ROWS, COLS) * absmax


@triton.jit
def dot(a, b, acc):
    """Return ``acc + a b``: matrix instructions for 16-bit operands, exact products for float32."""
    if a.dtype == tl.float32:
        return tl.dot(a, b, acc, input_precision="ieee")
    else:
        return tl.dot(a, b, acc)


@triton.jit
def without_infinities(value):
    """Return `value` with zeros in place of infinities; NaN stays."""
    return tl.where(tl.abs(value.to(tl.float32)) == float("inf"), 0.0, value).to(value.dtype)


@triton.jit
def split_bf16(value):
    """Return bfloat16 (high, low) whose sum is `value` to 16 bits; an infinity has no low part."""
    high = value.to(tl.bfloat16)
    low = without_infinities(value).to(tl.float32) - without_infinities(high).to(tl.float32)
    return high, low.to(tl.bfloat16)


@triton.jit
def low_rank_dot(low, factor, acc, EXACT: tl.constexpr):
    """Return ``acc + low @ factor``; low (M, R) float32, factor (R, O) in the adapter's dtype.

    EXACT multiplies in float32. Otherwise each operand is split into two bfloat16 parts, which
    keeps 16 bits of it: far more than the 16-bit result shows, at the speed of matrix instructions.
    An infinity counts in the product of the high parts alone: elsewhere its sign could be wrong.
    """
    if EXACT:
        return dot(low, factor.to(tl.float32), acc)
    else:
        high, rest = split_bf16(low)
        if factor.dtype == tl.bfloat16:
            return dot(rest, without_infinities(factor), dot(high, factor, acc))
        else:
            factor_high, factor_rest = split_bf16(factor)
            acc = dot(high, factor_high, acc)
            acc = dot(rest, without_infinities(factor_high), acc)
            return dot(without_infinities(high), factor_rest, acc)
