"""Sums over the rows of a stored weight, without a gradient: what DoRA's norms are made of."""

from __future__ import annotations

from typing import Any, cast

import torch
from fastlora_kernels.formats import StoredWeight
from torch import Tensor

from fastlora.checks import check_dots, check_squares, wide_dtype
from fastlora.dispatch import check_backend, choose
from fastlora.ops.library import WEIGHT, define, is_plain, no_autocast


def _dots(a: Tensor, *rest: Any) -> Tensor:
    weight, (dtype, backend) = StoredWeight(*rest[:7]), rest[7:]
    n, k = check_dots(a, weight, dtype)
    kind = (a.device.type, dtype, weight.format, weight.blocksize)
    module = choose("weight_dots", *kind, a.shape[0], n, k, 0, a.dtype, backend)
    with no_autocast(a.device.type):
        dots: Tensor = module.weight_dots(a, weight, n, dtype)
    return dots


def _dots_fake(a: Tensor, *rest: Any) -> Tensor:
    check_backend(rest[8])
    n, _ = check_dots(a, StoredWeight(*rest[:7]), rest[7])
    return a.new_empty((a.shape[0], n), dtype=wide_dtype(rest[7]))


def _squares(*rest: Any) -> Tensor:
    weight, (k, dtype, backend) = StoredWeight(*rest[:7]), rest[7:]
    n = check_squares(weight, k, dtype)
    device = weight.data.device.type
    kind = (device, dtype, weight.format, weight.blocksize)
    module = choose("weight_squares", *kind, 0, n, k, 0, None, backend)
    with no_autocast(device):
        squares: Tensor = module.weight_squares(weight, n, k, dtype)
    return squares


def _squares_fake(*rest: Any) -> Tensor:
    weight, (k, dtype, backend) = StoredWeight(*rest[:7]), rest[7:]
    check_backend(backend)
    return weight.data.new_empty(check_squares(weight, k, dtype), dtype=wide_dtype(dtype))


define(
    "weight_dots",
    f"(Tensor a, {WEIGHT}, ScalarType dtype, str backend) -> Tensor",
    _dots,
    _dots_fake,
)
define(
    "weight_squares",
    f"({WEIGHT}, int k, ScalarType dtype, str backend) -> Tensor",
    _squares,
    _squares_fake,
)


def weight_dots(
    a: Tensor, weight: StoredWeight, dtype: torch.dtype, backend: str = "auto"
) -> Tensor:
    """Return ``a W^T``, with W decoded to `dtype` and sums in float32; it has no gradient.

    Args:
        a: (R, K), float32 or `dtype`.
        weight: the stored (N, K) weight.
        dtype: to which W is decoded; that of a dense weight.
        backend: "auto", or the name of one backend.

    Returns:
        (R, N) float32 (float64 for float64).

    Raises:
        TypeError: a dtype does not fit.
        ValueError: a shape or a device does not fit.
        NotImplementedError: no backend takes this problem.
    """
    inputs = (a.detach(), weight.data.detach(), *weight[1:], dtype, backend)
    if not is_plain(a, weight.data):
        return cast(Tensor, torch.ops.fastlora.weight_dots(*inputs))
    return _dots(*inputs)


def weight_squares(
    weight: StoredWeight, n: int, k: int, dtype: torch.dtype, backend: str = "auto"
) -> Tensor:
    """Return the sum of squares of each row of W decoded to `dtype`; it has no gradient.

    Args:
        weight: the stored (N, K) weight.
        n: N.
        k: K.
        dtype: to which W is decoded; that of a dense weight.
        backend: "auto", or the name of one backend.

    Returns:
        (N,) float32 (float64 for float64).

    Raises:
        TypeError: a dtype does not fit.
        ValueError: a shape does not fit.
        NotImplementedError: no backend takes this problem.
    """
    inputs = (weight.data.detach(), *weight[1:], k, dtype, backend)
    if is_plain(weight.data):
        squares = _squares(*inputs)
    else:
        squares = torch.ops.fastlora.weight_squares(*inputs)
    if squares.shape[0] != n:
        raise ValueError(f"the weight must have n = {n} rows, got {squares.shape[0]}; pass its own")
    return squares
