"""The C++ CPU kernels: AMX, AVX-512, AVX2 or a portable baseline, chosen at run time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from fastlora_kernels import fp8, native, native_experts, native_group
from fastlora_kernels.experts import ExpertsUpdate
from fastlora_kernels.formats import StoredWeight
from fastlora_kernels.low_rank import LowRank
from fastlora_kernels.native_columns import (
    scale_columns,
    scale_columns_backward,
    scaled_linear,
    weight_dots,
    weight_squares,
)
from torch import Tensor

if TYPE_CHECKING:
    from fastlora.dispatch import Problem

PRIORITY = 20
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
__all__ = [
    "PRIORITY",
    "dequantize",
    "experts_linear",
    "experts_linear_backward",
    "lora_linear",
    "lora_linear_backward",
    "scale_columns",
    "scale_columns_backward",
    "scaled_linear",
    "weight_dots",
    "weight_squares",
    "why_not",
]


def why_not(problem: Problem) -> str | None:
    """Why the C++ kernels cannot run a problem, or None when they can.

    Raises:
        ImportError: the problem is one for the library, but it is missing or does not fit.
    """
    if problem.device != "cpu":
        return f"runs on cpu only, not on {problem.device}"
    if problem.compute == "fp8":
        return fp8.why_not_device(torch.device("cpu"))
    if problem.op == "dequantize":
        if problem.dtype not in native.DTYPES:
            return f"decodes to float32, bfloat16 and float16 only, not to {problem.dtype}"
    else:
        if problem.dtype not in _DTYPES:
            return f"computes in float32, bfloat16 and float16 only, not in {problem.dtype}"
        if problem.adapter_dtype not in (None, *_DTYPES):
            return f"takes float32, bfloat16 and float16 adapters only, not {problem.adapter_dtype}"
    native.library()
    return None


def lora_linear(
    x: Tensor, weight: StoredWeight, bias: Tensor | None, update: LowRank | None
) -> tuple[Tensor, Tensor]:
    """See `fastlora.backends.reference.lora_linear`."""
    return native.lora_linear(x, weight, weight.rows(x.shape[1]), bias, update)


def lora_linear_backward(
    dy: Tensor,
    x: Tensor | None,
    s: Tensor | None,
    weight: StoredWeight,
    update: LowRank | None,
    need_dx: bool,
    need_dlora: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `fastlora.backends.reference.lora_linear_backward`."""
    k = weight.columns() if x is None else x.shape[1]
    return native.lora_linear_backward(dy, x, s, weight, k, update, need_dx, need_dlora)


def lora_group(
    x: Tensor,
    weights: Sequence[StoredWeight],
    biases: Sequence[Tensor | None],
    updates: Sequence[LowRank | None],
) -> tuple[list[Tensor], list[Tensor]]:
    """Return (y, s) of each of the linears that are fed x (M, K)."""
    n = [weight.rows(x.shape[1]) for weight in weights]
    return native_group.lora_group(x, weights, n, biases, updates)


def lora_group_backward(
    dys: Sequence[Tensor],
    x: Tensor,
    ss: Sequence[Tensor],
    weights: Sequence[StoredWeight],
    updates: Sequence[LowRank | None],
    need_dx: bool,
    need_dlora: bool,
) -> tuple[Tensor, list[Tensor | None], list[Tensor | None]]:
    """Return dx (M, K), summed over the linears, and each one's dA and dB or None."""
    n = [dy.shape[1] for dy in dys]
    return native_group.lora_group_backward(dys, x, ss, weights, n, updates, need_dx, need_dlora)


def experts_linear(
    x: Tensor,
    weight: StoredWeight,
    n: int,
    bias: Tensor | None,
    update: ExpertsUpdate | None,
    ends: Tensor,
) -> tuple[Tensor, Tensor]:
    """See `fastlora.backends.reference.experts_linear`; one call for all experts."""
    return native_experts.experts_linear(x, weight, n, bias, update, ends)


def experts_linear_backward(
    dy: Tensor,
    x: Tensor | None,
    s: Tensor | None,
    weight: StoredWeight,
    k: int,
    update: ExpertsUpdate | None,
    ends: Tensor,
    need_dx: bool,
    need_dlora: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `fastlora.backends.reference.experts_linear_backward`; one call for all experts."""
    rest = (weight, k, update, ends, need_dx, need_dlora)
    return native_experts.experts_linear_backward(dy, x, s, *rest)


def dequantize(weight: StoredWeight, n: int, k: int, dtype: torch.dtype) -> Tensor:
    """See `fastlora.backends.reference.dequantize`."""
    if weight.format == "dense":
        return weight.data.to(dtype)
    return native.dequantize_4bit(weight, n, k, dtype)
