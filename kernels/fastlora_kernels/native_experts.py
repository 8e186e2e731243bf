"""The C++ CPU kernels for mixtures of experts: one call for all experts of a layer."""

from __future__ import annotations

import torch
from torch import Tensor

from fastlora_kernels.experts import ExpertsUpdate
from fastlora_kernels.formats import StoredWeight
from fastlora_kernels.low_rank import LowRank
from fastlora_kernels.native_library import DTYPES, Lora, library
from fastlora_kernels.native_views import by_rows, check, contiguous, describe, low_rank, pointer


def _updates(update: ExpertsUpdate | None) -> tuple[Lora, ExpertsUpdate | None]:
    """The C view of the first expert's update, and the stacked factors, which must outlive it."""
    if update is None:
        return low_rank(None)[0], None
    A, B = update.A.contiguous(), update.B.contiguous()
    view, _ = low_rank(LowRank(A[0], B[0], update.scaling))
    return view, ExpertsUpdate(A, B, update.scaling)


def experts_linear(
    x: Tensor,
    weight: StoredWeight,
    n: int,
    bias: Tensor | None,
    update: ExpertsUpdate | None,
    ends: Tensor,
) -> tuple[Tensor, Tensor]:
    """What `native.lora_linear` gives for each expert's rows.

    Args:
        x: (M, K) float32, bfloat16 or float16, rows sorted by expert.
        weight: the stacked weights, 4-bit or dense in x's dtype; see `experts.expert_weight`.
        n: rows of each weight.
        bias: (E, N) any float, or None.
        update: the low-rank terms, float32 or in x's dtype, or None.
        ends: (E,) int64.

    Returns:
        y (M, N) in x's dtype; s (M, r) float32, or (0,) without an update.
    """
    x, weight, ends = by_rows(x), contiguous(weight), ends.contiguous()
    m, k = x.shape
    bias = None if bias is None else bias.to(torch.float32).contiguous()
    lora, alive = _updates(update)
    y = x.new_empty(m, n)
    s = x.new_empty((m, lora.r) if alive is not None else (0,), dtype=torch.float32)
    status = library().fastlora_lora_experts(
        DTYPES[x.dtype],
        m,
        x.data_ptr(),
        x.stride(0),
        ends.numel(),
        ends.data_ptr(),
        describe(weight, n, k),
        pointer(bias),
        lora,
        s.data_ptr(),
        y.data_ptr(),
        torch.get_num_threads(),
    )
    check(status, "fastlora_lora_experts")
    return y, s


def experts_linear_backward(
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
    """Gradients of `experts_linear` for the output gradient dy (M, N).

    Args:
        dy: (M, N) float32, bfloat16 or float16.
        x: (M, K) and s: (M, r) of the forward pass, for `need_dlora`.
        s: see x.
        weight: as in the forward pass.
        k: columns of each weight.
        update: as in the forward pass.
        ends: as in the forward pass.
        need_dx: compute dx.
        need_dlora: compute dA and dB.

    Returns:
        dx (M, K) in dy's dtype, dA (E, r, K) and dB (E, N, r) in the update's dtype; without
        elements where not needed.
    """
    dy, weight, ends = by_rows(dy), contiguous(weight), ends.contiguous()
    m, n = dy.shape
    x = None if x is None or not need_dlora else by_rows(x)
    s = None if s is None else s.contiguous()
    lora, alive = _updates(update)
    dx = dy.new_empty((m, k) if need_dx else (0,))
    if need_dlora and alive is not None:
        da, db = torch.empty_like(alive.A), torch.empty_like(alive.B)
    else:
        da, db, need_dlora = dy.new_empty(0), dy.new_empty(0), False
    status = library().fastlora_lora_experts_backward(
        DTYPES[dy.dtype],
        m,
        dy.data_ptr(),
        dy.stride(0),
        pointer(x),
        0 if x is None else x.stride(0),
        pointer(s),
        ends.numel(),
        ends.data_ptr(),
        describe(weight, n, k),
        lora,
        dx.data_ptr() if need_dx else None,
        da.data_ptr() if need_dlora else None,
        db.data_ptr() if need_dlora else None,
        torch.get_num_threads(),
    )
    check(status, "fastlora_lora_experts_backward")
    return dx, da, db
