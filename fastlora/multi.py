"""Many adapters in one update: side by side along the rank, each row of x with its own part."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import accumulate
from typing import Any, cast

import torch
from fastlora_kernels.low_rank import LowRank
from torch import Tensor

from fastlora.checks import wide_dtype
from fastlora.ops.library import is_plain

BLOCK = 64  # rows of one adapter that a kernel takes together


def stack_adapters(
    lora_A: Sequence[Tensor], lora_B: Sequence[Tensor], scaling: Sequence[float]
) -> LowRank:
    """Return several adapters as one update, side by side along the rank.

    Args:
        lora_A: (r_i, K) each, of one dtype.
        lora_B: (N, r_i) each.
        scaling: one factor each.

    Returns:
        The update; where the factors differ they are folded into B, which is float32 then.
    """
    A = torch.cat(tuple(lora_A), 0)  # (R, K)
    B = torch.cat(tuple(lora_B), 1)  # (N, R)
    if all(factor == scaling[0] for factor in scaling):
        return LowRank(A, B, float(scaling[0]))
    wide = wide_dtype(B.dtype)
    ranks = tuple(a.shape[0] for a in lora_A)
    factors = _constant(_per_rank, (tuple(map(float, scaling)), ranks), B.device, wide)
    return LowRank(A.to(wide), B.to(wide) * factors, 1.0)


def spans_of(ranks: Sequence[int], ids: Tensor, each: int = 1) -> Tensor:
    """Return the ranks that each row has in the update of `stack_adapters`.

    Args:
        ranks: the rank of each adapter.
        ids: (blocks,) integers, the adapter of each block of rows; -1: none.
        each: rows per block.

    Returns:
        (blocks * each, 2) int32.
    """
    table = _constant(_edges, (tuple(ranks),), ids.device, torch.int32)
    spans = table.index_select(0, ids + 1)
    return spans if each == 1 else spans.unsqueeze(1).expand(-1, each, -1).reshape(-1, 2)


def grouping(ids: Tensor, each: int, count: int) -> Tensor | None:
    """Return an order of blocks of rows in which those of an adapter are neighbours.

    None where kernels would gain little: in blocks of `BLOCK` rows, in a batch of few rows on a
    GPU, and, where it can be seen without waiting for a device, in groups as they are.

    Args:
        ids: (blocks,) integers, the adapter of each block.
        each: rows per block.
        count: number of adapters.

    Returns:
        (blocks,) int64, or None.
    """
    blocks = ids.shape[0]
    if each >= BLOCK or each == 0 or blocks < 2:
        return None
    if ids.device.type != "cpu":
        return ids.argsort(stable=True) if blocks * each > BLOCK else None
    if is_plain(ids) and int((ids[1:] != ids[:-1]).sum()) <= count:
        return None
    return ids.argsort(stable=True)


class _Permuted(torch.autograd.Function):
    """Blocks in another order; the gradient is a gather too, of the same bits every time."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(back)
        return x.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        (back,) = ctx.saved_tensors
        return g.index_select(0, back), None, None


def permuted(x: Tensor, order: Tensor, back: Tensor) -> Tensor:
    """Return the blocks ``x[order]``; `back` is the inverse of `order`."""
    return cast(Tensor, _Permuted.apply(x, order, back))  # type: ignore[no-untyped-call]


def _per_rank(scaling: tuple[float, ...], ranks: tuple[int, ...]) -> list[float]:
    return [factor for factor, r in zip(scaling, ranks, strict=True) for _ in range(r)]


def _edges(ranks: tuple[int, ...]) -> list[tuple[int, int]]:
    """Return first and last rank of "no adapter", which has none, and of each adapter."""
    ends = list(accumulate(ranks))
    return [(0, 0), *((end - r, end) for r, end in zip(ranks, ends, strict=True))]


def _constant(
    make: Callable[..., Any], given: tuple[Any, ...], device: torch.device, dtype: torch.dtype
) -> Tensor:
    """Return ``torch.tensor(make(*given))``, kept between calls unless a graph is being traced."""
    if is_plain():
        return _kept(make, given, device, dtype)
    return torch.tensor(make(*given), device=device, dtype=dtype)


@lru_cache(maxsize=256)
def _kept(
    make: Callable[..., Any], given: tuple[Any, ...], device: torch.device, dtype: torch.dtype
) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(make(*given), device=device, dtype=dtype)
