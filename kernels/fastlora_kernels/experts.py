"""Stacked experts: their weights, their low-rank terms, and a loop over them.

The loop is for backends without a kernel that takes all experts at once.
Rows of x are sorted by expert; `ends` (E,) int64 holds the row after the last one of each expert.
Rows after the last expert's belong to none: their outputs and gradients are zero.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fastlora_kernels.formats import StoredWeight
from fastlora_kernels.low_rank import LowRank

Forward = Callable[..., tuple[Tensor, Tensor]]
Backward = Callable[..., tuple[Tensor, Tensor, Tensor]]


class ExpertsUpdate(NamedTuple):
    """``scaling B_e A_e`` for each expert e.

    Attributes:
        A: (E, r, K), float32 or x's dtype.
        B: (E, N, r), the same dtype.
        scaling: alpha / r.
    """

    A: Tensor
    B: Tensor
    scaling: float


def expert_weight(weight: StoredWeight, index: int, k: int) -> StoredWeight:
    """One expert's weight, sharing memory.

    Args:
        weight: stacked: data (E, N, K) dense or (E, ceil(N K / 2)) packed, absmax (E, blocks),
            nested_absmax (E, groups), nested_offset (E,).
        index: which expert.
        k: columns.
    """
    data, absmax, nested, offset = weight[:4]
    if absmax is None:
        return weight._replace(data=data[index])
    own = data[index]
    return StoredWeight(
        own.view(-1, k // 2) if k % 2 == 0 else own.view(-1, 1),
        absmax[index],
        None if nested is None else nested[index],
        None if offset is None else offset[index],
        weight.format,
        weight.blocksize,
    )


def expert_update(update: ExpertsUpdate | None, index: int) -> LowRank | None:
    """One expert's low-rank term, sharing memory."""
    return None if update is None else LowRank(update.A[index], update.B[index], update.scaling)


def segments(ends: Tensor) -> Iterator[tuple[int, slice]]:
    """Each expert that has rows, and its rows; reads `ends` on the host."""
    start = 0
    for index, end in enumerate(ends.tolist()):
        if end > start:
            yield index, slice(start, end)
        start = end


def one_by_one(
    run: Forward,
    x: Tensor,
    weight: StoredWeight,
    n: int,
    bias: Tensor | None,
    update: ExpertsUpdate | None,
    ends: Tensor,
) -> tuple[Tensor, Tensor]:
    """The forward pass, one call of `run` per expert that has rows.

    Args:
        run: a backend's `lora_linear`.
        x: (M, K).
        weight: the stacked weights.
        n: rows of each weight.
        bias: (E, N) in x's dtype, or None.
        update: the low-rank terms, or None.
        ends: (E,).

    Returns:
        y (M, N) in x's dtype; s (M, r) float32 or wider, or (0,) without an update.
    """
    m, k = x.shape
    wide = torch.promote_types(x.dtype, torch.float32)
    y = x.new_zeros(m, n)
    s = x.new_zeros((m, update.A.shape[1]) if update else (0,), dtype=wide)
    for index, rows in segments(ends):
        own = None if bias is None else bias[index]
        low = expert_update(update, index)
        y[rows], part = run(x[rows], expert_weight(weight, index, k), own, low)
        if update is not None:
            s[rows] = part
    return y, s


def one_by_one_backward(
    run: Backward,
    dy: Tensor,
    x: Tensor | None,
    s: Tensor | None,
    weight: StoredWeight,
    k: int,
    update: ExpertsUpdate | None,
    ends: Tensor,
    need_dx: bool,
    need_dlora: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The backward pass, one call of `run` per expert that has rows.

    Args:
        run: a backend's `lora_linear_backward`.
        dy: (M, N).
        x: (M, K) and s: (M, r) of the forward pass, for `need_dlora`.
        s: see x.
        weight: the stacked weights.
        k: columns of each weight.
        update: the low-rank terms, or None.
        ends: (E,).
        need_dx: compute dx.
        need_dlora: compute dA and dB.

    Returns:
        dx (M, K) in dy's dtype, dA (E, r, K) and dB (E, N, r) in the update's dtype; without
        elements where not needed.
    """
    dx = dy.new_zeros((dy.shape[0], k) if need_dx else (0,))
    given = update if need_dlora else None
    dA = dy.new_empty(0) if given is None else torch.zeros_like(given.A)
    dB = dy.new_empty(0) if given is None else torch.zeros_like(given.B)
    for index, rows in segments(ends):
        own_x = dy.new_empty(len(range(*rows.indices(dy.shape[0]))), k) if x is None else x[rows]
        own_s = None if s is None else s[rows]
        own, low = expert_weight(weight, index, k), expert_update(update, index)
        parts = run(dy[rows], own_x, own_s, own, low, need_dx, need_dlora)
        if need_dx:
            dx[rows] = parts[0]
        if given is not None:
            dA[index], dB[index] = parts[1:]
    return dx, dA, dB


__all__ = [
    "ExpertsUpdate",
    "expert_update",
    "expert_weight",
    "one_by_one",
    "one_by_one_backward",
    "segments",
]
