"""Check the operands of `experts_linear`."""

from __future__ import annotations

import torch
from fastlora_kernels.experts import ExpertsUpdate
from fastlora_kernels.formats import FORMATS, StoredWeight
from torch import Tensor

from fastlora.checks import FLOATS
from fastlora.weight_checks import same_device

Sizes = tuple[int, int, int]


def experts_shape(weight: StoredWeight, columns: int, name: str) -> Sizes:
    """Return (E, N, K) of stacked weights of which N or K is known.

    Args:
        weight: the stacked weights.
        columns: columns of x or dy.
        name: "x": they are K; "dy": they are N.

    Raises:
        TypeError: a dtype, or a missing part.
        ValueError: a shape or a format.
    """
    data = weight.data
    if weight.format == "dense":
        own = data.shape[2 if name == "x" else 1] if data.dim() == 3 else -1
        if own != columns or columns == 0:
            raise ValueError(
                f"dense weights of experts must have shape (E, N, K) that fits the {columns}"
                f" columns of {name}, got {tuple(data.shape)}"
            )
        return data.shape[0], data.shape[1], data.shape[2]
    if weight.format not in FORMATS:
        raise ValueError(f"format must be one of {['dense', *FORMATS]}, got {weight.format!r}")
    if data.dtype != torch.uint8 or weight.absmax is None:
        raise TypeError(
            f"{weight.format} weights must be packed uint8 with their absmax, got {data.dtype} and"
            f" absmax {'None' if weight.absmax is None else weight.absmax.dtype}"
        )
    other = 2 * data.shape[1] // columns if data.dim() == 2 and columns else 0
    if other == 0 or (columns * other + 1) // 2 != data.shape[1] or not data.is_contiguous():
        raise ValueError(
            f"{weight.format} weights of experts must be a contiguous (E, ceil(N K / 2)) tensor"
            f" that fits the {columns} columns of {name}, got {tuple(data.shape)}"
        )
    n, k = (other, columns) if name == "x" else (columns, other)
    if n == 1 and k % 2:
        raise ValueError(
            f"4-bit experts of one row must have an even number of columns, got {n} x {k}, which"
            " their packed bytes do not show; keep them dense"
        )
    _check_parts(weight, data.shape[0], n * k)
    return data.shape[0], n, k


def _check_parts(weight: StoredWeight, count: int, values: int) -> None:
    """Check the magnitudes of `count` 4-bit weights with `values` values each."""
    absmax, nested, offset = weight.absmax, weight.nested_absmax, weight.nested_offset
    blocks = -(-values // weight.blocksize)
    if absmax is None or absmax.shape != (count, blocks):
        raise ValueError(
            f"absmax must have shape {(count, blocks)}, one per {weight.blocksize} weights of an"
            f" expert, got {None if absmax is None else tuple(absmax.shape)}"
        )
    if absmax.dtype != (torch.float32 if nested is None else torch.uint8):
        raise TypeError(f"absmax must be float32, or uint8 with nested_absmax, got {absmax.dtype}")
    if nested is None and offset is None:
        return
    groups = (count, -(-blocks // 256))
    if nested is None or offset is None or nested.shape != groups or offset.shape != (count,):
        raise ValueError(
            f"nested_absmax must have shape {groups} and nested_offset ({count},), got"
            f" {None if nested is None else tuple(nested.shape)} and"
            f" {None if offset is None else tuple(offset.shape)}"
        )


def check_experts(
    name: str,
    rows: Tensor,
    weight: StoredWeight,
    bias: Tensor | None,
    update: ExpertsUpdate | None,
    ends: Tensor,
) -> Sizes:
    """Return (E, N, K) after checking that the operands fit together.

    Args:
        name: "x" or "dy".
        rows: x (M, K) or dy (M, N).
        weight: the stacked weights.
        bias: (E, N), or None.
        update: A (E, r, K) and B (E, N, r), or None.
        ends: (E,) int64.

    Raises:
        TypeError: a dtype.
        ValueError: a shape or a device.
    """
    if rows.dim() != 2:
        raise ValueError(f"{name} must have two dimensions, got shape {tuple(rows.shape)}")
    if rows.dtype not in FLOATS:
        raise TypeError(f"{name} must be floating, got {rows.dtype}; cast it first")
    count, n, k = experts_shape(weight, rows.shape[1], name)
    if weight.format == "dense" and weight.data.dtype != rows.dtype:
        raise TypeError(
            f"{name} and dense weights must have one dtype, got {rows.dtype} and"
            f" {weight.data.dtype}; cast one of them"
        )
    same_device("weight", weight.data, rows)
    if ends.dtype != torch.int64 or ends.shape != (count,):
        raise TypeError(
            f"ends must be int64 of shape ({count},), the row after each expert's last, got"
            f" {ends.dtype} {tuple(ends.shape)}"
        )
    same_device("ends", ends, rows)
    if bias is not None:
        if bias.shape != (count, n) or bias.dtype not in (rows.dtype, torch.float32):
            raise ValueError(
                f"bias must have shape {(count, n)} in float32 or {rows.dtype}, got {bias.dtype}"
                f" {tuple(bias.shape)}"
            )
        same_device("bias", bias, rows)
    if update is not None:
        _check_update(rows, (count, n, k), update)
    return count, n, k


def _check_update(rows: Tensor, sizes: Sizes, update: ExpertsUpdate) -> None:
    A, B = update.A, update.B
    count, n, k = sizes
    r = A.shape[1] if A.dim() == 3 else 0
    if r == 0 or A.shape != (count, r, k) or B.shape != (count, n, r):
        raise ValueError(
            f"lora_A must have shape ({count}, r, {k}) and lora_B ({count}, {n}, r) with r at least"
            f" 1, got {tuple(A.shape)} and {tuple(B.shape)}"
        )
    if A.dtype != B.dtype or A.dtype not in (torch.float32, rows.dtype):
        raise TypeError(
            f"lora_A and lora_B must both be float32 or {rows.dtype}, got {A.dtype} and {B.dtype};"
            " cast them"
        )
    same_device("lora_A", A, rows)
    same_device("lora_B", B, rows)
