"""The C++ CPU kernels: AMX, AVX-512, AVX2 or a portable baseline, chosen at run time."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from fastlora_kernels import native
from fastlora_kernels.formats import StoredWeight
from torch import Tensor

if TYPE_CHECKING:
    from fastlora.dispatch import Problem

PRIORITY = 20
_DTYPES = (torch.float32, torch.bfloat16)


def why_not(problem: Problem) -> str | None:
    """Why the C++ kernels cannot run a problem, or None when they can.

    Raises:
        ImportError: the problem is one for the library, but it is missing or does not fit.
    """
    if problem.device != "cpu":
        return f"runs on cpu only, not on {problem.device}"
    if problem.op == "dequantize":
        if problem.dtype not in native.DTYPES:
            return f"decodes to float32, bfloat16 and float16 only, not to {problem.dtype}"
    else:
        if problem.dtype not in _DTYPES:
            return f"computes in float32 and bfloat16 only, not in {problem.dtype}"
        if problem.adapter_dtype not in (None, *_DTYPES):
            return f"takes float32 and bfloat16 adapters only, not {problem.adapter_dtype}"
    native.library()
    return None


def lora_linear(
    x: Tensor,
    weight: StoredWeight,
    bias: Tensor | None,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    scaling: float,
) -> tuple[Tensor, Tensor]:
    """See `fastlora.backends.reference.lora_linear`."""
    dense_rows = weight.format == "dense" or x.shape[1] % 2 == 0
    n = weight.data.shape[0] if dense_rows else 2 * weight.data.numel() // x.shape[1]
    return native.lora_linear(x, weight, n, bias, lora_A, lora_B, scaling)


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
    """See `fastlora.backends.reference.lora_linear_backward`."""
    width = weight.data.shape[1] * (1 if weight.format == "dense" else 2)
    k = width if x is None else x.shape[1]
    return native.lora_linear_backward(
        dy, x, s, weight, k, lora_A, lora_B, scaling, need_dx, need_dlora
    )


def dequantize(weight: StoredWeight, n: int, k: int, dtype: torch.dtype) -> Tensor:
    """See `fastlora.backends.reference.dequantize`."""
    if weight.format == "dense":
        return weight.data.to(dtype)
    return native.dequantize_4bit(weight, n, k, dtype)
