"""The C++ CPU kernels of csrc/, called with tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from fastlora_kernels.formats import FORMATS, StoredWeight, rounding_tables
from fastlora_kernels.low_rank import LowRank
from fastlora_kernels.native_library import DTYPES, ISAS, isa, library, set_isa, source_id
from fastlora_kernels.native_views import (
    CPU,
    by_rows,
    check,
    contiguous,
    describe,
    low_rank,
    pointer,
)

__all__ = [
    "DTYPES",
    "ISAS",
    "dequantize_4bit",
    "isa",
    "library",
    "lora_linear",
    "lora_linear_backward",
    "quantize_4bit",
    "set_isa",
    "source_id",
]


def lora_linear(
    x: Tensor,
    weight: StoredWeight,
    n: int,
    bias: Tensor | None,
    update: LowRank | None,
) -> tuple[Tensor, Tensor]:
    """``y = x W^T + bias + scaling s B^T`` and ``s = mask_spans(drop(x) A^T)``.

    Args:
        x: (M, K) float32 or bfloat16.
        weight: (N, K): 4-bit, or dense in x's dtype.
        n: rows of the weight.
        bias: (N,) any float, or None.
        update: the low-rank term, float32 or in x's dtype, or None.

    Returns:
        y (M, N) in x's dtype; s (M, R) float32, or (0,) without an update.
    """
    x, weight = by_rows(x), contiguous(weight)
    m, k = x.shape
    bias = None if bias is None else bias.to(torch.float32).contiguous()
    lora, alive = low_rank(update)
    y = x.new_empty(m, n)
    size = (m, lora.r) if alive is not None else (0,)
    s = x.new_empty(*size, dtype=torch.float32)
    status = library().fastlora_lora_linear(
        DTYPES[x.dtype],
        m,
        x.data_ptr(),
        x.stride(0),
        describe(weight, n, k),
        pointer(bias),
        lora,
        s.data_ptr(),
        y.data_ptr(),
        torch.get_num_threads(),
    )
    check(status, "fastlora_lora_linear")
    return y, s


def lora_linear_backward(
    dy: Tensor,
    x: Tensor | None,
    s: Tensor | None,
    weight: StoredWeight,
    k: int,
    update: LowRank | None,
    need_dx: bool,
    need_dlora: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `lora_linear` for the output gradient dy (M, N).

    Args:
        dy: (M, N) float32 or bfloat16.
        x: (M, K) and s: (M, R) of the forward pass, needed for the adapter's gradients.
        s: see x.
        weight: as in the forward pass.
        k: columns of the weight.
        update: as in the forward pass.
        need_dx: compute dx.
        need_dlora: compute dA and dB.

    Returns:
        dx (M, K) in dy's dtype, dA (R, K) and dB (N, R) in the update's dtype; without elements
        where not needed.
    """
    dy, weight = by_rows(dy), contiguous(weight)
    m, n = dy.shape
    x = None if x is None or not need_dlora else by_rows(x)
    s = None if s is None else s.contiguous()
    lora, alive = low_rank(update)
    dx = dy.new_empty((m, k) if need_dx else (0,))
    if need_dlora and alive is not None:
        da, db = torch.empty_like(alive.A), torch.empty_like(alive.B)
    else:
        da = db = dy.new_empty(0)
    status = library().fastlora_lora_linear_backward(
        DTYPES[dy.dtype],
        m,
        dy.data_ptr(),
        dy.stride(0),
        pointer(x),
        0 if x is None else x.stride(0),
        pointer(s),
        describe(weight, n, k),
        lora,
        dx.data_ptr() if need_dx else None,
        da.data_ptr() if need_dlora else None,
        db.data_ptr() if need_dlora else None,
        torch.get_num_threads(),
    )
    check(status, "fastlora_lora_linear_backward")
    return dx, da, db


def quantize_4bit(weight: Tensor, quant_type: str, blocksize: int) -> tuple[Tensor, Tensor]:
    """Block-wise 4-bit quantisation, bit-equal to bitsandbytes.

    Args:
        weight: any shape, float32, bfloat16 or float16, on CPU.
        quant_type: a name in `fastlora_kernels.formats.FORMATS`.
        blocksize: values per magnitude.

    Returns:
        packed ((numel + 1) // 2, 1) uint8 and absmax (ceil(numel / blocksize),) float32.
    """
    weight = weight.contiguous()
    n = weight.numel()
    thresholds, order = rounding_tables(FORMATS[quant_type], CPU)
    packed = torch.empty((n + 1) // 2, 1, dtype=torch.uint8)
    absmax = torch.empty(-(-n // blocksize), dtype=torch.float32)
    status = library().fastlora_quantize_4bit(
        DTYPES[weight.dtype],
        n,
        weight.data_ptr(),
        thresholds.data_ptr(),
        order.data_ptr(),
        blocksize,
        packed.data_ptr(),
        absmax.data_ptr(),
        torch.get_num_threads(),
    )
    check(status, "fastlora_quantize_4bit")
    return packed, absmax


def dequantize_4bit(weight: StoredWeight, n: int, k: int, dtype: torch.dtype) -> Tensor:
    """The dense matrix of a 4-bit weight on CPU.

    Args:
        weight: 4-bit.
        n: rows.
        k: columns.
        dtype: float32, bfloat16 or float16.

    Returns:
        (n, k) ``dtype``.
    """
    weight = contiguous(weight)
    out = torch.empty(n, k, dtype=dtype)
    view = describe(weight, n, k)
    status = library().fastlora_dequantize_4bit(
        DTYPES[dtype], view, out.data_ptr(), torch.get_num_threads()
    )
    check(status, "fastlora_dequantize_4bit")
    return out
