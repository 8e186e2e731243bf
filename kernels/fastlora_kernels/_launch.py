"""What the Triton launchers share: constant tables, the device to launch on, how to split work."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from threading import Lock
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from fastlora_kernels.formats import FORMATS, StoredWeight, code_table, nested_table

OPTIONS = {"enable_fp_fusion": False}  # see _decode: a fused absmax would round differently
TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
PROGRAMS_PER_UNIT = 4  # resident programs that hide memory latency on one multiprocessor


def on_device(tensor: Tensor) -> AbstractContextManager[Any]:
    """Return a context in which Triton launches on the tensor's device."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


_scratch: dict[tuple[torch.device, int], Tensor] = {}
_scratch_lock = Lock()


@contextmanager
def scratch(n: int, k: int, dtype: torch.dtype, device: torch.device) -> Iterator[Tensor]:
    """Lend (n, k) memory for what one stream writes and reads before the context ends.

    On a GPU it is one buffer per stream, as large as the largest request so far, so that the dense
    weights of a model follow each other in the same memory. The lock keeps two threads of one
    stream from interleaving their launches.
    """
    if device.type != "cuda":
        yield torch.empty(n, k, dtype=dtype, device=device)
        return
    size = n * k * dtype.itemsize
    with _scratch_lock:
        key = (device, torch.cuda.current_stream(device).cuda_stream)
        buffer = _scratch.get(key)
        if buffer is None or buffer.numel() < size:
            _scratch.pop(key, None)
            buffer = _scratch[key] = torch.empty(size, dtype=torch.uint8, device=device)
        yield buffer[:size].view(dtype).view(n, k)


@cache
def _multiprocessors(device: torch.device) -> int:
    """Number of multiprocessors; 1 for CPU tensors, which only Triton's interpreter takes."""
    if device.type != "cuda":
        return 1
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def split_reduction(tiles: int, length: int, block: int, device: torch.device) -> tuple[int, int]:
    """Return (parts, span): into how many parts to cut a sum so that the device is full.

    Args:
        tiles: output tiles, one program each per part.
        length: terms of the sum.
        block: terms per step; `span` is a multiple of it.
        device: where it runs; the same device always gives the same answer.
    """
    steps = max(-(-length // block), 1)
    wanted = PROGRAMS_PER_UNIT * _multiprocessors(device) // max(tiles, 1)
    parts = min(max(wanted, 1), max(steps // 4, 1), 32)  # at least 4 steps each
    span = -(-steps // parts) * block
    return max(-(-length // span), 1), span


def stored_arguments(weight: StoredWeight) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    """Return how a kernel takes a 4-bit weight.

    Returns:
        (packed, absmax, nested_absmax, nested_code, nested_offset, code), and the constants CODE,
        LOG_BLOCK and NESTED.
    """
    data, absmax = weight.data.contiguous(), weight.absmax
    if absmax is None:
        raise ValueError(f"a {weight.format} weight must have an absmax, got None; pass it")
    nested, offset, book = weight.nested_absmax, weight.nested_offset, FORMATS[weight.format]
    outer = (absmax, absmax) if nested is None or offset is None else (nested, offset)
    tables = nested_table(data.device), code_table(book, data.device)
    meta = {
        "CODE": book.code,
        "LOG_BLOCK": weight.blocksize.bit_length() - 1,
        "NESTED": nested is not None,
    }
    return (data, absmax, outer[0], tables[0], outer[1], tables[1]), meta
