"""Launcher of the kernels that multiply with a packed weight while they decode it."""

from __future__ import annotations

import torch
from torch import Tensor

from fastlora_kernels import regimes
from fastlora_kernels._launch import (
    OPTIONS,
    TYPES,
    on_device,
    split_reduction,
    stored_arguments,
)
from fastlora_kernels._lora_linear_kernels import (
    lora_linear_bwd_dx_kernel,
    lora_linear_fwd_kernel,
    lora_linear_gemv_kernel,
)
from fastlora_kernels.formats import StoredWeight
from fastlora_kernels.low_rank_products import Masks
from fastlora_kernels.regimes import NARROWEST, Plan, Tile, ragged

BLOCK_R = 16


def decode_width(tile: Tile, k: int, forward: bool) -> Tile:
    """Return the tile with its side along K narrowed until it divides k, unless k is ragged."""
    width = tile.block_i if forward else tile.block_o
    while not ragged(k) and k % width:
        width //= 2
    return tile._replace(block_i=width) if forward else tile._replace(block_o=width)


def how_to_decode(data: Tensor, tile: Tile, k: int, dtype: torch.dtype, forward: bool) -> str:
    """Return how the kernel decodes: see `_decode`."""
    if ragged(k):
        return "ragged"
    width = tile.block_i if forward else tile.block_o
    words = width >= 2 * NARROWEST and data.data_ptr() % 16 == 0
    return regimes.decoder(data.device, dtype) if words else "gather"


def partial_product(
    plan: Plan,
    x: Tensor,
    weight: StoredWeight,
    n: int,
    k: int,
    dtype: torch.dtype,
    factor: Tensor | None,
    mask: Masks,
    forward: bool,
) -> tuple[Tensor, Tensor | None]:
    """Return the parts of ``x W^T`` or ``x W``, and of ``drop(x) factor^T``.

    Args:
        plan: "gemv" (one token, forward) or "mma", with its tile.
        x: (M, inputs), float32, bfloat16 or float16, any strides: x forward, dy backward.
        weight: the packed (n, k) weight.
        n: rows of the weight.
        k: columns of the weight.
        dtype: to which the weight is decoded: that of x, or a 16-bit one with float32 x (forward).
        factor: (R, inputs), x's dtype or float32, any strides; or None.
        mask: the seed; dropout is forward only.
        forward: ``x W^T``; otherwise ``x W``.

    Returns:
        (parts, M, outputs) float32, and (parts, M, R) float32 or None. Both are to be added.
    """
    (m, inputs), outputs = x.shape, n if forward else k
    assert plan.tile is not None
    tile = decode_width(plan.tile, k, forward)
    stored, meta = stored_arguments(weight)
    how = how_to_decode(stored[0], tile, k, dtype, forward)
    ordered = forward and plan.kind == "mma" and x.dtype == dtype
    order = regimes.order(x.device, how, bool(meta["NESTED"])) if ordered else "natural"
    tiles_m, tiles_o = -(-m // tile.block_m), -(-outputs // tile.block_o)
    parts, span = split_reduction(tiles_m * tiles_o, inputs, tile.block_i, x.device)
    part = torch.empty(parts, m, outputs, dtype=torch.float32, device=x.device)
    low = None
    tiles_low = 0
    first = part[0]
    if factor is not None:
        low = torch.empty(parts, m, factor.shape[0], dtype=torch.float32, device=x.device)
        first = factor
        tiles_low = -(-factor.shape[0] // BLOCK_R)
        tiles_low *= 1 if m == 1 else tile.block_m // BLOCK_R
    if part.numel() == 0:
        return part, low
    kernel = lora_linear_fwd_kernel if forward else lora_linear_bwd_dx_kernel
    if plan.kind == "gemv":
        kernel = lora_linear_gemv_kernel
    seed = mask.seed if forward else None
    with on_device(x):
        kernel[(tiles_m, tiles_o + tiles_low, parts)](
            x, *stored, first, part, part if low is None else low, x if seed is None else seed,
            m, n, k, 0 if low is None else low.shape[2], span, k // 8, mask.threshold,
            x.stride(0), x.stride(1), first.stride(0), first.stride(1),
            **meta, **OPTIONS, DECODE=how, ORDER=order, DTYPE=TYPES[dtype],
            DROP=seed is not None, SINGLE=m == 1,
            BLOCK_M=tile.block_m, BLOCK_O=tile.block_o, BLOCK_I=tile.block_i, BLOCK_R=BLOCK_R,
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
    return part, low
