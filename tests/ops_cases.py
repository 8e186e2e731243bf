"""Operands, and the unfused torch path of every op, for the tests of the ops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from fastlora_kernels.formats import StoredWeight, dequantize
from fastlora_kernels.low_rank import LowRank, keep_mask, keep_scale, span_mask
from torch import Tensor
from torch.nn import functional

import fastlora
from fastlora import QuantizedWeight
from tests import contract

FORMATS = ["dense", "nf4", "fp4"]
DTYPES = [torch.float32, torch.bfloat16]
Forward = Callable[..., Tensor]


class Case(NamedTuple):
    x: Tensor
    weight: StoredWeight
    bias: Tensor
    lora_A: Tensor
    lora_B: Tensor
    dy: Tensor

    def dense(self) -> Tensor:
        """Return the weight (N, K) in x's dtype."""
        n, k = self.lora_B.shape[0], self.lora_A.shape[1]
        return dequantize(self.weight, n, k, self.x.dtype)


def make(
    m: int, n: int, k: int, r: int, dtype: torch.dtype, format: str, double: bool = True
) -> Case:
    g = torch.Generator().manual_seed(m * 7 + n * 5 + k * 3 + r)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    dense = (normal(n, k) * 0.1).to(dtype)
    weight = StoredWeight(dense, None, None, None, "dense", 0)
    if format != "dense":
        weight = fastlora.quantize_4bit(dense, format, 64, double).stored()
    x, bias, dy = normal(m, k).to(dtype), normal(n).to(dtype), normal(m, n).to(dtype)
    return Case(x, weight, bias, normal(r, k) * 0.1, normal(n, r) * 0.1, dy)


def public_weight(format: str, dense: Tensor) -> tuple[Tensor | QuantizedWeight, Tensor]:
    """Return a weight as the public functions take it, and its values."""
    if format == "dense":
        return dense, dense
    packed = fastlora.quantize_4bit(dense, format)
    return packed, packed.dequantize()


def with_gradients(forward: Forward, *inputs: Tensor) -> tuple[Tensor, ...]:
    """Return y and the gradient of every input but the last, which is dy."""
    *parts, dy = inputs
    leaves = [t.detach().requires_grad_() for t in parts]
    y = forward(*leaves)
    return (y.detach(), *torch.autograd.grad(y, leaves, dy))


def differentiated(forward: Forward) -> contract.Op:
    return lambda *inputs: with_gradients(forward, *inputs)


def gradients(run: Forward, *inputs: Tensor) -> list[Tensor]:
    """Return y and the gradient of every input, of the sum of squares."""
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    y = run(*leaves)
    y.float().square().sum().backward()
    return [y.detach(), *(t.grad for t in leaves if t.grad is not None)]


def unfused(
    x: Tensor, dense: Tensor, bias: Tensor | None, update: Tensor | None, scale: Any = 1.0
) -> Tensor:
    """Return ``(x W^T + update) * scale + bias`` as plain torch computes it, term by term."""
    y = functional.linear(x, dense.to(x.dtype))
    if update is not None:
        y = y + update
    y = y * scale
    total: Tensor = y if bias is None else y + bias
    return total.to(x.dtype)


def low_rank_update(x: Tensor, update: LowRank) -> Tensor:
    """Return ``scaling mask_spans(drop(x) A^T) B^T`` in plain torch."""
    A, B, scaling, dropout, seed, spans = update
    x = x.to(A.dtype)
    if seed is not None:
        x = x * keep_mask(seed, x.shape[0], x.shape[1], dropout) * keep_scale(dropout)
    s = functional.linear(x, A)
    if spans is not None:
        s = s * span_mask(spans, A.shape[0])
    return functional.linear(s, B) * scaling


def dense_update(x: Tensor, delta: Tensor, scaling: float) -> Tensor:
    """Return ``x (scaling delta)^T`` as PEFT computes it."""
    return functional.linear(x.to(delta.dtype), delta * scaling)


def some_spans(m: int, r: int) -> Tensor:
    """Return ranges of ranks of every kind: empty, whole, at either end, in any order."""
    edges = torch.randint(0, r + 1, (m, 2)).sort(dim=1).values.int()
    edges[::5] = torch.tensor([0, r])
    edges[1::7] = torch.tensor([r, r])
    edges[2::7] = torch.tensor([0, 0])
    return edges
