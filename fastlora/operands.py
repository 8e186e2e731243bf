"""What the public functions do with their operands before the ops take them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from fastlora_kernels.formats import StoredWeight
from fastlora_kernels.low_rank import LowRank
from torch import Tensor

from fastlora import ops
from fastlora.ops.library import is_plain
from fastlora.quant import QuantizedWeight
from fastlora.weight_checks import same_device

Weight = Tensor | QuantizedWeight


def as_stored(weight: Weight, compute: str) -> tuple[StoredWeight, tuple[int, int]]:
    """Return a weight as the ops take it, to be multiplied as `compute` says, and its shape (N, K).

    Raises:
        TypeError: it is neither a Tensor nor a QuantizedWeight.
        ValueError: it is not a matrix, or its packed bytes cannot tell its shape.
    """
    if not isinstance(weight, (Tensor, QuantizedWeight)):
        raise TypeError(
            f"weight must be a Tensor or a QuantizedWeight, got {type(weight).__name__}"
        )
    if len(weight.shape) != 2:
        raise ValueError(f"weight must have shape (N, K), got {tuple(weight.shape)}")
    n, k = weight.shape
    if isinstance(weight, Tensor):
        return StoredWeight(weight, None, None, None, "dense", 0, compute), (n, k)
    if k == 1 and n % 2:
        raise ValueError(
            f"a 4-bit weight with one column must have an even number of rows, got ({n}, 1); keep"
            " it dense"
        )
    stored = weight.stored()
    return (stored if compute == "auto" else stored._replace(compute=compute)), (n, k)


def with_dropout(
    update: LowRank | None, x: Tensor, dropout: float, seed: Tensor | None
) -> LowRank | None:
    """Return the update with dropout; without a seed given, with a new one."""
    if update is None or dropout == 0:
        return update
    seed = ops.dropout_seed(x) if seed is None else seed
    return update._replace(dropout=float(dropout), seed=seed)


def size(matrix: Tensor, dim: int) -> int:
    """Return the size of a dimension, 0 of what is no matrix, for `check_factors` to refuse."""
    return matrix.shape[dim] if matrix.dim() == 2 else 0


def check_factors(
    operands: Mapping[str, tuple[Tensor, tuple[int, int]]], x: Tensor, dtype: torch.dtype
) -> None:
    """Check the matrices of an adapter by name, each with the shape it must have.

    Args:
        operands: name -> (matrix, shape).
        x: the activations.
        dtype: the dtype in which they are multiplied.

    Raises:
        TypeError: a dtype.
        ValueError: a shape or a device.
    """
    for name, (matrix, shape) in operands.items():
        if matrix.dim() != 2:
            raise ValueError(f"{name} must have two dimensions, got shape {tuple(matrix.shape)}")
        if tuple(matrix.shape) != shape or 0 in shape:
            raise ValueError(f"{name} must have shape {shape}, got {tuple(matrix.shape)}")
        same_device(name, matrix, x)
    dtypes = {matrix.dtype for matrix, _ in operands.values()}
    if len(dtypes) > 1 or not dtypes <= {torch.float32, dtype}:
        raise TypeError(
            f"{', '.join(operands)} must all be float32 or all be {dtype} like x, got"
            f" {', '.join(sorted(map(str, dtypes)))}; cast them"
        )


def check_vector(name: str, vector: Tensor, n: int, x: Tensor) -> None:
    """Check that a vector has one floating value per row of the weight.

    Raises:
        TypeError: its dtype.
        ValueError: its shape or its device.
    """
    if vector.shape != (n,):
        raise ValueError(f"{name} must have shape ({n},), got {tuple(vector.shape)}")
    if not vector.is_floating_point():
        raise TypeError(f"{name} must be floating, got {vector.dtype}; cast it")
    same_device(name, vector, x)


def check_ids(adapter_ids: Tensor, x: Tensor, count: int) -> None:
    """Check the adapter of each row of x (..., K), one of `count` or -1.

    The values are looked at where that is cheap: on a CPU, outside of `torch.compile`.

    Raises:
        TypeError: a dtype.
        ValueError: a shape, a device or an id.
    """
    if adapter_ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"adapter_ids must be int32 or int64, got {adapter_ids.dtype}; cast it")
    if x.dim() == 0 or adapter_ids.shape != x.shape[:-1][: adapter_ids.dim()]:
        raise ValueError(
            "adapter_ids must have the first dimensions of x's"
            f" {tuple(x.shape[:-1])}, got {tuple(adapter_ids.shape)}"
        )
    same_device("adapter_ids", adapter_ids, x)
    if is_plain(adapter_ids) and adapter_ids.device.type == "cpu" and adapter_ids.numel():
        least, most = (int(end) for end in adapter_ids.aminmax())
        if least < -1 or most >= count:
            raise ValueError(
                f"adapter_ids must be from -1, no adapter, to {count - 1}, got {least} to {most}"
            )
