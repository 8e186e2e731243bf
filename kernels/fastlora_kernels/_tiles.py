# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Device helpers that the Triton kernels share: products, the dropout mask, spans of ranks.

Numerics, stated once for all kernels here:

- sums are float32; two float32 operands multiply with ``input_precision="ieee"``, never TF32;
- a 16-bit operand times a float32 one runs on matrix instructions, exactly: the float32 operand is
  the sum of three bfloat16 parts (8 bits each), and the sums of the smaller parts are kept apart;
- a masked element loads as zero, and offsets into tensors are int64.
"""

from __future__ import annotations

import triton
import triton.language as tl

GOLDEN = tl.constexpr(0x9E3779B9)


@triton.jit
def dot(a, b, acc):
    """Return ``acc + a b``: matrix instructions for 16-bit operands, exact products for float32."""
    if a.dtype == tl.float32:
        return tl.dot(a, b, acc, input_precision="ieee")
    else:
        return tl.dot(a, b, acc)


@triton.jit
def split_bf16(value):
    """Return bfloat16 (high, low) whose sum is `value` to 16 bits; low is NaN for an infinity."""
    high = value.to(tl.bfloat16)
    return high, (value.to(tl.float32) - high.to(tl.float32)).to(tl.bfloat16)


@triton.jit
def split3(value):
    """Return three bfloat16 whose sum is the float32 `value`; NaN after an infinity."""
    high, middle = split_bf16(value)
    rest = value - high.to(tl.float32) - middle.to(tl.float32)
    return high, middle, rest.to(tl.bfloat16)


@triton.jit
def mixed_dot(a, b, acc, rest):
    """Return (acc, rest) with ``a b`` added to their sum; see `total`.

    a and b have one dtype, and `rest` stays as it is, or one of them is float32.
    """
    if a.dtype == b.dtype:
        return dot(a, b, acc), rest
    elif b.dtype == tl.float32:
        high, middle, low = split3(b)
        if a.dtype == tl.bfloat16:
            return dot(a, high, acc), dot(a, low, dot(a, middle, rest))
        else:
            top, bottom = split_bf16(a)
            rest = dot(top, low, dot(bottom, middle, dot(top, middle, rest)))
            return dot(top, high, acc), dot(bottom, high, rest)
    else:
        high, middle, low = split3(a)
        if b.dtype == tl.bfloat16:
            return dot(high, b, acc), dot(low, b, dot(middle, b, rest))
        else:
            top, bottom = split_bf16(b)
            rest = dot(low, top, dot(middle, bottom, dot(middle, top, rest)))
            return dot(high, top, acc), dot(high, bottom, rest)


@triton.jit
def total(acc, rest):
    """Return acc + rest.

    Where an operand is infinite, its smaller parts make `rest` NaN or infinite with any sign: then
    `acc` alone is right.
    """
    return acc + tl.where(tl.abs(rest) < float("inf"), rest, 0.0)


@triton.jit
def low_rank_dot(low, factor, acc, rest, EXACT: tl.constexpr):
    """Return (acc, rest) with ``low factor`` added; low (M, R) float32, factor (R, O).

    EXACT multiplies in float32. Otherwise each operand is split into two bfloat16 parts, which
    keeps 16 bits of it: far more than the 16-bit result shows, at the speed of matrix instructions.
    """
    if EXACT:
        return dot(low, factor.to(tl.float32), acc), rest
    else:
        high, middle = split_bf16(low)
        if factor.dtype == tl.bfloat16:
            return dot(high, factor, acc), dot(middle, factor, rest)
        else:
            top, bottom = split_bf16(factor)
            rest = dot(middle, top, dot(high, bottom, rest))
            return dot(high, top, acc), rest


@triton.jit
def mix(h):
    """Return the hash of uint32 `h`. Source: see `low_rank`."""
    h ^= h >> 16
    h *= 0x7FEB352D
    h ^= h >> 15
    h *= 0x846CA68B
    return h ^ (h >> 16)


@triton.jit
def row_keys(seed_ptr, rows):
    """Return the uint32 key of each row (int64) for the seed, one int64."""
    seed = tl.load(seed_ptr)
    low, high = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    return mix(mix(rows.to(tl.uint32) ^ low) + high + (rows >> 32).to(tl.uint32) * GOLDEN)


@triton.jit
def kept(keys, cols, threshold):
    """Return which elements are kept: keys uint32 and cols (int) broadcast to each other."""
    return mix(keys + cols.to(tl.uint32) * GOLDEN) >= threshold.to(tl.uint32, bitcast=True)


@triton.jit
def span_bounds(spans_ptr, rows, M, R, SPANS: tl.constexpr):
    """Return (first, last) ranks of each row, int32; all ranks of rows without spans."""
    if SPANS:
        first = tl.load(spans_ptr + rows * 2, mask=rows < M, other=0)
        return first, tl.load(spans_ptr + rows * 2 + 1, mask=rows < M, other=0)
    else:
        return tl.zeros_like(rows).to(tl.int32), tl.zeros_like(rows).to(tl.int32) + R


@triton.jit
def covered(first, last, R):
    """Return (start, stop) of the ranks that any of the rows has; (R, 0) for none."""
    some = first < last
    return tl.min(tl.where(some, first, R)), tl.max(tl.where(some, last, 0))
