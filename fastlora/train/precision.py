"""Which number format to compute in: 16-bit formats are slow where the processor has no units."""

from __future__ import annotations

import torch

WHY_SLOW = "PyTorch is many times slower in 16 bits on this CPU, which has no instructions for them"


def slow_on_cpu(dtype: torch.dtype) -> bool:
    """Return whether PyTorch multiplies a dtype on this CPU without oneDNN's kernels.

    oneDNN takes bfloat16 from AVX-512 on, and float16 where the CPU has it; without oneDNN,
    PyTorch's own loops are 10 to 200 times slower than its float32.
    """
    if dtype == torch.bfloat16:
        return not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if dtype == torch.float16:
        return not torch.ops.mkldnn._is_mkldnn_fp16_supported()
    return False


def why_widen(trained: bool, device: torch.device | None) -> str | None:
    """Return why 16-bit weights of a checkpoint should be loaded as float32; None: they need not.

    Args:
        trained: whether the weights are trained themselves.
        device: where the model computes; None: it does not, its weights are merged and saved.
    """
    if trained:
        return "they are trained themselves"
    if device is not None and device.type == "cpu" and slow_on_cpu(torch.bfloat16):
        return WHY_SLOW
    return None
