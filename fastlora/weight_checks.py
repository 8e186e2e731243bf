"""Check a stored weight."""

from __future__ import annotations

import torch
from fastlora_kernels.formats import BLOCKSIZES, FORMATS, StoredWeight
from torch import Tensor

from fastlora.dispatch import check_compute


def same_device(name: str, tensor: Tensor, rows: Tensor) -> None:
    """Raise a ValueError unless a tensor is on the device of the activations."""
    if tensor.device != rows.device:
        raise ValueError(
            f"all operands must be on one device, got {name} on {tensor.device} and the activations"
            f" on {rows.device}; move one of them"
        )


def weight_shape(weight: StoredWeight, k: int) -> tuple[int, int]:
    """Return (N, K) of a stored weight whose input has `k` columns, after checking it.

    Raises:
        TypeError: a dtype, or a missing or superfluous part.
        ValueError: a shape, a device, a format or a block size.
    """
    data, format = weight.data, weight.format
    if weight.compute != "auto":
        _check_compute(weight)
    shape = data.shape
    if format == "dense":
        if len(shape) != 2 or shape[1] != k or k == 0:
            raise ValueError(
                f"a dense weight must have shape (N, K) with K = {k} like the input, got"
                f" {tuple(shape)}"
            )
        return shape[0], k
    if format not in FORMATS:
        raise ValueError(f"format must be one of {['dense', *FORMATS]}, got {format!r}")
    absmax = weight.absmax
    if data.dtype != torch.uint8 or absmax is None:
        raise TypeError(
            f"a {format} weight must be packed uint8 with its absmax, got {data.dtype} and"
            f" absmax {'None' if absmax is None else absmax.dtype}"
        )
    even = k % 2 == 0
    n = shape[0] if even else 2 * data.numel() // max(k, 1)
    want = (n, k // 2) if even else ((n * k + 1) // 2, 1)
    if k == 0 or shape != want or not data.is_contiguous():
        raise ValueError(
            f"a {format} weight for an input of K = {k} columns must be a contiguous"
            f" {'(N, K // 2)' if even else '((N * K + 1) // 2, 1)'} tensor, got shape"
            f" {tuple(shape)}"
        )
    _check_absmax(weight, absmax, n * k)
    return n, k


def _check_compute(weight: StoredWeight) -> None:
    """Raise unless a weight can be asked for another product than the usual one."""
    check_compute(weight.compute)
    if weight.format == "dense":
        raise ValueError(
            f"compute={weight.compute!r} takes a 4-bit weight, got a dense one; quantize it, or"
            " leave compute at 'auto'"
        )


def _check_absmax(weight: StoredWeight, absmax: Tensor, values: int) -> None:
    """Check the magnitudes of a 4-bit weight with `values` values."""
    data, _, nested, offset, _, blocksize, _ = weight
    if blocksize not in BLOCKSIZES:
        raise ValueError(f"blocksize must be one of {tuple(BLOCKSIZES)}, got {blocksize}")
    want = torch.float32 if nested is None else torch.uint8
    if absmax.dtype != want or (nested is not None and nested.dtype != torch.float32):
        raise TypeError(
            "absmax must be float32, or uint8 together with a float32 nested_absmax, got"
            f" {absmax.dtype} and {None if nested is None else nested.dtype}"
        )
    blocks = -(-values // blocksize)
    if absmax.numel() != blocks:
        raise ValueError(
            f"absmax must have {blocks} values, one per {blocksize} of {values} weights, got"
            f" {absmax.numel()}"
        )
    if absmax.device != data.device:
        same_device("absmax", absmax, data)
    if (nested is None) != (offset is None):
        raise TypeError(
            "nested_absmax and nested_offset come together, got only one; pass both or neither"
        )
    if nested is not None and offset is not None:
        _check_nested(nested, offset, data, blocks)


def _check_nested(nested: Tensor, offset: Tensor, data: Tensor, blocks: int) -> None:
    """Check what `blocks` double-quantised magnitudes are decoded with."""
    if nested.numel() != -(-blocks // 256):
        raise ValueError(
            f"nested_absmax must have {-(-blocks // 256)} values, one per 256 of {blocks} absmax,"
            f" got {nested.numel()}"
        )
    if offset.dtype != torch.float32 or offset.numel() != 1:
        raise TypeError(
            f"nested_offset must be one float32, got {offset.dtype} {tuple(offset.shape)}; pass the"
            " tensors that belong together"
        )
    device = data.device
    if nested.device != device or offset.device != device:
        same_device("nested_absmax", nested, data)
        same_device("nested_offset", offset, data)
