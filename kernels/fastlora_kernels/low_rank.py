"""The low-rank update that every adapter is to a kernel, and the dropout mask of its input.

The mask is never stored: it is a hash of (seed, row, column), the same bits in C++, Triton and
torch. In uint32 arithmetic::

    mix(h): h ^= h >> 16; h *= 0x7feb352d; h ^= h >> 15; h *= 0x846ca68b; h ^= h >> 16
    row_key(i) = mix(mix(lo32(i) ^ lo32(seed)) + hi32(seed) + hi32(i) * 0x9E3779B9)
    keep(i, k) = mix(row_key(i) + k * 0x9E3779B9) >= floor(p * 2**32)

Source of mix: Chris Wellons' lowbias32, https://nullprogram.com/blog/2018/07/31/.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B9
_CHUNK = 1 << 16  # elements per step on a CPU: temporaries stay in its cache


class LowRank(NamedTuple):
    """An update ``scaling * mask_spans(drop(x) A^T) B^T`` of a linear's output.

    Attributes:
        A: (R, K) float32 or x's dtype.
        B: (N, R), the dtype of A.
        scaling: dimensionless.
        dropout: probability with which an element of x is dropped on its way to A; at least 0,
            below 1, and without effect when there is no seed.
        seed: int64, one value, on x's device; None: no dropout.
        spans: int32 (M, 2) on x's device: row i has the ranks from spans[i, 0] up to, and without,
            spans[i, 1] alone. None: every row has all of them.
    """

    A: Tensor
    B: Tensor
    scaling: float
    dropout: float = 0.0
    seed: Tensor | None = None
    spans: Tensor | None = None


def drop_threshold(dropout: float) -> int:
    """Return ``floor(p 2^32)``: elements whose hash is below it are dropped."""
    return int(dropout * 2**32)


def keep_scale(dropout: float) -> float:
    """Return ``1 / (1 - p)``, the factor of the elements that are kept."""
    return 1.0 / (1.0 - dropout)


def _mix(h: Tensor) -> Tensor:
    """Mix int32 in place, as if they were unsigned."""
    h ^= (h >> 16) & 0xFFFF
    h *= 0x7FEB352D
    h ^= (h >> 15) & 0x1FFFF
    h *= _signed(0x846CA68B)
    h ^= (h >> 16) & 0xFFFF
    return h


def _signed(value: int) -> int:
    """Return the int32 that has the bits of a uint32."""
    return value - 2**32 if value >= 2**31 else value


def keep_mask(seed: Tensor, m: int, k: int, p: float) -> Tensor:
    """Return which elements of x are kept.

    Args:
        seed: int64, one value.
        m: rows.
        k: columns.
        p: probability with which an element is dropped.

    Returns:
        (m, k) bool on the device of the seed.
    """
    device, golden = seed.device, _signed(_GOLDEN)
    halves = seed.reshape(1).view(torch.int32)  # low, high
    rows = torch.arange(m, device=device).view(torch.int32).view(m, 2)
    key = _mix(_mix(rows[:, 0] ^ halves[0]) + halves[1] + rows[:, 1] * golden)  # (m,)
    columns = torch.arange(k, device=device).int() * golden
    keep = torch.empty((m, k), dtype=torch.bool, device=device)
    step = max(1, _CHUNK // max(k, 1)) if device.type == "cpu" else max(m, 1)
    least = drop_threshold(p) - 2**31
    for start in range(0, m, step):
        h = _mix(key[start : start + step, None] + columns)
        torch.ge(h ^ -(2**31), least, out=keep[start : start + step])
    return keep


def span_mask(spans: Tensor, r: int) -> Tensor:
    """Return which ranks each row has: (M, r) bool, for spans (M, 2)."""
    ranks = torch.arange(r, device=spans.device)
    return (ranks >= spans[:, :1]) & (ranks < spans[:, 1:])
