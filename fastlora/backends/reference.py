"""The definition of every op in plain PyTorch, unfused: dequantise, matmul, adapter, add.

It takes every problem, float64 included, and is what the other backends are tested against.
Rounding is that of the usual unfused path: base matmul in x's dtype, adapter in its own dtype,
the sum in the wider of the two, then one rounding to x's dtype.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from fastlora_kernels.formats import StoredWeight, dequantize
from torch import Tensor
from torch.nn import functional

if TYPE_CHECKING:
    from fastlora.dispatch import Problem

PRIORITY = 0
__all__ = ["PRIORITY", "dequantize", "lora_linear", "lora_linear_backward", "why_not"]


def why_not(problem: Problem) -> str | None:
    """Return None: the reference takes everything."""
    return None


def lora_linear(
    x: Tensor,
    weight: StoredWeight,
    bias: Tensor | None,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    scaling: float,
) -> tuple[Tensor, Tensor]:
    """Return ``y = x W^T + bias + scaling (x A^T) B^T`` and ``s = x A^T``.

    Args:
        x: (M, K), floating.
        weight: the stored (N, K) weight.
        bias: (N,) in x's dtype, or None.
        lora_A: (r, K), or None.
        lora_B: (N, r), or None.
        scaling: alpha / r.

    Returns:
        y (M, N) in x's dtype; s (M, r) float32 (float64 for float64 x), shape (0,) without adapter.

    Source: Hu et al. 2021, arXiv:2106.09685, eq. 3.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    n, k = _shape(weight, x.shape[1])
    y = functional.linear(x, dequantize(weight, n, k, x.dtype), bias)
    if lora_A is None or lora_B is None:
        return y, x.new_empty(0, dtype=wide)
    s = functional.linear(x.to(lora_A.dtype), lora_A)  # (M, r)
    y = (y + functional.linear(s, lora_B) * scaling).to(x.dtype)
    return y, s.to(wide)


def lora_linear_backward(
    dy: Tensor,
    x: Tensor | None,
    s: Tensor | None,
    weight: StoredWeight,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    scaling: float,
    need_dx: bool,
    need_dlora: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients ``dx``, ``dA``, ``dB``.

    ``dx = dy W + scaling (dy B) A``, ``dA = scaling (dy B)^T x``, ``dB = scaling dy^T s``.

    Args:
        dy: (M, N).
        x: (M, K) of the forward; needed for `need_dlora`, or when a packed weight has odd K.
        s: (M, r) of the forward; needed for `need_dlora`.
        weight: the stored (N, K) weight.
        lora_A: (r, K), or None.
        lora_B: (N, r), or None.
        scaling: alpha / r.
        need_dx: compute dx; otherwise it comes back without elements.
        need_dlora: compute dA and dB; otherwise they come back without elements.

    Returns:
        dx (M, K) in dy's dtype; dA (r, K) and dB (N, r) in the adapter's dtype.
    """
    dx, dA, dB = dy.new_empty(0), dy.new_empty(0), dy.new_empty(0)
    if need_dx:
        n, k = _shape(weight, None if x is None else x.shape[1])
        dx = dy @ dequantize(weight, n, k, dy.dtype)
    if lora_A is None or lora_B is None:
        return dx, dA, dB
    t = (dy.to(lora_B.dtype) @ lora_B) * scaling  # (M, r)
    if need_dx:
        dx = (dx + t @ lora_A).to(dy.dtype)
    if need_dlora:
        if x is None or s is None:
            raise ValueError("the gradient of the adapter needs x and s, got None; pass both")
        dA = t.t() @ x.to(t.dtype)
        dB = (dy.to(t.dtype).t() @ s.to(t.dtype)) * scaling
    return dx, dA, dB


def _shape(weight: StoredWeight, k: int | None) -> tuple[int, int]:
    """Return (N, K) from the tensors; a packed weight with odd K is flat and needs K."""
    if weight.format == "dense":
        return weight.data.shape[0], weight.data.shape[1]
    if k is None:
        return weight.data.shape[0], 2 * weight.data.shape[1]
    return 2 * weight.data.numel() // k, k
