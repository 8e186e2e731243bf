"""DoRA's magnitude: one factor per output, on any update of low rank.

``y = g (x W^T + update) + bias`` with ``g = magnitude / ||W + update||``, the norm of each row,
which counts as a constant in the gradient.

Source: Liu et al. 2024, arXiv:2402.09353, eq. 5 and section 4.3.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from fastlora_kernels.low_rank import LowRank
from torch import Tensor

from fastlora import ops
from fastlora.adapters.call import Base, Call
from fastlora.factors import row_norms

NAME = "lora_magnitude_vector"


def _squares(base: Base, update: LowRank, dtype: torch.dtype) -> Tensor:
    """Return the sum of squares of each row of W, which is kept: (N,)."""
    n, k = update.B.shape[0], update.A.shape[1]

    def squares() -> Tensor:
        return ops.weight_squares(base.weight, n, k, dtype, base.backend)

    return base.cache.frozen("squares", _tensors(base), squares, also=dtype)


def norms(base: Base, update: LowRank, dtype: torch.dtype) -> Tensor:
    """Return ``||W + update||`` of each row: (N,) float32, float64 for float64.

    Args:
        base: the frozen linear.
        update: the update.
        dtype: to which a 4-bit weight is decoded.
    """
    n, k = update.B.shape[0], update.A.shape[1]
    squares = _squares(base, update, dtype)
    return row_norms(base.weight, n, k, squares, update, dtype, base.backend)


def _tensors(base: Base) -> tuple[Tensor, ...]:
    return tuple(part for part in base.weight[:4] if part is not None)


def _decoded(base: Base, x: Tensor) -> torch.dtype:
    """Return the dtype in which the weight is multiplied with x; a dense one keeps its own."""
    if base.weight.format == "dense":
        return base.weight.data.dtype
    device = x.device.type
    if x.dtype != torch.float64 and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return x.dtype


def scale(
    base: Base, x: Tensor, params: Mapping[str, Tensor], update: LowRank, training: bool
) -> Tensor:
    """Return g (N,), with a gradient to the magnitude alone; it is kept in inference."""
    dtype = _decoded(base, x)

    def make() -> Tensor:
        return ops.over_norms(params[NAME], norms(base, update, dtype))

    sources = (*_tensors(base), *params.values())
    return base.cache.trained("scale", sources, training, make, (dtype, update.scaling))


def call(
    x: Tensor,
    base: Base,
    params: Mapping[str, Tensor],
    update: LowRank,
    dropout: float,
    training: bool,
) -> Call:
    """Return what a layer with a magnitude computes for x (..., K).

    With dropout this is ``y = (x - d) W^T + bias + g (d W^T + update(d))``, d being x dropped out:
    two products with the weight, as in PEFT.
    """
    if dropout == 0:

        def scaled(z: Tensor) -> Tensor:
            g = scale(base, x, params, update, training)
            return ops.scale_columns(z, g, base.bias, base.backend)

        if not training and not torch.is_grad_enabled():
            return Call(x, None, update, scaled)
        base.cache.drop("scale")
        alone = partial(_alone, x, base, params[NAME], update)
        return Call(x, None, update, scaled, alone)
    g = scale(base, x, params, update, training)
    dropped = ops.drop(x, ops.dropout_seed(x), dropout)

    def finish(z: Tensor) -> Tensor:
        rest = ops.linear(x - dropped, base.weight, base.bias, None, base.backend)
        return rest + ops.scale_columns(z, g, None, base.backend)

    return Call(dropped, None, update, finish)


def _alone(x: Tensor, base: Base, magnitude: Tensor, update: LowRank) -> Tensor:
    """Return the output, by one op that finds the norms itself where the backend can."""
    dtype, n = _decoded(base, x), update.B.shape[0]
    found = squares = None
    if ops.finds_norms(x, base.weight, update, n, base.backend):
        squares = _squares(base, update, dtype)
    else:
        found = norms(base, update, dtype)
    rest = (update, magnitude, found, squares, base.backend)
    return ops.scaled_linear(x, base.weight, base.bias, *rest)


def apply(total: Tensor, magnitude: Tensor) -> Tensor:
    """Return the rows of total (N, K), each with its magnitude as its norm."""
    norm = torch.linalg.vector_norm(total, dim=1)
    return total * ops.over_norms(magnitude, norm).unsqueeze(1)
