"""Check a stored weight."""

from __future__ import annotations

import torch
from fastlora_kernels.formats import BLOCKSIZES, FORMATS, StoredWeight
from torch import Tensor


def same_device(name: str, tensor: Tensor, rows: Tensor) -> None:
    """Raise a ValueError unless a tensor is on the device of the activations."""
    if tensor.device != rows.device:
        raise ValueError(
            f"all operands must be on one device, got {name} on {tensor.device} and the activations"
            f" on {rows.device}; move one of them"
        )


def weight_shape(weight: StoredWeight, k: int) -> tuple[int, int]:
    """Return (N, K) of a stored weight whose input has `k` columns."""
    data = weight.data
    if weight.format == "dense":
        if data.dim() != 2 or data.shape[1] != k or k == 0:
            raise ValueError(
                f"a dense weight must have shape (N, K) with K = {k} like the input, got"
                f" {tuple(data.shape)}"
            )
        return data.shape[0], k
    if weight.format not in FORMATS:
        raise ValueError(f"format must be one of {['dense', *FORMATS]}, got {weight.format!r}")
    if data.dtype != torch.uint8 or weight.absmax is None:
        raise TypeError(
            f"a {weight.format} weight must be packed uint8 with its absmax, got {data.dtype} and"
            f" absmax {'None' if weight.absmax is None else weight.absmax.dtype}"
        )
    even = k % 2 == 0
    n = data.shape[0] if even else 2 * data.numel() // max(k, 1)
    want = (n, k // 2) if even else ((n * k + 1) // 2, 1)
    if k == 0 or data.shape != want or not data.is_contiguous():
        raise ValueError(
            f"a {weight.format} weight for an input of K = {k} columns must be a contiguous"
            f" {'(N, K // 2)' if even else '((N * K + 1) // 2, 1)'} tensor, got shape"
            f" {tuple(data.shape)}"
        )
    _check_absmax(weight, weight.absmax, n * k)
    return n, k


def _check_absmax(weight: StoredWeight, absmax: Tensor, values: int) -> None:
    """Check the magnitudes of a 4-bit weight with `values` values."""
    if weight.blocksize not in BLOCKSIZES:
        raise ValueError(f"blocksize must be one of {tuple(BLOCKSIZES)}, got {weight.blocksize}")
    nested = weight.nested_absmax
    want = torch.float32 if nested is None else torch.uint8
    if absmax.dtype != want or (nested is not None and nested.dtype != torch.float32):
        raise TypeError(
            "absmax must be float32, or uint8 together with a float32 nested_absmax, got"
            f" {absmax.dtype} and {None if nested is None else nested.dtype}"
        )
    blocks = -(-values // weight.blocksize)
    if absmax.numel() != blocks:
        raise ValueError(
            f"absmax must have {blocks} values, one per {weight.blocksize} of {values} weights, got"
            f" {absmax.numel()}"
        )
    same_device("absmax", absmax, weight.data)
    if nested is not None and nested.numel() != -(-blocks // 256):
        raise ValueError(
            f"nested_absmax must have {-(-blocks // 256)} values, one per 256 of {blocks} absmax,"
            f" got {nested.numel()}"
        )
    offset = weight.nested_offset
    if (nested is None) != (offset is None):
        raise TypeError(
            "nested_absmax and nested_offset come together, got only one; pass both or neither"
        )
    if nested is not None and offset is not None:
        same_device("nested_absmax", nested, weight.data)
        _check_offset(offset, weight.data)


def _check_offset(offset: Tensor, data: Tensor) -> None:
    if offset.dtype != torch.float32 or offset.numel() != 1:
        raise TypeError(
            f"nested_offset must be one float32, got {offset.dtype} {tuple(offset.shape)}; pass the"
            " tensors that belong together"
        )
    same_device("nested_offset", offset, data)
