"""Triton kernels: NVIDIA and AMD GPUs, and Triton's interpreter on CPU tensors for tests.

Importing this module does not import triton; the first problem that is asked about does.
"""

from __future__ import annotations

import os
from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from fastlora_kernels.experts import ExpertsUpdate
    from fastlora_kernels.formats import StoredWeight
    from fastlora_kernels.low_rank import LowRank

    from fastlora.dispatch import Problem

PRIORITY = 10
AUTO_DEVICES = ("cuda",)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@cache
def _installed() -> bool:
    return find_spec("triton") is not None


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def why_not(problem: Problem) -> str | None:
    """Return why Triton does not run `problem`, or None when it does."""
    if not _installed():
        return "the package triton is not installed; pip install triton"
    if problem.device == "cpu" and not _interpreted():
        return "runs on GPUs; on CPU tensors only in Triton's interpreter (TRITON_INTERPRET=1)"
    if problem.device == "cuda" and _interpreted():
        return "TRITON_INTERPRET=1 is set, which is for CPU tensors; unset it to run on the GPU"
    if problem.device not in ("cpu", "cuda"):
        return f"runs on cuda tensors, got {problem.device}"
    if problem.dtype not in _DTYPES:
        return f"takes float32, bfloat16 and float16, got {problem.dtype}"
    if problem.adapter_dtype not in (None, torch.float32, problem.dtype):
        return f"takes adapters of float32 or {problem.dtype}, got {problem.adapter_dtype}"
    if problem.m >= 2**31 or problem.n >= 2**31 or problem.k >= 2**31:
        return "takes dimensions below 2**31"
    return _why_not_fp8(problem) if problem.compute == "fp8" else None


def _why_not_fp8(problem: Problem) -> str | None:
    """Return why there is no product with operands in 8 bits; the interpreter has it."""
    from fastlora_kernels import fp8

    if problem.format == "dense":
        return "fp8 compute takes 4-bit weights, got a dense one"
    if problem.dtype == torch.float32:
        return "fp8 compute takes bfloat16 and float16 activations, got torch.float32"
    reason = fp8.why_not_shape(problem.n, problem.k)
    if reason is not None or problem.device == "cpu":
        return reason
    return fp8.why_not_device(torch.device(problem.device))


def lora_linear(
    x: Tensor, weight: StoredWeight, bias: Tensor | None, update: LowRank | None
) -> tuple[Tensor, Tensor]:
    """See `fastlora.backends.reference.lora_linear`."""
    from fastlora_kernels import lora_linear as kernels

    return kernels.lora_linear(x, weight, bias, update)


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
    from fastlora_kernels import lora_linear as kernels

    return kernels.lora_linear_backward(dy, x, s, weight, update, need_dx, need_dlora)


def experts_linear(
    x: Tensor,
    weight: StoredWeight,
    n: int,
    bias: Tensor | None,
    update: ExpertsUpdate | None,
    ends: Tensor,
) -> tuple[Tensor, Tensor]:
    """See `fastlora.backends.reference.experts_linear`.

    One launch for all experts; with many rows per expert one after the other, for which the host
    reads `ends` and so waits for the GPU.
    """
    from fastlora_kernels import experts_linear as kernels

    return kernels.experts_linear(x, weight, n, bias, update, ends)


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
    """See `fastlora.backends.reference.experts_linear_backward`; launches as the forward does."""
    from fastlora_kernels import experts_linear as kernels

    rest = (weight, k, update, ends, need_dx, need_dlora)
    return kernels.experts_linear_backward(dy, x, s, *rest)


def weight_dots(a: Tensor, weight: StoredWeight, n: int, dtype: torch.dtype) -> Tensor:
    """See `fastlora.backends.reference.weight_dots`."""
    from fastlora_kernels import columns

    return columns.weight_dots(a, weight, n, dtype)


def weight_squares(weight: StoredWeight, n: int, k: int, dtype: torch.dtype) -> Tensor:
    """See `fastlora.backends.reference.weight_squares`."""
    from fastlora_kernels import columns

    return columns.weight_squares(weight, n, k, dtype)


def scale_columns(z: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """See `fastlora.backends.reference.scale_columns`."""
    from fastlora_kernels import columns

    return columns.scale_columns(z, scale, bias)


def scale_columns_backward(
    dy: Tensor, z: Tensor | None, scale: Tensor, need_dz: bool, need_dscale: bool
) -> tuple[Tensor, Tensor]:
    """See `fastlora.backends.reference.scale_columns_backward`."""
    from fastlora_kernels import columns

    return columns.scale_columns_backward(dy, z, scale, need_dz, need_dscale)


def dequantize(weight: StoredWeight, n: int, k: int, dtype: torch.dtype) -> Tensor:
    """See `fastlora.backends.reference.dequantize`."""
    from fastlora_kernels.dequantize import dequantize as launch

    return launch(weight, n, k, dtype)
