"""Linears of the same input: S and dA in one pass over x, dx summed in float32.

Where the backend has no kernel for a group, or the group is none (dropout, spans, adapters of
different dtypes), each linear is computed by itself; outputs are the same bits either way.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from fastlora_kernels.formats import StoredWeight
from fastlora_kernels.low_rank import LowRank
from torch import Tensor

from fastlora.checks import check_forward, wide_dtype
from fastlora.dispatch import choose
from fastlora.ops.library import as_output, is_cast, is_plain, no_autocast, refuse_double
from fastlora.ops.linear import linear

Biases = Sequence[Tensor | None]
Updates = Sequence[LowRank | None]


def linear_group(
    x: Tensor,
    weights: Sequence[StoredWeight],
    biases: Biases,
    updates: Updates,
    backend: str = "auto",
) -> list[Tensor]:
    """Return what `linear` returns for each weight.

    Args:
        x: (..., K), the input of all.
        weights: the stored (N_i, K) weights, frozen.
        biases: (N_i,) or None, one per weight.
        updates: the low-rank term or None, one per weight.
        backend: "auto", or the name of one backend.

    Returns:
        (..., N_i) per weight, in x's dtype. Gradients reach x, biases, A and B, once.

    Raises:
        TypeError: a dtype does not fit.
        ValueError: a shape, a device or a name does not fit, or a weight requires a gradient.
        NotImplementedError: no backend takes one of them; the message gives each one's reason.
    """
    module = _module(x, weights, biases, updates, backend)
    if module is None:
        parts = zip(weights, biases, updates, strict=True)
        return [linear(x, weight, bias, update, backend) for weight, bias, update in parts]
    static = (module, [w[4:] for w in weights], [None if u is None else u.scaling for u in updates])
    tensors: list[Tensor | None] = []
    for weight, bias, update in zip(weights, biases, updates, strict=True):
        low = (None, None) if update is None else (update.A, update.B)
        tensors += [*weight[:4], bias, *low]
    return list(_LinearGroup.apply(static, x, *tensors))  # type: ignore[no-untyped-call]


def _module(
    x: Tensor, weights: Sequence[StoredWeight], biases: Biases, updates: Updates, backend: str
) -> ModuleType | None:
    """Return the backend that computes these as a group, or None."""
    given = [update for update in updates if update is not None]
    tensors = [weight.data for weight in weights] + [update.A for update in given]
    if len(weights) < 2 or is_cast(x, *weights) or not is_plain(x, *biases, *tensors):
        return None
    if any(update.seed is not None or update.spans is not None for update in given):
        return None
    if len({update.A.dtype for update in given}) > 1 or any(w.data.requires_grad for w in weights):
        return None
    modules = set()
    for weight, bias, update in zip(weights, biases, updates, strict=True):
        n, k = check_forward(x, weight, bias, update)
        r, dtype = (0, None) if update is None else (update.A.shape[0], update.A.dtype)
        kind = (x.device.type, x.dtype, weight.format, weight.blocksize, x.numel() // k, n, k, r)
        modules.add(choose("lora_linear", *kind, dtype, backend, weight.compute))
    module = modules.pop()
    return module if not modules and hasattr(module, "lora_group") else None


def _layers(
    static: Any, tensors: Sequence[Any]
) -> tuple[list[StoredWeight], list[Tensor | None], list[LowRank | None]]:
    """Return (weights, biases, updates) from the seven tensors of each layer."""
    _, kinds, scalings = static
    parts = [tensors[i : i + 7] for i in range(0, len(tensors), 7)]
    weights = [StoredWeight(*p[:4], *kind) for p, kind in zip(parts, kinds, strict=True)]
    updates = [
        None if scaling is None else LowRank(p[5], p[6], scaling)
        for p, scaling in zip(parts, scalings, strict=True)
    ]
    return weights, [p[4] for p in parts], updates


class _LinearGroup(torch.autograd.Function):
    """The group, through the backend that has a kernel for it."""

    @staticmethod
    def forward(ctx: Any, static: Any, x: Tensor, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        weights, biases, updates = _layers(static, tensors)
        k = x.shape[-1]
        cast = [None if bias is None else bias.to(x.dtype) for bias in biases]
        with no_autocast(x.device.type):
            ys, ss = static[0].lora_group(x.reshape(-1, k), weights, cast, updates)
        ctx.static, ctx.count, ctx.widths = static, len(ss), [y.shape[1] for y in ys]
        ctx.save_for_backward(x, *ss, *tensors)
        ctx.set_materialize_grads(False)
        return tuple(as_output(y.view(*x.shape[:-1], y.shape[1])) for y in ys)

    @staticmethod
    def backward(ctx: Any, *dys: Tensor | None) -> tuple[Any, ...]:
        if torch.is_grad_enabled():
            refuse_double("linear_group")
        x, *rest = ctx.saved_tensors
        ss, tensors = rest[: ctx.count], rest[ctx.count :]
        weights, biases, updates = _layers(ctx.static, tensors)
        # an output that was not used leaves no gradient: its layer's stay None
        needs = [n and dys[i // 7] is not None for i, n in enumerate(ctx.needs_input_grad[2:])]
        need_dlora = any(needs[i] for i in range(len(needs)) if i % 7 > 4)
        m = x.numel() // x.shape[-1]
        rows = [
            x.new_zeros(m, n) if dy is None else dy.reshape(m, n)
            for dy, n in zip(dys, ctx.widths, strict=True)
        ]
        with no_autocast(x.device.type):
            dx, dAs, dBs = ctx.static[0].lora_group_backward(
                rows, x.reshape(-1, x.shape[-1]), ss, weights, updates,
                ctx.needs_input_grad[1], need_dlora,
            )  # fmt: skip
        grads: list[Tensor | None] = []
        for i, (dy, bias) in enumerate(zip(rows, biases, strict=True)):
            dbias = None
            if bias is not None and needs[7 * i + 4]:
                dbias = dy.sum(0, dtype=wide_dtype(dy.dtype)).to(bias.dtype)
            low = (dAs[i] if needs[7 * i + 5] else None, dBs[i] if needs[7 * i + 6] else None)
            grads += [None, None, None, None, dbias, *low]
        return None, dx.view(x.shape) if ctx.needs_input_grad[1] else None, *grads
