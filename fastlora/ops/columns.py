"""Scaling of columns: the magnitude of DoRA."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from fastlora.checks import check_columns, check_columns_backward
from fastlora.dispatch import check_backend, choose
from fastlora.ops.library import (
    as_output,
    bias_gradient,
    define,
    differentiate,
    is_plain,
    no_autocast,
    refuse_double,
)

Pair = tuple[Tensor, Tensor]


def _choose(op: str, z: Tensor, backend: str) -> Any:
    n = z.shape[-1]
    m = math.prod(z.shape[:-1])
    return choose(op, z.device.type, z.dtype, "dense", 0, m, n, 0, 0, None, backend)


def _forward(z: Tensor, scale: Tensor, bias: Tensor | None, backend: str) -> Tensor:
    n = check_columns(z, scale, bias)
    module = _choose("scale_columns", z, backend)
    with no_autocast(z.device.type):
        y: Tensor = module.scale_columns(z.reshape(-1, n), scale, bias)
    return y.view(z.shape)


def _backward(
    dy: Tensor, z: Tensor | None, scale: Tensor, need_dz: bool, need_dscale: bool, backend: str
) -> Pair:
    n = check_columns_backward(dy, z, scale, need_dscale)
    module = _choose("scale_columns_backward", dy, backend)
    rows = None if z is None else z.reshape(-1, n)
    with no_autocast(dy.device.type):
        dz, dscale = module.scale_columns_backward(
            dy.reshape(-1, n), rows, scale, need_dz, need_dscale
        )
    return (dz.view(dy.shape) if need_dz else dy.new_empty(0)), dscale


def _forward_fake(z: Tensor, scale: Tensor, bias: Tensor | None, backend: str) -> Tensor:
    check_backend(backend)
    check_columns(z, scale, bias)
    return z.new_empty(z.shape)


def _backward_fake(
    dy: Tensor, z: Tensor | None, scale: Tensor, need_dz: bool, need_dscale: bool, backend: str
) -> Pair:
    check_backend(backend)
    n = check_columns_backward(dy, z, scale, need_dscale)
    dscale = scale.new_empty(n if need_dscale else 0)
    return dy.new_empty(dy.shape if need_dz else (0,)), dscale


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    z, scale, bias, backend = inputs
    ctx.save_for_backward(z if ctx.needs_input_grad[1] else None, scale)
    ctx.backend = backend
    ctx.bias_dtype = None if bias is None else bias.dtype


def _gradients(ctx: Any, dy: Tensor, call: Callable[..., Pair]) -> tuple[Tensor | None, ...]:
    z, scale = ctx.saved_tensors
    needs = ctx.needs_input_grad
    dz = dscale = dbias = None
    if needs[0] or needs[1]:
        dz, dscale = call(dy, z, scale, needs[0], needs[1], ctx.backend)
    if needs[2]:
        dbias = bias_gradient(dy, ctx.bias_dtype)
    return dz if needs[0] else None, dscale if needs[1] else None, dbias, None


def _gradients_op(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    return _gradients(ctx, dy, torch.ops.fastlora.scale_columns_backward)


define(
    "scale_columns",
    "(Tensor z, Tensor scale, Tensor? bias, str backend) -> Tensor",
    _forward,
    _forward_fake,
)
define(
    "scale_columns_backward",
    "(Tensor dy, Tensor? z, Tensor scale, bool need_dz, bool need_dscale, str backend)"
    " -> (Tensor dz, Tensor dscale)",
    _backward,
    _backward_fake,
)
differentiate("scale_columns", _gradients_op, _remember)


def forward_part(z: Tensor, scale: Tensor, bias: Tensor | None, backend: str) -> Tensor:
    """Return `scale_columns` without a gradient, through the dispatcher only where watched."""
    call = _forward if is_plain(z, scale, bias) else torch.ops.fastlora.scale_columns
    return cast(Tensor, call(z, scale, bias, backend))


def backward_part(
    dy: Tensor, z: Tensor | None, scale: Tensor, need_dz: bool, need_dscale: bool, backend: str
) -> Pair:
    """Return the gradients of `forward_part`."""
    call = _backward if is_plain(dy, z, scale) else torch.ops.fastlora.scale_columns_backward
    return cast(Pair, call(dy, z, scale, need_dz, need_dscale, backend))


class _ScaleColumns(torch.autograd.Function):
    """The op without the dispatcher."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        y = _forward(*inputs)
        _remember(ctx, inputs, y)
        return as_output(y)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            refuse_double("scale_columns")
        return _gradients(ctx, dy, _backward)


def scale_columns(
    z: Tensor, scale: Tensor, bias: Tensor | None = None, backend: str = "auto"
) -> Tensor:
    """Return ``z * scale + bias``, computed in float32 and rounded once.

    Args:
        z: (..., N), float32, bfloat16, float16 or float64.
        scale: (N,), float32 (float64 for float64 z).
        bias: (N,), z's dtype or float32, or None.
        backend: "auto", or the name of one backend.

    Returns:
        (..., N) in z's dtype. Gradients reach z, scale and bias, once.

    Raises:
        TypeError: a dtype does not fit.
        ValueError: a shape or a device does not fit.
        NotImplementedError: no backend takes this problem.

    Source: the magnitude of DoRA, Liu et al. 2024, arXiv:2402.09353, eq. 5.
    """
    inputs = (z, scale, bias, backend)
    if not is_plain(z, scale, bias):
        return cast(Tensor, torch.ops.fastlora.scale_columns(*inputs))
    tensors = (z, scale, bias)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return cast(Tensor, _ScaleColumns.apply(*inputs))  # type: ignore[no-untyped-call]
    return _forward(*inputs)
