"""The op of the fused linear: a frozen weight, a bias and a low-rank term."""

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
    bias_gradient,
    define,
    differentiate,
    is_plain,
    no_autocast,
)

Grads = tuple[Tensor, Tensor, Tensor]
Needs = tuple[bool, bool, bool, bool]  # of the gradients of x, bias, A and B
_UPDATE = (
    "Tensor? lora_A, Tensor? lora_B, float scaling, float dropout, Tensor? seed, Tensor? spans"
)
NO_UPDATE = (None, None, 0.0, 0.0, None, None)
WEIGHT_GRAD = (
    "the weight of a fastlora linear must be frozen, got one that requires a gradient; call"
    " weight.requires_grad_(False) or train it with torch.nn.functional.linear"
)


def run_forward(
    x: Tensor, weight: StoredWeight, bias: Tensor | None, update: LowRank | None, backend: str
) -> tuple[Tensor, Tensor]:
    """Return (y, s) from the backend that takes the problem; x of any number of dimensions."""
    n, k = check_forward(x, weight, bias, update)
    flat = x.dim() == 2
    rows = x if flat else x.reshape(-1, k)  # (M, K)
    if bias is not None and bias.dtype != x.dtype:
        bias = bias.to(x.dtype)
    run, device = _pick("lora_linear", rows, weight, n, k, update, backend)
    if torch.is_autocast_enabled(device):
        with no_autocast(device):
            y, s = run(rows, weight, bias, update)
    else:
        y, s = run(rows, weight, bias, update)
    return (y if flat else y.view(*x.shape[:-1], n)), s


def run_backward(
    dy: Tensor,
    x: Tensor | None,
    s: Tensor | None,
    weight: StoredWeight,
    update: LowRank | None,
    need_dx: bool,
    need_dlora: bool,
    backend: str,
    k: int,
) -> Grads:
    """Return (dx, dA, dB) from the backend that takes the problem."""
    n, flat = dy.shape[-1], dy.dim() == 2
    rows = dy if flat else dy.reshape(-1, n)  # (M, N)
    if x is not None and x.dim() != 2:
        x = x.reshape(-1, k)
    run, device = _pick("lora_linear_backward", rows, weight, n, k, update, backend)
    with no_autocast(device):
        dx, dA, dB = run(rows, x, s, weight, update, need_dx, need_dlora)
    return (dx if flat or not need_dx else dx.view(*dy.shape[:-1], k)), dA, dB


def _pick(
    op: str,
    rows: Tensor,
    weight: StoredWeight,
    n: int,
    k: int,
    update: LowRank | None,
    backend: str,
) -> tuple[Callable[..., Any], str]:
    """Return the backend's function for an op on x or dy, `rows`, and the device's type."""
    r, dtype = (0, None) if update is None else (update.A.shape[0], update.A.dtype)
    device = "cpu" if rows.is_cpu else rows.device.type
    kind = (device, rows.dtype, weight.format, weight.blocksize, rows.shape[0], n, k, r, dtype)
    return getattr(choose(op, *kind, backend, weight.compute), op), device


