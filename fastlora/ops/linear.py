"""The fused linear as a function, with its gradient."""

from __future__ import annotations

from typing import Any, cast

import torch
from fastlora_kernels.formats import StoredWeight
from fastlora_kernels.low_rank import LowRank
from torch import Tensor

from fastlora.ops.library import as_multiplied, as_output, is_plain, refuse_double
from fastlora.ops.lora_linear import (
    NO_UPDATE,
    WEIGHT_GRAD,
    gradients,
    remember,
    run_backward,
    run_forward,
)


class _LoraLinear(torch.autograd.Function):
    """The op without the dispatcher; its operands have been checked when it goes backward."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias: Tensor | None,
        A: Tensor | None,
        B: Tensor | None,
        weight: StoredWeight,
        update: LowRank | None,
        backend: str,
    ) -> Tensor:
        y, s = run_forward(x, weight, bias, update, backend)
        remember(ctx, x, s, weight, bias, update, ctx.needs_input_grad[:4])
        ctx.backend = backend
        return as_output(y)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            refuse_double("lora_linear")
        return *gradients(ctx, dy, run_backward), None, None, None


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
        raise ValueError(WEIGHT_GRAD)
    x, weight = as_multiplied(x, weight)
    low = NO_UPDATE if update is None else update
    A, B = low[0], low[1]
    if not is_plain(x, data, bias, A, B):
        flat = torch.ops.fastlora.lora_linear(x, *weight, bias, *low, backend)
        return cast(Tensor, flat[0])
    if grads and (
        x.requires_grad
        or (A is not None and B is not None and (A.requires_grad or B.requires_grad))
        or (bias is not None and bias.requires_grad)
    ):
        result = _LoraLinear.apply(x, bias, A, B, weight, update, backend)  # type: ignore[no-untyped-call]
        return cast(Tensor, result)
    return run_forward(x, weight, bias, update, backend)[0]
