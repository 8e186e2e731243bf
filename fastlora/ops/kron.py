"""LoKr's linear on the CPU: the base, and its update by the vec trick, added in place."""

from __future__ import annotations

from typing import Any, cast

import torch
from fastlora_kernels import native_kron
from fastlora_kernels.formats import StoredWeight
from torch import Tensor

from fastlora.ops.library import as_output, bias_gradient, refuse_double
from fastlora.ops.lora_linear import WEIGHT_GRAD, run_backward, run_forward


class _KronLinear(torch.autograd.Function):
    """Its operands have been checked by the forward when it goes backward."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dropped: Tensor | None,
        bias: Tensor | None,
        w1: Tensor,
        p: Tensor,
        q: Tensor | None,
        weight: StoredWeight,
        backend: str,
    ) -> Tensor:
        y, _ = run_forward(x, weight, bias, None, backend)
        add_kron(y, x if dropped is None else dropped, w1, p, q)
        ctx.save_for_backward(x, dropped, w1, p, q, *weight[:4])
        ctx.rest = weight[4:], None if bias is None else bias.dtype, backend
        return as_output(y)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            refuse_double("kron_linear")
        x, dropped, w1, p, q, *parts = ctx.saved_tensors
        kind, bias_dtype, backend = ctx.rest
        need_x, need_dropped, need_bias, *need_factors = ctx.needs_input_grad[:6]
        dx = None
        if need_x:
            weight, k = StoredWeight(*parts, *kind), x.shape[-1]
            dx, _, _ = run_backward(dy, x, None, weight, None, True, False, backend, k)
        read, add = x, dx
        if dropped is not None:
            read, add = dropped, torch.zeros_like(dropped) if need_dropped else None
        given = [w for w in (w1, p, q) if w is not None]
        sums: list[Tensor] = []
        if add is not None or any(need_factors):
            into = None if add is None else _rows(add)
            sums = native_kron.add_kron_backward(
                _rows(dy), _rows(read), (w1, p, q), into, any(need_factors)
            )
        grads = [g.to(w.dtype) for g, w in zip(sums, given, strict=False)] + [None] * 3
        return (
            dx,
            add if need_dropped else None,
            bias_gradient(dy, bias_dtype) if need_bias else None,
            *grads[:3],
            None,
            None,
        )


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def add_kron(y: Tensor, x: Tensor, w1: Tensor, p: Tensor, q: Tensor | None) -> Tensor:
    """Return y (..., n1 n2), contiguous, to which ``x kron(w1, w2)^T`` was added in place."""
    native_kron.add_kron(y.view(-1, y.shape[-1]), _rows(x), (w1, p, q))
    return y


def kron_linear(
    x: Tensor,
    weight: StoredWeight,
    bias: Tensor | None,
    w1: Tensor,
    p: Tensor,
    q: Tensor | None,
    backend: str = "auto",
    dropped: Tensor | None = None,
) -> Tensor:
    """Return ``x W^T + bias + dropped kron(w1, w2)^T``, w2 being p, or q p.

    Args:
        x: (..., k1 k2) on the CPU, float32, bfloat16 or float16, not under autocast.
        weight: the stored (n1 n2, k1 k2) weight, frozen.
        bias: (n1 n2,), x's dtype or float32, or None.
        w1: (n1, k1), any float.
        p: (n2, k2), or (c, k2) with a q.
        q: (n2, c), or None.
        backend: "auto" or "native".
        dropped: x's dtype and shape, what the update reads in x's place; None: x.

    Returns:
        (..., n1 n2) in x's dtype, contiguous. Gradients reach x, bias, the factors and dropped,
        once.

    Raises:
        TypeError: a dtype does not fit.
        ValueError: a shape or a device does not fit, or the weight requires a gradient.
        NotImplementedError: no backend takes this problem; the message gives each one's reason.

    Source: see `fastlora.kron.kron_product`.
    """
    if torch.is_grad_enabled() and weight.data.requires_grad:
        raise ValueError(WEIGHT_GRAD)
    operands = (x, dropped, bias, w1, p, q, weight, backend)
    return cast(Tensor, _KronLinear.apply(*operands))  # type: ignore[no-untyped-call]
