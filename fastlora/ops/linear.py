"""The fused linear: a frozen weight, a bias and a low-rank term, forward and backward."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import torch
from fastlora_kernels.formats import StoredWeight
from fastlora_kernels.low_rank import LowRank
from torch import Tensor

from fastlora.checks import check_backward, check_forward, low_rank, wide_dtype
from fastlora.dispatch import check_backend, choose
from fastlora.ops.library import (
    WEIGHT,
    activation_dtype,
    define,
    differentiate,
    is_plain,
    no_autocast,
    refuse_double,
)

Grads = tuple[Tensor, Tensor, Tensor]
_UPDATE = (
    "Tensor? lora_A, Tensor? lora_B, float scaling, float dropout, Tensor? seed, Tensor? spans"
)
_NO_UPDATE = (None, None, 0.0, 0.0, None, None)
_WEIGHT_GRAD = (
    "the weight of a fastlora linear must be frozen, got one that requires a gradient; call"
    " weight.requires_grad_(False) or train it with torch.nn.functional.linear"
)


def _forward(
    x: Tensor, weight: StoredWeight, bias: Tensor | None, update: LowRank | None, backend: str
) -> tuple[Tensor, Tensor]:
    """Return (y, s) from the backend that takes the problem; x of any number of dimensions."""
    n, k = check_forward(x, weight, bias, update)
    rows = x if x.dim() == 2 else x.reshape(-1, k)  # (M, K)
    if bias is not None and bias.dtype != x.dtype:
        bias = bias.to(x.dtype)
    r, dtype = (0, None) if update is None else (update.A.shape[0], update.A.dtype)
    m, kind = rows.shape[0], (x.device.type, x.dtype, weight.format, weight.blocksize)
    module = choose("lora_linear", *kind, m, n, k, r, dtype, backend)
    with no_autocast(x.device.type):
        y, s = module.lora_linear(rows, weight, bias, update)
    return (y if x.dim() == 2 else y.view(*x.shape[:-1], n)), s


def _backward(
    dy: Tensor,
    x: Tensor | None,
    s: Tensor | None,
    weight: StoredWeight,
    update: LowRank | None,
    need_dx: bool,
    need_dlora: bool,
    backend: str,
) -> Grads:
    """Return (dx, dA, dB) from the backend that takes the problem."""
    n, k = check_backward(dy, x, s, weight, update, need_dlora)
    rows = dy if dy.dim() == 2 else dy.reshape(-1, n)  # (M, N)
    if x is not None and x.dim() != 2:
        x = x.reshape(-1, k)
    r, dtype = (0, None) if update is None else (update.A.shape[0], update.A.dtype)
    m, kind = rows.shape[0], (dy.device.type, dy.dtype, weight.format, weight.blocksize)
    module = choose("lora_linear_backward", *kind, m, n, k, r, dtype, backend)
    with no_autocast(dy.device.type):
        dx, dA, dB = module.lora_linear_backward(rows, x, s, weight, update, need_dx, need_dlora)
    return (dx.view(*dy.shape[:-1], k) if need_dx and dy.dim() != 2 else dx), dA, dB


def _forward_op(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """Run the op with the arguments of its schema: `rest` starts with the stored weight."""
    return _forward(x, StoredWeight(*rest[:6]), rest[6], low_rank(*rest[7:13]), rest[13])


def _backward_eager(dy: Tensor, x: Tensor | None, s: Tensor | None, *rest: Any) -> Grads:
    return _backward(dy, x, s, StoredWeight(*rest[:6]), low_rank(*rest[6:12]), *rest[12:])


def _backward_op(dy: Tensor, x: Tensor | None, s: Tensor | None, *rest: Any) -> Grads:
    """Run the op; what is not needed comes back as separate tensors without elements."""
    need_dx, need_dlora = rest[12:14]
    dx, dA, dB = _backward_eager(dy, x, s, *rest)
    dx = dx if need_dx else dy.new_empty(0)
    return (dx, dA, dB) if need_dlora else (dx, dy.new_empty(0), dy.new_empty(0))


def _forward_fake(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    check_backend(rest[13])
    update = low_rank(*rest[7:13])
    n, _ = check_forward(x, StoredWeight(*rest[:6]), rest[6], update)
    shape = (0,) if update is None else (math.prod(x.shape[:-1]), update.A.shape[0])
    return x.new_empty((*x.shape[:-1], n)), x.new_empty(shape, dtype=wide_dtype(x.dtype))


def _backward_fake(dy: Tensor, x: Tensor | None, s: Tensor | None, *rest: Any) -> Grads:
    need_dx, need_dlora, backend = rest[12:]
    check_backend(backend)
    update = low_rank(*rest[6:12])
    _, k = check_backward(dy, x, s, StoredWeight(*rest[:6]), update, need_dlora)
    dx = dy.new_empty((*dy.shape[:-1], k) if need_dx else (0,))
    if not need_dlora or update is None:
        return dx, dy.new_empty(0), dy.new_empty(0)
    return dx, update.A.new_empty(update.A.shape), update.B.new_empty(update.B.shape)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    """Save what the backward needs: x and s only when the adapter wants its gradient."""
    x, weight, absmax, nested, offset, format, blocksize, bias, lora_A, lora_B = inputs[:10]
    needs = ctx.needs_input_grad
    if needs[1]:
        raise ValueError(_WEIGHT_GRAD)
    ctx.need_dlora = needs[8] or needs[9]
    flat = format != "dense" and x.shape[-1] % 2 == 1  # a flat packed weight does not know its K
    keep_x = x if ctx.need_dlora or flat else None
    keep_s = output[1] if ctx.need_dlora else None
    scaling, dropout, seed, spans, backend = inputs[10:]
    stored = (weight, absmax, nested, offset)
    ctx.save_for_backward(keep_x, keep_s, *stored, lora_A, lora_B, seed, spans)
    ctx.rest = (format, blocksize, scaling, dropout, backend)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _gradients(ctx: Any, dy: Tensor, call: Callable[..., Grads]) -> tuple[Tensor | None, ...]:
    """Return one gradient per input of the op, through `call`, the op or its implementation."""
    x, s, weight, absmax, nested, offset, lora_A, lora_B, seed, spans = ctx.saved_tensors
    format, blocksize, scaling, dropout, backend = ctx.rest
    needs = ctx.needs_input_grad
    dx = dA = dB = dbias = None
    if needs[0] or ctx.need_dlora:
        stored = (weight, absmax, nested, offset, format, blocksize)
        update = (lora_A, lora_B, scaling, dropout, seed, spans)
        dx, dA, dB = call(dy, x, s, *stored, *update, needs[0], ctx.need_dlora, backend)
    if needs[7]:
        total = dy.reshape(-1, dy.shape[-1]).contiguous().sum(0, dtype=wide_dtype(dy.dtype))
        dbias = total.to(ctx.bias_dtype)
    dx, dA, dB = dx if needs[0] else None, dA if needs[8] else None, dB if needs[9] else None
    return dx, None, None, None, None, None, None, dbias, dA, dB, None, None, None, None, None


def _remember_op(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _remember(ctx, inputs, output)
    ctx.mark_non_differentiable(output[1])


def _gradients_op(ctx: Any, dy: Tensor, ds: Tensor) -> tuple[Tensor | None, ...]:
    return _gradients(ctx, dy, torch.ops.fastlora.lora_linear_backward)


define(
    "lora_linear",
    f"(Tensor x, {WEIGHT}, Tensor? bias, {_UPDATE}, str backend) -> (Tensor y, Tensor s)",
    _forward_op,
    _forward_fake,
)
define(
    "lora_linear_backward",
    f"(Tensor dy, Tensor? x, Tensor? s, {WEIGHT}, {_UPDATE}, bool need_dx, bool need_dlora,"
    " str backend) -> (Tensor dx, Tensor dA, Tensor dB)",
    _backward_op,
    _backward_fake,
)
differentiate("lora_linear", _gradients_op, _remember_op)


class _LoraLinear(torch.autograd.Function):
    """The op without the dispatcher."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        y, s = _forward_op(*inputs)
        _remember(ctx, inputs, (y, s))
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            refuse_double("lora_linear")
        return _gradients(ctx, dy, _backward_eager)


