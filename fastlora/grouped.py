"""Mixtures of experts: rows to their experts and back, and the linear of stacked experts."""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from fastlora_kernels.experts import ExpertsUpdate
from fastlora_kernels.formats import StoredWeight
from torch import Tensor

from fastlora import ops
from fastlora.multi import permuted
from fastlora.ops.library import is_plain
from fastlora.quant_experts import QuantizedExperts


def experts_linear(
    x: Tensor,
    weight: Tensor | QuantizedExperts,
    bias: Tensor | None,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    scaling: float,
    ends: Tensor,
    *,
    backend: str = "auto",
) -> Tensor:
    """Return ``x_e W_e^T + bias_e + scaling (x_e A_e^T) B_e^T`` for the rows x_e of each expert e.

    One call of a C++ kernel on CPUs. On GPUs one launch for all experts; with more than 256 rows
    per expert on average one expert after the other, for which the host waits for `ends`.

    Args:
        x: (M, K), float32, bfloat16 or float16; rows sorted by expert, see `route`.
        weight: frozen: (E, N, K) in x's dtype, or `QuantizedExperts` of that shape.
        bias: (E, N), x's dtype or float32, or None.
        lora_A: (E, r, K), float32 or x's dtype, or None.
        lora_B: (E, N, r), same dtype as lora_A, or None.
        scaling: alpha / r, dimensionless.
        ends: (E,) int64, ascending: the row after each expert's last. Rows after the last expert's
            are of no expert: their output is zero.
        backend: "auto", or the name of one backend.

    Returns:
        (M, N) in x's dtype. Gradients reach x, bias, lora_A and lora_B, once.

    Raises:
        TypeError: a dtype does not fit.
        ValueError: a shape, a device, a name or an end does not fit, or the weight requires a
            gradient.
        NotImplementedError: no backend takes this problem; the message gives each one's reason.
    """
    if isinstance(weight, QuantizedExperts):
        stored = weight.stored()
    else:
        stored = StoredWeight(weight, None, None, None, "dense", 0)
    if (lora_A is None) != (lora_B is None):
        raise TypeError("lora_A and lora_B come together, got only one; pass both or neither")
    _check_ends(ends, x)
    update = None
    if lora_A is not None and lora_B is not None:
        update = ExpertsUpdate(lora_A, lora_B, float(scaling))
    return ops.experts_linear(x, stored, bias, update, ends, backend)


def _check_ends(ends: Tensor, x: Tensor) -> None:
    """Look at the values of `ends` where that is cheap: on a CPU, outside of `torch.compile`."""
    if not is_plain(ends) or ends.device.type != "cpu" or ends.numel() == 0:
        return
    values = [0, *ends.tolist(), x.shape[0]]
    if values != sorted(values):
        raise ValueError(
            f"ends must ascend from 0 to at most the {x.shape[0]} rows of x, got {values[1:-1]}"
        )


class Route(NamedTuple):
    """Which row goes where.

    Attributes:
        order: (M k,) int64: the pairs of row and choice, sorted by expert; `order // k` are rows.
        back: its inverse.
        ends: (E,) int64: the pair after each expert's last.
        choices: k, the experts per row.
    """

    order: Tensor
    back: Tensor
    ends: Tensor
    choices: int


def route(expert_ids: Tensor, count: int) -> Route:
    """Return the order that brings the rows of an expert together, the same every time.

    Args:
        expert_ids: (M, k) integers, the experts of each row; `count` or more: of no expert here.
        count: number of experts.
    """
    flat = expert_ids.reshape(-1).long()
    chosen, order = flat.sort(stable=True)
    numbers = torch.arange(count, device=flat.device)
    return Route(
        order,
        order.argsort(),
        torch.searchsorted(chosen, numbers, right=True),
        expert_ids.shape[1],
    )


class _Dispatched(torch.autograd.Function):
    """Each row at the place of each of its experts; the gradient is a gather and a sum."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor, back: Tensor, choices: int) -> Tensor:
        ctx.save_for_backward(back)
        ctx.choices = choices
        return x.index_select(0, rows)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None, None]:
        (back,) = ctx.saved_tensors
        own = g.index_select(0, back)
        return own.view(-1, ctx.choices, g.shape[1]).sum(1), None, None, None


def dispatch_rows(x: Tensor, to: Route) -> Tensor:
    """Return x (M, K) as (M k, K), sorted by expert."""
    rows = to.order // to.choices
    found = _Dispatched.apply(x, rows, to.back, to.choices)  # type: ignore[no-untyped-call]
    return cast(Tensor, found)


def combine_rows(y: Tensor, to: Route, weights: Tensor) -> Tensor:
    """Return the sum over each row's experts, weighted: y (M k, N), weights (M, k) -> (M, N)."""
    own = permuted(y, to.back, to.order).view(-1, to.choices, y.shape[1])
    return (own * weights.unsqueeze(-1)).sum(1)
