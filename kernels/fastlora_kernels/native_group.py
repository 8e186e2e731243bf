"""The C++ CPU kernels for layers that are fed the same x: one pass over x for all of them."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from fastlora_kernels.formats import StoredWeight
from fastlora_kernels.low_rank import LowRank
from fastlora_kernels.native_library import DTYPES, Lora, Weight, library
from fastlora_kernels.native_views import by_rows, check, contiguous, describe, low_rank, pointer


def _pointers(tensors: Sequence[Tensor | None]) -> ctypes.Array[ctypes.c_void_p]:
    return (ctypes.c_void_p * len(tensors))(*[pointer(tensor) for tensor in tensors])


class _Layers:
    """The C view of the weights and updates of a group; keeps their tensors alive."""

    def __init__(
        self,
        weights: Sequence[StoredWeight],
        updates: Sequence[LowRank | None],
        k: int,
        n: list[int],
    ) -> None:
        self.stored = [contiguous(weight) for weight in weights]
        views = [low_rank(update) for update in updates]
        self.updates = [alive for _, alive in views]
        self.ranks = [0 if alive is None else alive.A.shape[0] for alive in self.updates]
        self.weight = (Weight * len(n))(
            *[describe(weight, rows, k) for weight, rows in zip(self.stored, n, strict=True)]
        )
        self.lora = (Lora * len(n))(*[view for view, _ in views])


def lora_group(
    x: Tensor,
    weights: Sequence[StoredWeight],
    n: list[int],
    biases: Sequence[Tensor | None],
    updates: Sequence[LowRank | None],
) -> tuple[list[Tensor], list[Tensor]]:
    """What `native.lora_linear` gives for each layer, with S computed in one pass over x.

    Args:
        x: (M, K) float32, bfloat16 or float16.
        weights: (N_i, K): 4-bit, or dense in x's dtype.
        n: rows of each weight.
        biases: (N_i,) any float, or None.
        updates: low-rank terms of one dtype, without dropout and spans, or None.

    Returns:
        y (M, N_i) in x's dtype and s (M, R_i) float32, or (0,) without an update, per layer.
    """
    x = by_rows(x)
    m, k = x.shape
    layers = _Layers(weights, updates, k, n)
    wide = [None if bias is None else bias.to(torch.float32).contiguous() for bias in biases]
    ys = [x.new_empty(m, rows) for rows in n]
    ss = [x.new_empty((m, r) if r else (0,), dtype=torch.float32) for r in layers.ranks]
    status = library().fastlora_lora_group(
        DTYPES[x.dtype],
        m,
        x.data_ptr(),
        x.stride(0),
        len(n),
        layers.weight,
        _pointers(wide),
        layers.lora,
        _pointers(ss),
        _pointers(ys),
        torch.get_num_threads(),
    )
    check(status, "fastlora_lora_group")
    return ys, ss


def lora_group_backward(
    dys: Sequence[Tensor],
    x: Tensor,
    ss: Sequence[Tensor],
    weights: Sequence[StoredWeight],
    n: list[int],
    updates: Sequence[LowRank | None],
    need_dx: bool,
    need_dlora: bool,
) -> tuple[Tensor, list[Tensor | None], list[Tensor | None]]:
    """Gradients of `lora_group`: dx is summed over the layers in float32 and rounded once.

    Args:
        dys: (M, N_i), x's dtype.
        x: (M, K) of the forward pass.
        ss: (M, R_i) of the forward pass.
        weights: as in the forward pass.
        n: rows of each weight.
        updates: as in the forward pass.
        need_dx: compute dx.
        need_dlora: compute dA and dB.

    Returns:
        dx (M, K), without elements when not needed; per layer dA (R_i, K) and dB (N_i, R_i), or
        None.
    """
    x, rows = by_rows(x), [by_rows(dy) for dy in dys]
    m, k = x.shape
    layers = _Layers(weights, updates, k, n)
    kept = [s.contiguous() for s in ss]
    dx = x.new_empty((m, k) if need_dx else (0,))
    given = [update for update in layers.updates if update is not None and need_dlora]
    da = given[0].A.new_empty(sum(layers.ranks), k) if given else None
    dbs = [
        update.B.new_empty(update.B.shape) if update and given else None
        for update in layers.updates
    ]
    status = library().fastlora_lora_group_backward(
        DTYPES[x.dtype],
        m,
        len(n),
        _pointers(rows),
        (ctypes.c_int64 * len(n))(*[dy.stride(0) for dy in rows]),
        x.data_ptr(),
        x.stride(0),
        _pointers(kept),
        layers.weight,
        layers.lora,
        dx.data_ptr() if need_dx else None,
        pointer(da),
        _pointers(dbs),
        torch.get_num_threads(),
    )
    check(status, "fastlora_lora_group_backward")
    if da is None:
        return dx, [None] * len(n), [None] * len(n)
    parts = torch.split(da, layers.ranks)
    return dx, [part if part.shape[0] else None for part in parts], dbs
