"""The LoRA linear on Triton: ``y = x W^T + bias + c s B^T``, ``s = spans(drop(x) A^T)``.

Gradients, with ``ds = spans(c dy B)``: ``dx = dy W + drop(ds A)``, ``dA = ds^T drop(x)``,
``dB = c dy^T s``. Dtypes and traffic are stated with the kernels.

For few tokens the weight is decoded inside the product. Above a crossover (`regimes`), decoding it
again for every tile of tokens costs more than it saves: the weight is dequantised once, `torch`
multiplies, and the adapter is added in place. A dense weight always takes this way. With
`weight.compute` "fp8" that product, forward and backward, has operands in 8 bits (`fp8_linear`);
what is decoded inside the product is as exact as ever.

Source: Hu et al. 2021, arXiv:2106.09685, eq. 3; Dettmers et al. 2023, arXiv:2305.14314.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import functional

from fastlora_kernels import fp8_linear, regimes
from fastlora_kernels import low_rank_products as low_rank
from fastlora_kernels._launch import scratch
from fastlora_kernels.dequantize import dequantize
from fastlora_kernels.formats import StoredWeight
from fastlora_kernels.fused import partial_product
from fastlora_kernels.low_rank import LowRank
from fastlora_kernels.low_rank_products import Masks, masks
from fastlora_kernels.regimes import DENSE, Plan

FLOAT32 = torch.float32


def lora_linear(
    x: Tensor, weight: StoredWeight, bias: Tensor | None, update: LowRank | None
) -> tuple[Tensor, Tensor]:
    """Return ``y = x W^T + bias + c s B^T`` and ``s = spans(drop(x) A^T)``.

    Args:
        x: (M, K), float32, bfloat16 or float16, any strides.
        weight: the stored (N, K) weight.
        bias: (N,), or None.
        update: A (R, K) and B (N, R) of x's dtype or float32, or None.

    Returns:
        y (M, N) in x's dtype; s (M, R) float32, shape (0,) without an update.
    """
    (m, k), n, mask = x.shape, weight.rows(x.shape[1]), masks(update)
    s = x.new_empty((m, update.A.shape[0]) if update else (0,), dtype=FLOAT32)
    second, scaling = (None, 1.0) if update is None else (update.B.t(), float(update.scaling))
    plan = _plan(x, weight, k, "forward")
    if plan.tile is not None:
        factor = None if update is None else update.A
        part, low = partial_product(plan, x, weight, n, k, x.dtype, factor, mask, True)
        y = torch.empty(m, n, dtype=x.dtype, device=x.device)
        low_out = None if low is None else s
        scales = (mask.scale, scaling)
        low_rank.finish(part, bias, low, second, y, low_out, scales, mask, False)
        return y, s
    y, rest = _dense_y(x, weight, n, k, bias)
    if update is not None:
        part = low_rank.first_product(x, update.A, mask, True)
        low_rank.reduced(part, s, mask.scale, mask.spans)
        low_rank.finish(y[None], rest, s[None], second, y, None, (1.0, scaling), mask, False)
    elif rest is not None:
        y += rest
    return y, s


def lora_linear_backward(
    dy: Tensor,
    x: Tensor | None,
    s: Tensor | None,
    weight: StoredWeight,
    update: LowRank | None,
    need_dx: bool,
    need_dlora: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients ``dx``, ``dA``, ``dB``; those not needed have no elements.

    Args:
        dy: (M, N), float32, bfloat16 or float16, any strides.
        x: (M, K) of the forward; needed for `need_dlora`, or when a packed weight has odd K.
        s: (M, R) float32 of the forward; needed for `need_dlora`.
        weight: the stored (N, K) weight.
        update: as in the forward.
        need_dx: compute dx.
        need_dlora: compute dA and dB.

    Returns:
        dx (M, K) in dy's dtype; dA (R, K) and dB (N, R) in the adapter's dtype.

    Raises:
        ValueError: the adapter's gradient is needed and x or s is missing.
    """
    dx, mask, wanted = dy.new_empty(0), masks(update), need_dlora and update is not None
    if wanted and (x is None or s is None):
        raise ValueError("the gradient of the adapter needs x and s, got None; pass both")
    k = _columns(weight, x, update)
    plan = _plan(dy, weight, k, "backward") if need_dx else DENSE
    if update is None:
        dx = _fused_dx(plan, dy, weight, k, None, mask)[0] if need_dx else dx
        return dx, dy.new_empty(0), dy.new_empty(0)
    ds, dB = None, None
    if plan.tile is None:
        block = low_rank.both_block(dy, update.B) if wanted else None
        if block is not None:
            assert s is not None
            ds, dB = _one_pass(dy, s, update, mask, block)
        else:
            part = low_rank.first_product(dy, update.B.t(), mask, False)
            ds = low_rank.reduced(part, _low(dy, update), update.scaling, mask.spans)
        if need_dx:
            dx = _dense_dx(dy, weight, k)
            scales = (1.0, mask.scale)
            low_rank.finish(dx[None], None, ds[None], update.A, dx, None, scales, mask, True)
    else:
        dx, ds = _fused_dx(plan, dy, weight, k, update, mask)
    if not wanted:
        return dx, dy.new_empty(0), dy.new_empty(0)
    assert x is not None and s is not None and ds is not None
    dA = low_rank.gradient(ds, x, mask.scale, _like(update.A), mask, True)
    if dB is None:
        dB = _like(update.B)
        low_rank.gradient(s.contiguous(), dy, update.scaling, dB.t(), mask, False)
    return dx, dA, dB


