"""Double quantisation: the block magnitudes themselves stored as 8-bit codes.

Formula: ``absmax[i] = NESTED_CODE[code[i]] * nested_absmax[i // 256] + offset`` in float32, with
the product rounded before the sum.

Source: Dettmers et al., 8-bit Optimizers via Block-wise Quantization, 2021
(https://arxiv.org/abs/2110.02861), section 1.3: the dynamic data type.
"""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from fastlora_kernels.formats.codebook import kept_table

NESTED_BLOCKSIZE = 256
_POINTS = 65536


def _f32(value: float) -> float:
    """``value`` rounded to float32."""
    rounded: float = struct.unpack("f", struct.pack("f", value))[0]
    return rounded


def _boundary(index: int, count: int) -> float:
    """Point ``index`` of ``count + 1`` evenly spaced float32 points from 0.1 to 1.

    The sum in float64 is exact, so that the result is rounded once, as a fused multiply-add does.
    """
    start = _f32(0.1)
    step = _f32(_f32(1.0 - start) / count)
    if index < (count + 1) // 2:
        return _f32(start + step * index)
    return _f32(1.0 - step * (count - index))


def _dynamic_map() -> tuple[float, ...]:
    """The 256 values, ascending: 2**i means of decade ``10**(i - 6)`` for i in 0..6, both signs."""
    values = [0.0, 1.0]
    for exponent in range(7):
        count, decade = 2**exponent, _f32(10.0 ** (exponent - 6))
        for index in range(count):
            mean = _f32((_boundary(index, count) + _boundary(index + 1, count)) / 2)
            values += [_f32(decade * mean), _f32(-decade * mean)]
    return tuple(sorted(values))


NESTED_CODE: tuple[float, ...] = _dynamic_map()


@kept_table
def nested_table(device: torch.device) -> Tensor:
    """The 256 values of the 8-bit dynamic data type.

    Args:
        device: where the table lives.

    Returns:
        (256,) float32, ascending.
    """
    return torch.tensor(NESTED_CODE, dtype=torch.float32, device=device)


@kept_table
def _nearest(device: torch.device) -> Tensor:
    """The code nearest to each of 65536 evenly spaced points from -1 to 1: (65536,) uint8."""
    points = torch.arange(_POINTS, dtype=torch.float32, device=device) * (2 / (_POINTS - 1)) - 1
    table = nested_table(device)
    right = torch.searchsorted(table, points).clamp_(1, 255)
    take_right = table[right] - points < points - table[right - 1]
    return torch.where(take_right, right, right - 1).to(torch.uint8)


def quantize_absmax(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Store block magnitudes in 8 bits each, around their mean.

    Each is rounded to one of 65536 evenly spaced points first, as bitsandbytes does on CPU; near
    zero, where codes are closer than points, the code is therefore not always the nearest.

    Args:
        absmax: (blocks,) float32.

    Returns:
        Codes (blocks,) uint8, nested_absmax (ceil(blocks / 256),) float32, and the mean, ()
        float32.
    """
    mean = absmax.mean()
    padding = -absmax.numel() % NESTED_BLOCKSIZE
    rows = torch.nn.functional.pad(absmax - mean, (0, padding)).view(-1, NESTED_BLOCKSIZE)
    nested_absmax = rows.abs().amax(dim=1)
    scaled = (rows * (1.0 / nested_absmax).unsqueeze(1)).clamp_(-1, 1).nan_to_num_(nan=-1.0)
    points = ((scaled + 1) * ((_POINTS - 1) / 2) + 0.5).int()
    codes = _nearest(absmax.device)[points]
    return codes.view(-1)[: absmax.numel()].clone(), nested_absmax, mean


def dequantize_absmax(
    codes: Tensor, nested_absmax: Tensor, offset: Tensor, table: Tensor | None = None
) -> Tensor:
    """Read block magnitudes back from their 8-bit codes.

    Args:
        codes: (blocks,) uint8.
        nested_absmax: (ceil(blocks / 256),) float32.
        offset: one float32, the mean that was taken off.
        table: (256,) float32, the values of the codes; by default `NESTED_CODE`.

    Returns:
        (blocks,) float32.
    """
    scale = nested_absmax.repeat_interleave(NESTED_BLOCKSIZE)[: codes.numel()]
    table = nested_table(codes.device) if table is None else table
    return table[codes.int()] * scale + offset
