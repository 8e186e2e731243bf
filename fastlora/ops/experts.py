"""The op of stacked experts: each one's rows with its own weight, bias and low-rank term."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from fastlora_kernels.experts import ExpertsUpdate, segments
from fastlora_kernels.formats import StoredWeight
from torch import Tensor

from fastlora.checks import wide_dtype
from fastlora.dispatch import check_backend, choose
from fastlora.expert_checks import check_experts
from fastlora.ops.library import WEIGHT, as_multiplied, define, differentiate, no_autocast
from fastlora.ops.lora_linear import WEIGHT_GRAD

Grads = tuple[Tensor, Tensor, Tensor, Tensor]
_UPDATE = "Tensor? lora_A, Tensor? lora_B, float scaling, Tensor ends"


def experts_linear(
    x: Tensor,
    weight: StoredWeight,
    bias: Tensor | None,
    update: ExpertsUpdate | None,
    ends: Tensor,
    backend: str = "auto",
) -> Tensor:
    """Return ``x_e W_e^T + bias_e + scaling (x_e A_e^T) B_e^T`` for the rows x_e of each expert e.

    Under autocast, x and dense weights are cast to the autocast dtype, as in `ops.linear`.

    Args:
        x: (M, K), rows sorted by expert.
        weight: the stacked weights, frozen: data (E, N, K) or (E, ceil(N K / 2)).
        bias: (E, N), x's dtype or float32, or None.
        update: the low-rank terms, or None.
        ends: (E,) int64, ascending: the row after each expert's last. Rows after the last expert's
            are of no expert: their output is zero.
        backend: "auto", or the name of one backend.

    Returns:
        (M, N) in x's dtype. Gradients reach x, bias, A and B, once.

    Raises:
        TypeError: a dtype does not fit.
        ValueError: a shape, a device or a name does not fit, or the weight requires a gradient.
        NotImplementedError: no backend takes this problem; the message gives each one's reason.
    """
    if torch.is_grad_enabled() and weight.data.requires_grad:
        raise ValueError(WEIGHT_GRAD)
    x, weight = as_multiplied(x, weight)
    low = (None, None, 0.0) if update is None else tuple(update)
    flat = torch.ops.fastlora.experts_linear(x, *weight, bias, *low, ends, backend)
    return cast(Tensor, flat[0])


def _update(A: Tensor | None, B: Tensor | None, scaling: float) -> ExpertsUpdate | None:
    if A is None and B is None:
        return None
    if A is None or B is None:
        raise TypeError("lora_A and lora_B come together, got only one; pass both or neither")
    return ExpertsUpdate(A, B, scaling)


def _pick(
    op: str, rows: Tensor, weight: StoredWeight, n: int, k: int, update: Any, backend: str
) -> Callable[..., Any]:
    """Return the backend's function for an op on x or dy, `rows`."""
    r, dtype = (0, None) if update is None else (update.A.shape[1], update.A.dtype)
    kind = (rows.device.type, rows.dtype, weight.format, weight.blocksize, rows.shape[0], n, k, r)
    return cast(Callable[..., Any], getattr(choose(op, *kind, dtype, backend, weight.compute), op))


