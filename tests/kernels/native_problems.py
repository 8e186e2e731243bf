"""Weights and operands for the tests of the C++ kernels."""

from __future__ import annotations

import torch
from fastlora_kernels.formats import StoredWeight
from torch import Tensor

from fastlora import quantize_4bit

KINDS = [
    "nf4-64-double",
    "nf4-64-single",
    "fp4-64-double",
    "nf4-32-double",
    "nf4-512-single",
    "dense",
]


def stored(n: int, k: int, dtype: torch.dtype, kind: str) -> StoredWeight:
    """Return a weight of one of `KINDS`."""
    weight = (torch.randn(n, k) * k**-0.5).to(dtype)
    if kind == "dense":
        return StoredWeight(weight, None, None, None, "dense", 0)
    quant_type, blocksize, double = kind.split("-")
    return quantize_4bit(weight, quant_type, int(blocksize), double == "double").stored()


def operands(
    shape: tuple[int, int, int, int], dtype: torch.dtype, adapter: torch.dtype
) -> list[Tensor]:
    """Return x, dy, bias, A, B for a shape (m, n, k, r)."""
    m, n, k, r = shape
    sizes = ((m, k), (m, n), (n,), (r, k), (n, r))
    scales = (1.0, 1.0, 1.0, k**-0.5, 1.0)
    dtypes = (dtype, dtype, dtype, adapter, adapter)
    return [
        (torch.randn(size) * scale).to(kind)
        for size, scale, kind in zip(sizes, scales, dtypes, strict=True)
    ]