def linear(
    x: Tensor,
    weight: StoredWeight,
    bias: Tensor | None,
    update: LowRank | None,
    backend: str = "auto",
) -> Tensor:
    """Return ``x W^T + bias + scaling mask_spans(drop(x) A^T) B^T`` for a stored weight.

    Under autocast, x and a dense weight are cast to the autocast dtype, as for
    `torch.nn.functional.linear`; the adapter keeps its own dtype.

    Args:
        x: (..., K), float32, bfloat16, float16 or float64.
        weight: the stored (N, K) weight, frozen.
        bias: (N,), x's dtype or float32, or None.
        update: the low-rank term, or None.
        backend: "auto", or the name of one backend.

    Returns:
        (..., N) in x's dtype, contiguous. Gradients reach x, bias, A and B, once.

    Raises:
        TypeError: a dtype does not fit.
        ValueError: a shape, a device or a name does not fit, or the weight requires a gradient.
        NotImplementedError: no backend takes this problem; the message gives each one's reason.
    """
    data = weight.data
    grads = torch.is_grad_enabled()
    if grads and data.requires_grad:
        raise ValueError(_WEIGHT_GRAD)
    dtype = activation_dtype(x)
    if dtype != x.dtype:
        x = x.to(dtype)
        data = data.to(dtype) if weight.format == "dense" else data
    low = _NO_UPDATE if update is None else update
    inputs = (x, data, *weight[1:], bias, *low, backend)
    if not is_plain(x, data, bias, low[0], low[1]):
        return cast(Tensor, torch.ops.fastlora.lora_linear(*inputs)[0])
    tensors = (x, bias, low[0], low[1])
    if grads and any(tensor is not None and tensor.requires_grad for tensor in tensors):
        return cast(Tensor, _LoraLinear.apply(*inputs))  # type: ignore[no-untyped-call]
    return _forward_op(*inputs)[0]
