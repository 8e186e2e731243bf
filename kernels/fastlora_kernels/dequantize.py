# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""4-bit dequantisation in one launch.

``out[i] = code[nibble[i]] * absmax[i // blocksize]`` in float32, rounded once to the target dtype,
for i over the flattened (N, K); a double-quantised absmax is decoded on the way.

- packed: uint8 (ceil(N K / 2),), two values a byte, the first in the high half
- absmax: float32 (blocks,), or uint8 (blocks,) with nested_absmax float32 (ceil(blocks / 256),)
- out: float32, bfloat16 or float16 (N, K), contiguous

Traffic: 0.5 + 4 / blocksize bytes per value read (0.5 + 1 / blocksize when double-quantised) and
2 or 4 written; about five machine instructions per value, so memory bounds it.

Source: Dettmers et al., QLoRA, 2023 (https://arxiv.org/abs/2305.14314), section 3.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlora_kernels._decode import decode_words, load_absmax, lookup, unpack
from fastlora_kernels._launch import OPTIONS, TYPES, on_device, stored_arguments
from fastlora_kernels.formats import StoredWeight
from fastlora_kernels.regimes import decoder


@triton.jit
def dequantize_kernel(
    packed_ptr,
    absmax_ptr,
    nested_ptr,
    nested_code_ptr,
    offset_ptr,
    code_ptr,
    out_ptr,
    total,
    CODE: tl.constexpr,
    LOG_BLOCK: tl.constexpr,
    NESTED: tl.constexpr,
    DECODE: tl.constexpr,
    DTYPE: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Decode ROWS blocks, each a row of the tile; with "prmt", total is a multiple of 8."""
    COLS: tl.constexpr = 1 << LOG_BLOCK
    block = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    element = block[:, None] * COLS + tl.arange(0, COLS)[None, :]
    inside = block * COLS < total
    offset = tl.load(offset_ptr) if NESTED else 0.0
    absmax = load_absmax(absmax_ptr, nested_ptr, nested_code_ptr, offset, block, inside, NESTED)
    if DECODE == "prmt":
        word = block[:, None] * (COLS // 8) + tl.arange(0, COLS // 8)[None, :]
        words_ptr = packed_ptr.to(tl.pointer_type(tl.int32))
        words = tl.load(words_ptr + word, mask=8 * word < total, other=0)
        values = decode_words(words[:, None, :], absmax[:, None], CODE, DTYPE)
        values = values.reshape(ROWS, COLS)
    else:
        code = tl.load(code_ptr + tl.arange(0, 16))
        byte = block[:, None] * (COLS // 2) + tl.arange(0, COLS // 2)[None, :]
        packed = tl.load(packed_ptr + byte, mask=2 * byte < total, other=0)  # (ROWS, COLS // 2)
        values = lookup(code, unpack(packed, ROWS, COLS), ROWS, COLS) * absmax[:, None]
    tl.store(out_ptr + element, values.to(DTYPE), mask=element < total)


TILE = 4096  # values per program: 16 per thread keeps the loads 8 bytes wide; not measured yet
NUM_WARPS = 8


def dequantize(
    weight: StoredWeight, n: int, k: int, dtype: torch.dtype, out: Tensor | None = None
) -> Tensor:
    """Return the dense matrix of a stored weight.

    Args:
        weight: dense or 4-bit.
        n: rows.
        k: columns.
        dtype: of the result: float32, bfloat16 or float16.
        out: where to write it, (n, k) contiguous, or None for new memory.

    Returns:
        (n, k) ``dtype``; a dense weight that already has this dtype is returned as it is.
    """
    if weight.format == "dense":
        return weight.data.to(dtype)
    total = n * k
    if out is None:
        out = torch.empty(n, k, dtype=dtype, device=weight.data.device)
    if total:
        stored, meta = stored_arguments(weight)
        rows = max(TILE // weight.blocksize, 1)
        words = total % 8 == 0 and stored[0].data_ptr() % 16 == 0
        how = decoder(stored[0].device, dtype) if words else "gather"
        with on_device(out):
            dequantize_kernel[(triton.cdiv(total, rows * weight.blocksize),)](
                *stored, out, total, **meta, **OPTIONS,
                DECODE=how, DTYPE=TYPES[dtype], ROWS=rows, num_warps=NUM_WARPS,
            )  # fmt: skip
    return out
