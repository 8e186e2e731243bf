"""The reference of block-wise 4-bit quantisation, in plain PyTorch, on any device.

Formulas, in float32 over the flattened weight ``w`` of ``n`` values, ``b`` the block of ``i``:

- quantise: ``absmax[b] = max |w|``, ``nibble[i] = nearest(w[i] * (1 / absmax[b]))``; a last block
  that is not full divides instead, ``w[i] / absmax[b]``, with ``absmax[b] >= 1e-38``;
- dequantise: ``w[i] = code[nibble[i]] * absmax[b]``, then rounded to the target dtype.

Two nibbles make a byte, the first in its high half; an odd ``n`` leaves the code of zero in the
last low half. Bytes and floats equal those of bitsandbytes 0.50 on CPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastlora_kernels.formats.codebook import Codebook, pair_table, rounding_tables

BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
_CHUNK = 1 << 18  # values per step: temporaries stay in cache
_TINY = 1e-38


def quantize_blocks(flat: Tensor, book: Codebook, blocksize: int) -> tuple[Tensor, Tensor]:
    """Quantise a flat tensor block by block.

    Args:
        flat: (n,) float32, bfloat16 or float16, n >= 1.
        book: the format.
        blocksize: values per block, even.

    Returns:
        Packed ((n + 1) // 2, 1) uint8 and absmax (ceil(n / blocksize),) float32.
    """
    n = flat.numel()
    full = n - n % blocksize
    packed = torch.empty(((n + 1) // 2, 1), dtype=torch.uint8, device=flat.device)
    absmax = torch.empty(-(-n // blocksize), dtype=torch.float32, device=flat.device)
    step = max(_CHUNK // blocksize, 1) * blocksize
    for start in range(0, full, step):
        stop = min(start + step, full)
        rows = flat[start:stop].float().view(-1, blocksize)
        largest = rows.abs().amax(dim=1)
        absmax[start // blocksize : stop // blocksize] = largest
        scaled = rows * (1.0 / largest.clamp(min=_TINY)).unsqueeze(1)
        packed[start // 2 : stop // 2, 0] = _pack(scaled.view(-1), book)
    if full < n:
        rest = flat[full:].float()
        absmax[-1] = rest.abs().amax().clamp(min=_TINY)
        packed[full // 2 :, 0] = _pack(rest / absmax[-1], book)
    return packed, absmax


def _pack(scaled: Tensor, book: Codebook) -> Tensor:
    """Nibbles of scaled values (n,), two to a byte: ((n + 1) // 2,) uint8."""
    if scaled.numel() % 2:
        scaled = torch.nn.functional.pad(scaled, (0, 1))
    thresholds, order = rounding_tables(book, scaled.device)
    nibbles = order[torch.bucketize(scaled, thresholds, out_int32=True)]
    return (nibbles[::2] << 4) | nibbles[1::2]


def dequantize_blocks(
    packed: Tensor, absmax: Tensor, book: Codebook, blocksize: int, n: int, dtype: torch.dtype
) -> Tensor:
    """Read a flat tensor back.

    Args:
        packed: ((n + 1) // 2,) bytes in any shape, contiguous, uint8.
        absmax: (ceil(n / blocksize),) float32.
        book: the format.
        blocksize: values per block, even.
        n: number of values.
        dtype: of the result.

    Returns:
        (n,) ``dtype``.
    """
    packed = packed.reshape(-1)
    pairs = pair_table(book, packed.device)
    out = torch.empty(n, dtype=dtype, device=packed.device)
    step = max(_CHUNK // blocksize, 1) * blocksize
    for start in range(0, n, step):
        stop = min(start + step, n)
        values = pairs[packed[start // 2 : (stop + 1) // 2].int()].view(-1)[: stop - start]
        scale = absmax[start // blocksize : -(-stop // blocksize)]
        full = (stop - start) // blocksize
        cut = full * blocksize
        values[:cut].view(full, blocksize).mul_(scale[:full].unsqueeze(1))
        values[cut:].mul_(scale[full:])
        out[start:stop] = values
    return out