def _fused_dx(
    plan: Plan, dy: Tensor, weight: StoredWeight, k: int, update: LowRank | None, mask: Masks
) -> tuple[Tensor, Tensor | None]:
    """Return dx and ds; without an update, dx by either way, and None."""
    if plan.tile is None:
        return _dense_dx(dy, weight, k), None
    m, n = dy.shape
    factor = None if update is None else update.B.t()
    part, low = partial_product(plan, dy, weight, n, k, dy.dtype, factor, mask, False)
    dx = torch.empty(m, k, dtype=dy.dtype, device=dy.device)
    if update is None:
        low_rank.finish(part, None, None, None, dx, None, (1.0, 1.0), mask, False)
        return dx, None
    ds, scales = _low(dy, update), (float(update.scaling), mask.scale)
    low_rank.finish(part, None, low, update.A, dx, ds, scales, mask, True)
    return dx, ds


def _one_pass(
    dy: Tensor, s: Tensor, update: LowRank, mask: Masks, block: dict[str, int]
) -> tuple[Tensor, Tensor]:
    """Return ds (M, R) float32 and dB (N, R), reading dy once."""
    ds_parts, db_parts = low_rank.both(dy, update.B, s.contiguous(), block)
    ds = low_rank.reduced(ds_parts, _low(dy, update), update.scaling, mask.spans)
    dB = _like(update.B)
    low_rank.reduced(db_parts, dB.t(), update.scaling)
    return ds, dB


def _dense_y(
    x: Tensor, weight: StoredWeight, n: int, k: int, bias: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Return ``x W^T``, and the bias where it is still to be added."""
    if weight.compute == "fp8":
        return fp8_linear.product(x, weight, n, k, transposed=False), bias
    with _dense(weight, n, k, x.dtype) as matrix:
        return functional.linear(x, matrix, bias), None


def _dense_dx(dy: Tensor, weight: StoredWeight, k: int) -> Tensor:
    if weight.compute == "fp8":
        return fp8_linear.product(dy, weight, dy.shape[1], k, transposed=True)
    with _dense(weight, dy.shape[1], k, dy.dtype) as matrix:
        return dy @ matrix


def _low(dy: Tensor, update: LowRank) -> Tensor:
    """Return memory for ds: (M, R) float32."""
    return torch.empty(dy.shape[0], update.A.shape[0], dtype=FLOAT32, device=dy.device)


def _like(factor: Tensor) -> Tensor:
    """Return memory for the gradient of a factor, contiguous."""
    rows, cols = factor.shape
    return torch.empty(rows, cols, dtype=factor.dtype, device=factor.device)


@contextmanager
def _dense(weight: StoredWeight, n: int, k: int, dtype: torch.dtype) -> Iterator[Tensor]:
    """Lend the dense (n, k) matrix of a weight."""
    if weight.format == "dense":
        yield weight.data.to(dtype)
        return
    with scratch(n, k, dtype, weight.data.device) as matrix:
        yield dequantize(weight, n, k, dtype, matrix)


def _plan(x: Tensor, weight: StoredWeight, k: int, direction: str) -> Plan:
    if weight.format == "dense":
        return DENSE
    return regimes.plan(x.device, x.dtype, x.shape[0], direction, k)


def _columns(weight: StoredWeight, x: Tensor | None, update: LowRank | None) -> int:
    """Return K; a packed weight with odd K is flat, so x or A must tell it."""
    for known in (x, None if update is None else update.A):
        if known is not None:
            return known.shape[1]
    return weight.columns()
