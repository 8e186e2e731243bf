"""Dropout whose mask is a function of a seed: recomputed where it is needed, never stored.

It is for what stands beside a product, by torch on every device; in a product it is fused.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from fastlora_kernels.low_rank import keep_mask, keep_scale
from torch import Tensor

from fastlora.checks import check_drop
from fastlora.ops.library import as_output, define, differentiate, is_plain


def dropout_seed(x: Tensor) -> Tensor:
    """Return a new seed for dropout: int64 (1,) on x's device.

    It is drawn from torch's default generator of that device, so `torch.manual_seed` and
    activation checkpointing reproduce it.
    """
    return torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=x.device)


def _drop(x: Tensor, seed: Tensor, dropout: float) -> Tensor:
    check_drop(x, seed, dropout)
    rows = x.reshape(-1, x.shape[-1])
    keep = keep_mask(seed, rows.shape[0], rows.shape[1], dropout)
    return (rows * keep_scale(dropout)).masked_fill_(~keep, 0).view(x.shape)


def _drop_fake(x: Tensor, seed: Tensor, dropout: float) -> Tensor:
    check_drop(x, seed, dropout)
    return x.new_empty(x.shape)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, seed, ctx.dropout = inputs
    ctx.save_for_backward(seed)


def _gradients_op(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    """Return the gradient, which is the same function of dy."""
    return torch.ops.fastlora.drop(dy, *ctx.saved_tensors, ctx.dropout), *_NONE


_NONE = (None, None)

define("drop", "(Tensor x, Tensor seed, float dropout) -> Tensor", _drop, _drop_fake)
differentiate("drop", _gradients_op, _remember, twice=True)


class _Drop(torch.autograd.Function):
    """The op without the dispatcher."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        _remember(ctx, inputs, inputs[0])
        return as_output(_drop(*inputs))

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (seed,) = ctx.saved_tensors
        return drop(dy, seed, ctx.dropout), *_NONE


def drop(x: Tensor, seed: Tensor, dropout: float) -> Tensor:
    """Return x with a share of its elements zero and the others times ``1 / (1 - dropout)``.

    Args:
        x: (..., K), float32, bfloat16, float16 or float64.
        seed: one int64 on x's device, `dropout_seed`; it decides which elements are dropped.
        dropout: the share, at least 0 and below 1.

    Returns:
        (..., K) in x's dtype. Gradients reach x.

    Raises:
        TypeError: a dtype does not fit.
        ValueError: a shape, a device or the share does not fit.
    """
    inputs = (x, seed, dropout)
    if not is_plain(x, seed):
        return cast(Tensor, torch.ops.fastlora.drop(*inputs))
    if torch.is_grad_enabled() and x.requires_grad:
        return cast(Tensor, _Drop.apply(*inputs))  # type: ignore[no-untyped-call]
    return _drop(*inputs)
