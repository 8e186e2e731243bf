"""The fused linear with a magnitude per output: what a layer with DoRA computes.

It is `linear` and then `scale_columns`, but for two things. The gradient of an adapter in float32
under activations of 16 bits is taken from dy itself, the factor folded into B, and not from the
product of both rounded to 16 bits. And a backend that has `scaled_linear` finds the norms while it
decodes the weight for the product.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from fastlora_kernels.formats import StoredWeight
from fastlora_kernels.low_rank import LowRank
from torch import Tensor

from fastlora.checks import check_forward
from fastlora.dispatch import choose
from fastlora.ops import columns
from fastlora.ops.library import (
    as_multiplied,
    as_output,
    bias_gradient,
    is_cast,
    is_plain,
    no_autocast,
    refuse_double,
)
from fastlora.ops.lora_linear import WEIGHT_GRAD, backward_parts, forward_parts


class _ScaledLinear(torch.autograd.Function):
    """Its operands have been checked by the forward when it goes backward."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        A: Tensor,
        B: Tensor,
        magnitude: Tensor,
        bias: Tensor | None,
        norms: Tensor,
        weight: StoredWeight,
        update: LowRank,
        squared: bool,
        backend: str,
    ) -> Tensor:
        """With `squared`, `norms` are the sums of squares of W's rows, of which norms are made."""
        if squared:
            y, z, s, norms = _in_one(x, weight, bias, update, norms, magnitude, backend)
        else:
            z, s = forward_parts(x, weight, None, update, backend)
            y = columns.forward_part(z, over_norms(magnitude, norms), bias, backend)
        needs = ctx.needs_input_grad[:5]  # x, A, B, magnitude, bias
        low = needs[1] or needs[2]
        flat = weight.is_flat(x.shape[-1])  # then x knows K
        kept = (x if low or flat else None, s if low else None, z if needs[3] else None)
        ctx.save_for_backward(*kept, magnitude, norms, *weight[:4], A, B, update.seed, update.spans)
        ctx.rest = weight[4:], update.scaling, update.dropout, backend, needs, x.shape[-1]
        ctx.bias_dtype = None if bias is None else bias.dtype
        return as_output(y)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            refuse_double("scaled_linear")
        x, s, z, magnitude, norms, data, absmax, nested, offset, A, B, seed, spans = (
            ctx.saved_tensors
        )
        kind, scaling, dropout, backend, needs, k = ctx.rest
        need_x, need_A, need_B, need_scale, need_bias = needs
        scale = over_norms(magnitude, norms)
        low, exact = need_A or need_B, A.dtype != dy.dtype
        weight = StoredWeight(data, absmax, nested, offset, *kind)
        update = LowRank(A, B, scaling, dropout, seed, spans)
        dx = dA = dB = dscale = None
        need_dz = need_x or (low and not exact)
        if need_dz or need_scale:
            dz, dscale = columns.backward_part(dy, z, scale, need_dz, need_scale, backend)
        if need_dz:
            both = (need_x, low and not exact)
            dx, dA, dB = backward_parts(dz, x, s, weight, update, *both, backend, k)
        if low and exact:
            scaled = update._replace(B=B * scale.unsqueeze(1))
            _, dA, dB = backward_parts(dy, x, s, weight, scaled, False, True, backend, k)
            dB = dB * scale.unsqueeze(1)
        return (
            dx if need_x else None,
            dA if need_A else None,
            dB if need_B else None,
            None
            if dscale is None or not need_scale
            else over_norms(dscale, norms).to(magnitude.dtype),
            bias_gradient(dy, ctx.bias_dtype) if need_bias else None,
            *(None,) * 5,
        )


def over_norms(values: Tensor, norms: Tensor) -> Tensor:
    """Return ``values / norms``, (N,) in the norms' dtype; 0 for a row of zeros: it stays one."""
    tiny = torch.finfo(norms.dtype).tiny
    return values.to(norms.dtype) / norms.masked_fill(norms < tiny, math.inf)


def _in_one(
    x: Tensor,
    weight: StoredWeight,
    bias: Tensor | None,
    update: LowRank,
    squares: Tensor,
    magnitude: Tensor,
    backend: str,
) -> tuple[Tensor, ...]:
    """Return (y, z, s, norms) from a backend that has `scaled_linear`."""
    n, k = check_forward(x, weight, bias, update)
    module = _choose(x, weight, update, n, k, backend)
    with no_autocast(x.device.type):
        y, z, s, norms = module.scaled_linear(
            x.reshape(-1, k), weight, bias, update, squares, magnitude
        )
    return y.view(*x.shape[:-1], n), z.view(*x.shape[:-1], n), s, norms


def _choose(x: Tensor, weight: StoredWeight, update: LowRank, n: int, k: int, backend: str) -> Any:
    kind = (x.device.type, x.dtype, weight.format, weight.blocksize)
    sizes = (math.prod(x.shape[:-1]), n, k, update.A.shape[0], update.A.dtype)
    return choose("lora_linear", *kind, *sizes, backend, weight.compute)


def finds_norms(
    x: Tensor, weight: StoredWeight, update: LowRank, n: int, backend: str = "auto"
) -> bool:
    """Return whether the backend finds the norms by itself; see `scaled_linear`."""
    if not is_plain(x, weight.data, update.A, update.B) or is_cast(x, weight):
        return False
    usual = update.A.dtype in (torch.float32, x.dtype) and update.A.dtype == update.B.dtype
    if not usual or update.dropout or update.spans is not None:
        return False
    return hasattr(_choose(x, weight, update, n, x.shape[-1], backend), "scaled_linear")


def scaled_linear(
    x: Tensor,
    weight: StoredWeight,
    bias: Tensor | None,
    update: LowRank,
    magnitude: Tensor,
    norms: Tensor | None,
    squares: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Return ``magnitude / norms * (x W^T + update) + bias`` for a stored weight; see `linear`.

    Args:
        x: (..., K), float32, bfloat16, float16 or float64.
        weight: the stored (N, K) weight, frozen.
        bias: (N,), x's dtype or float32, or None.
        update: the low-rank term.
        magnitude: (N,), any float.
        norms: (N,), float32 (float64 for float64 x), constants; None: they are found from
            `squares`, which takes a backend that `finds_norms`.
        squares: (N,) float32, the sums of squares of W's rows; see `weight_squares`.
        backend: "auto", or the name of one backend.

    Returns:
        (..., N) in x's dtype, contiguous. Gradients reach x, bias, A, B and magnitude, once.

    Raises:
        TypeError: a dtype does not fit.
        ValueError: a shape, a device or a name does not fit, or the weight requires a gradient.
        NotImplementedError: no backend takes this problem; the message gives each one's reason.

    Source: Liu et al. 2024, arXiv:2402.09353, eq. 5.
    """
    if torch.is_grad_enabled() and weight.data.requires_grad:
        raise ValueError(WEIGHT_GRAD)
    x, weight = as_multiplied(x, weight)
    norm = squares if norms is None else norms
    operands = (x, update.A, update.B, magnitude, bias, norm, weight, update, norms is None)
    return cast(Tensor, _ScaledLinear.apply(*operands, backend))  # type: ignore[no-untyped-call]
