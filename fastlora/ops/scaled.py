"""The fused linear with a factor per output: what a layer with DoRA's magnitude computes.

It is `linear` and then `scale_columns`, but for the gradient of an adapter in float32 under
activations of 16 bits: that is taken from dy itself, the factor folded into B, and not from the
product of both rounded to 16 bits.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from fastlora_kernels.formats import StoredWeight
from fastlora_kernels.low_rank import LowRank
from torch import Tensor

from fastlora.ops import columns
from fastlora.ops.library import activation_dtype, bias_gradient, refuse_double
from fastlora.ops.lora_linear import WEIGHT_GRAD, backward_parts, forward_parts


class _ScaledLinear(torch.autograd.Function):
    """Its operands have been checked by the forward when it goes backward."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        A: Tensor,
        B: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        weight: StoredWeight,
        update: LowRank,
        backend: str,
    ) -> Tensor:
        z, s = forward_parts(x, weight, None, update, backend)
        needs = ctx.needs_input_grad[:5]  # x, A, B, scale, bias
        low = needs[1] or needs[2]
        flat = weight.format != "dense" and x.shape[-1] % 2 == 1  # packed bytes without their K
        kept = (x if low or flat else None, s if low else None)
        kept_z = z if needs[3] else None
        ctx.save_for_backward(*kept, kept_z, scale, *weight[:4], A, B, update.seed, update.spans)
        ctx.rest = weight[4:], update.scaling, update.dropout, backend, needs, x.shape[-1]
        ctx.bias_dtype = None if bias is None else bias.dtype
        return columns.forward_part(z, scale, bias, backend)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            refuse_double("scaled_linear")
        x, s, z, scale, data, absmax, nested, offset, A, B, seed, spans = ctx.saved_tensors
        kind, scaling, dropout, backend, needs, k = ctx.rest
        need_x, need_A, need_B, need_scale, need_bias = needs
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
            dscale if need_scale else None,
            bias_gradient(dy, ctx.bias_dtype) if need_bias else None,
            None,
            None,
            None,
        )


def scaled_linear(
    x: Tensor,
    weight: StoredWeight,
    bias: Tensor | None,
    update: LowRank,
    scale: Tensor,
    backend: str = "auto",
) -> Tensor:
    """Return ``scale * (x W^T + update) + bias`` for a stored weight; see `linear`.

    Args:
        x: (..., K), float32, bfloat16, float16 or float64.
        weight: the stored (N, K) weight, frozen.
        bias: (N,), x's dtype or float32, or None.
        update: the low-rank term.
        scale: (N,), float32 (float64 for float64 x).
        backend: "auto", or the name of one backend.

    Returns:
        (..., N) in x's dtype, contiguous. Gradients reach x, bias, A, B and scale, once.

    Raises:
        TypeError: a dtype does not fit.
        ValueError: a shape, a device or a name does not fit, or the weight requires a gradient.
        NotImplementedError: no backend takes this problem; the message gives each one's reason.

    Source: Liu et al. 2024, arXiv:2402.09353, eq. 5.
    """
    if torch.is_grad_enabled() and weight.data.requires_grad:
        raise ValueError(WEIGHT_GRAD)
    dtype = activation_dtype(x)
    if dtype != x.dtype:
        x = x.to(dtype)
        if weight.format == "dense":
            weight = weight._replace(data=weight.data.to(dtype))
    operands = (x, update.A, update.B, scale, bias, weight, update, backend)
    return cast(Tensor, _ScaledLinear.apply(*operands))  # type: ignore[no-untyped-call]