def _forward(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """Run the op with the arguments of its schema: `rest` starts with the stored weight."""
    weight, bias, (ends, backend) = StoredWeight(*rest[:7]), rest[7], rest[11:]
    update = _update(*rest[8:11])
    _, n, k = check_experts("x", x, weight, bias, update, ends)
    run = _pick("experts_linear", x, weight, n, k, update, backend)
    bias = None if bias is None else bias.to(x.dtype)
    with no_autocast(x.device.type):
        y, s = run(x, weight, n, bias, update, ends)
    return y, s


def _forward_fake(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    weight, update = StoredWeight(*rest[:7]), _update(*rest[8:11])
    check_backend(rest[12])
    _, n, _ = check_experts("x", x, weight, rest[7], update, rest[11])
    shape = (0,) if update is None else (x.shape[0], update.A.shape[1])
    return x.new_empty(x.shape[0], n), x.new_empty(shape, dtype=wide_dtype(x.dtype))


def _backward(dy: Tensor, x: Tensor | None, s: Tensor | None, *rest: Any) -> Grads:
    """Run the op; what is not needed comes back as separate tensors without elements."""
    weight, update = StoredWeight(*rest[:7]), _update(*rest[7:10])
    ends, need_dx, need_dlora, need_dbias, backend = rest[10:]
    count, n, k = check_experts("dy", dy, weight, None, update, ends)
    run = _pick("experts_linear_backward", dy, weight, n, k, update, backend)
    dx, dA, dB = dy.new_empty(0), dy.new_empty(0), dy.new_empty(0)
    if need_dx or need_dlora:
        with no_autocast(dy.device.type):
            dx, dA, dB = run(dy, x, s, weight, k, update, ends, need_dx, need_dlora)
    dbias = dy.new_zeros((count, n) if need_dbias else (0,), dtype=wide_dtype(dy.dtype))
    for index, rows in segments(ends) if need_dbias else ():
        dbias[index] = dy[rows].sum(0, dtype=dbias.dtype)
    return dx, dA, dB, dbias


def _backward_fake(dy: Tensor, x: Tensor | None, s: Tensor | None, *rest: Any) -> Grads:
    weight, update = StoredWeight(*rest[:7]), _update(*rest[7:10])
    ends, need_dx, need_dlora, need_dbias, backend = rest[10:]
    check_backend(backend)
    count, n, k = check_experts("dy", dy, weight, None, update, ends)
    dx = dy.new_empty((dy.shape[0], k) if need_dx else (0,))
    dbias = dy.new_empty((count, n) if need_dbias else (0,), dtype=wide_dtype(dy.dtype))
    if not need_dlora or update is None:
        return dx, dy.new_empty(0), dy.new_empty(0), dbias
    return dx, torch.empty_like(update.A), torch.empty_like(update.B), dbias


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    needs = ctx.needs_input_grad
    if needs[1]:
        raise ValueError(WEIGHT_GRAD)
    x, weight, bias = inputs[0], inputs[1:8], inputs[8]
    A, B, scaling, ends, backend = inputs[9:]
    need_dlora = needs[9] or needs[10]
    kept = (x, output[1]) if need_dlora else (None, None)
    ctx.save_for_backward(*kept, *weight[:4], A, B, ends)
    ctx.rest = weight[4:], scaling, backend, (needs[0], need_dlora, needs[8])
    ctx.wanted = needs[9], needs[10]
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.mark_non_differentiable(output[1])


def _gradients(ctx: Any, dy: Tensor, ds: Tensor) -> tuple[Tensor | None, ...]:
    x, s, *weight, A, B, ends = ctx.saved_tensors
    kind, scaling, backend, needs = ctx.rest
    dx, dA, dB, dbias = torch.ops.fastlora.experts_linear_backward(
        dy.contiguous(), x, s, *weight, *kind, A, B, scaling, ends, *needs, backend
    )
    need_dA, need_dB = ctx.wanted
    dbias = dbias.to(ctx.bias_dtype) if needs[2] else None
    low = (dA if need_dA else None, dB if need_dB else None)
    return dx if needs[0] else None, *[None] * 7, dbias, *low, None, None, None


define(
    "experts_linear",
    f"(Tensor x, {WEIGHT}, Tensor? bias, {_UPDATE}, str backend) -> (Tensor y, Tensor s)",
    _forward,
    _forward_fake,
)
define(
    "experts_linear_backward",
    f"(Tensor dy, Tensor? x, Tensor? s, {WEIGHT}, {_UPDATE}, bool need_dx, bool need_dlora,"
    " bool need_dbias, str backend) -> (Tensor dx, Tensor dA, Tensor dB, Tensor dbias)",
    _backward,
    _backward_fake,
)
differentiate("experts_linear", _gradients, _remember)