def _forward_op(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """Run the op with the arguments of its schema: `rest` starts with the stored weight."""
    return run_forward(x, StoredWeight(*rest[:7]), rest[7], low_rank(*rest[8:14]), rest[14])


def _backward_op(dy: Tensor, x: Tensor | None, s: Tensor | None, *rest: Any) -> Grads:
    """Run the op; what is not needed comes back as separate tensors without elements."""
    weight, update, (need_dx, need_dlora, backend) = _parts(rest)
    _, k = check_backward(dy, x, s, weight, update, need_dlora)
    dx, dA, dB = run_backward(dy, x, s, weight, update, need_dx, need_dlora, backend, k)
    dx = dx if need_dx else dy.new_empty(0)
    return (dx, dA, dB) if need_dlora else (dx, dy.new_empty(0), dy.new_empty(0))


def forward_parts(
    x: Tensor, weight: StoredWeight, bias: Tensor | None, update: LowRank | None, backend: str
) -> tuple[Tensor, Tensor]:
    """Return (y, s) without a gradient, through the dispatcher only where something watches it."""
    low = NO_UPDATE if update is None else update
    if is_plain(x, weight.data, bias, low[0], low[1]):
        return run_forward(x, weight, bias, update, backend)
    y, s = torch.ops.fastlora.lora_linear(x, *weight, bias, *low, backend)
    return y, s


def backward_parts(
    dy: Tensor,
    x: Tensor | None,
    s: Tensor | None,
    weight: StoredWeight,
    update: LowRank | None,
    need_dx: bool,
    need_dlora: bool,
    backend: str,
    k: int,
) -> Grads:
    """Return (dx, dA, dB) of `forward_parts`, through the dispatcher only where it is watched."""
    call = run_backward if is_plain(dy, x, weight.data) else _call_backward_op
    return call(dy, x, s, weight, update, need_dx, need_dlora, backend, k)


def _parts(rest: tuple[Any, ...]) -> tuple[StoredWeight, LowRank | None, tuple[Any, ...]]:
    """Return the weight, the update and what follows them in the schema of the backward."""
    return StoredWeight(*rest[:7]), low_rank(*rest[7:13]), rest[13:]


def _forward_fake(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    check_backend(rest[14])
    update = low_rank(*rest[8:14])
    n, _ = check_forward(x, StoredWeight(*rest[:7]), rest[7], update)
    shape = (0,) if update is None else (math.prod(x.shape[:-1]), update.A.shape[0])
    return x.new_empty((*x.shape[:-1], n)), x.new_empty(shape, dtype=wide_dtype(x.dtype))


def _backward_fake(dy: Tensor, x: Tensor | None, s: Tensor | None, *rest: Any) -> Grads:
    weight, update, (need_dx, need_dlora, backend) = _parts(rest)
    check_backend(backend)
    _, k = check_backward(dy, x, s, weight, update, need_dlora)
    dx = dy.new_empty((*dy.shape[:-1], k) if need_dx else (0,))
    if not need_dlora or update is None:
        return dx, dy.new_empty(0), dy.new_empty(0)
    return dx, update.A.new_empty(update.A.shape), update.B.new_empty(update.B.shape)


def remember(
    ctx: Any,
    x: Tensor,
    s: Tensor,
    weight: StoredWeight,
    bias: Tensor | None,
    update: LowRank | None,
    needs: Needs,
) -> None:
    """Save what the backward needs: x and s only when the adapter wants its gradient."""
    A, B, scaling, dropout, seed, spans = NO_UPDATE if update is None else update
    need_dlora = needs[2] or needs[3]
    keep_x = x if need_dlora or weight.is_flat(x.shape[-1]) else None  # which knows K
    ctx.save_for_backward(keep_x, s if need_dlora else None, *weight[:4], A, B, seed, spans)
    ctx.rest = weight[4:], (scaling, dropout), needs, x.shape[-1]
    ctx.bias_dtype = None if bias is None else bias.dtype


def gradients(ctx: Any, dy: Tensor, call: Callable[..., Grads]) -> tuple[Tensor | None, ...]:
    """Return (dx, dbias, dA, dB), where needed, through `call`, the op or its implementation."""
    x, s, data, absmax, nested, offset, A, B, seed, spans = ctx.saved_tensors
    kind, (scaling, dropout), (need_dx, need_dbias, need_dA, need_dB), k = ctx.rest
    dx = dA = dB = dbias = None
    need_dlora = need_dA or need_dB
    if need_dx or need_dlora:
        weight = StoredWeight(data, absmax, nested, offset, *kind)
        update = None if A is None else LowRank(A, B, scaling, dropout, seed, spans)
        dx, dA, dB = call(dy, x, s, weight, update, need_dx, need_dlora, ctx.backend, k)
    if need_dbias:
        dbias = bias_gradient(dy, ctx.bias_dtype)
    return dx if need_dx else None, dbias, dA if need_dA else None, dB if need_dB else None


def _remember_op(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    needs = ctx.needs_input_grad
    if needs[1]:
        raise ValueError(WEIGHT_GRAD)
    weight, update = StoredWeight(*inputs[1:8]), low_rank(*inputs[9:15])
    wanted = (needs[0], needs[8], needs[9], needs[10])
    remember(ctx, inputs[0], output[1], weight, inputs[8], update, wanted)
    ctx.backend = inputs[15]
    ctx.mark_non_differentiable(output[1])


def _call_backward_op(
    dy: Tensor,
    x: Tensor | None,
    s: Tensor | None,
    weight: StoredWeight,
    update: LowRank | None,
    *rest: Any,
) -> Grads:
    flat = (*weight, *(NO_UPDATE if update is None else update))
    return cast(Grads, torch.ops.fastlora.lora_linear_backward(dy, x, s, *flat, *rest[:3]))


def _gradients_op(ctx: Any, dy: Tensor, ds: Tensor) -> tuple[Tensor | None, ...]:
    dx, dbias, dA, dB = gradients(ctx, dy, _call_backward_op)
    return dx, *(None,) * 7, dbias, dA, dB, *(None,) * 5


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
