"""Launchers of the linear of stacked experts; formulas and traffic are stated with the kernels.

Few rows per expert are taken in one launch for all; with more, a decoded weight and the vendor's
matrix product cost less, and each expert that has rows is computed by itself, for which the host
waits for `ends`. The limit is that of the fused linear's roofline; it has not been measured.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastlora_kernels import lora_linear, regimes
from fastlora_kernels._experts_kernels import (
    experts_first_kernel,
    experts_gradient_kernel,
    experts_linear_bwd_dx_kernel,
    experts_linear_fwd_kernel,
)
from fastlora_kernels._launch import OPTIONS, TYPES, on_device, stored_arguments
from fastlora_kernels.experts import ExpertsUpdate, one_by_one, one_by_one_backward
from fastlora_kernels.formats import StoredWeight
from fastlora_kernels.fused import decode_width, how_to_decode
from fastlora_kernels.regimes import Tile

FLOAT32 = torch.float32
MOST_ROWS = 256  # per expert on average, up to which one launch takes all
# Rows per expert on average up to which a tile is used, and the tile; not measured on any GPU.
TILES = ((24, Tile(16, 64, 64, 4, 3)), (96, Tile(32, 64, 64, 4, 3)), (0, Tile(64, 64, 64, 4, 3)))
FIRST = {"BLOCK_M": 32, "BLOCK_I": 64, "BLOCK_R": 16, "num_warps": 4, "num_stages": 2}
GRADIENT = {"BLOCK_M": 32, "BLOCK_O": 64, "BLOCK_R": 16, "num_warps": 8, "num_stages": 2}


def _tile(rows: int, experts: int, dtype: torch.dtype, k: int, dense: bool) -> Tile:
    if dtype == FLOAT32:
        return regimes.FLOAT32
    if not dense and regimes.ragged(k):
        return regimes.RAGGED
    mean = rows / experts
    return next(tile for most, tile in TILES if mean <= most or most == 0)


def _weight(
    weight: StoredWeight, k: int, n: int, tile: Tile, dtype: torch.dtype, forward: bool
) -> tuple[tuple[Tensor, ...], dict[str, Any], Tile]:
    """Return the stored weight as kernels take it, its constants, and the tile that fits it."""
    data = weight.data
    if weight.format == "dense":
        data = data.contiguous()
        meta = {"CODE": (0.0,) * 16, "LOG_BLOCK": 6, "NESTED": False, "DECODE": "dense"}
        return (data,) * 6, meta, tile
    tile = decode_width(tile, k, forward)
    stored, meta = stored_arguments(weight)
    how = how_to_decode(stored[0], tile, k, dtype, forward)
    if how == "prmt" and (n * k // 2) % 16:
        how = "gather"  # an expert's words are not aligned
    return stored, {**meta, "DECODE": how}, tile


def _tiles(rows: int, experts: int, block_m: int) -> int:
    """Return how many tiles of rows there are at most: each expert's last may be partly empty."""
    return min(-(-rows // block_m) + experts, rows)


def _experts_block(experts: int) -> int:
    return max(16, 1 << (experts - 1).bit_length())


def _first(x: Tensor, factor: Tensor, strides: tuple[int, int], scale: float, ends: Tensor) -> Any:
    """Return ``scale x factor_e^T``, (M, R) float32, zero in rows of no expert."""
    (m, i), e = x.shape, ends.numel()
    r = factor.numel() // (e * i)
    low = torch.zeros(m, r, dtype=FLOAT32, device=x.device)
    block = FIRST if x.dtype != FLOAT32 else {**FIRST, "BLOCK_M": 16, "BLOCK_I": 32}
    grid = (_tiles(m, e, block["BLOCK_M"]), -(-r // block["BLOCK_R"]))
    if m:
        with on_device(x):
            experts_first_kernel[grid](
                x, factor, low, ends, i, r, e, float(scale), *strides,
                BLOCK_E=_experts_block(e), **block, **OPTIONS,
            )  # fmt: skip
    return low


def _gradient(
    low: Tensor, wide: Tensor, scale: float, like: Tensor, by_rank: bool, ends: Tensor
) -> Tensor:
    """Return ``scale low^T wide`` of each expert: (E, R, O) `by_rank`, else (E, O, R)."""
    o, r = wide.shape[1], low.shape[1]
    out = torch.empty(like.shape, dtype=like.dtype, device=wide.device)
    block = GRADIENT
    grid = (-(-o // block["BLOCK_O"]), -(-r // block["BLOCK_R"]), ends.numel())
    strides = (o, 1) if by_rank else (1, r)
    with on_device(wide):
        experts_gradient_kernel[grid](
            low, wide, out, ends, o, r, float(scale), *strides, **block, **OPTIONS
        )
    return out


def experts_linear(
    x: Tensor,
    weight: StoredWeight,
    n: int,
    bias: Tensor | None,
    update: ExpertsUpdate | None,
    ends: Tensor,
) -> tuple[Tensor, Tensor]:
    """The linear of each expert's rows.

    Args:
        x: (M, K), rows sorted by expert.
        weight: the stacked weights, see `experts.expert_weight`.
        n: rows of each weight.
        bias: (E, N) in x's dtype, or None.
        update: the low-rank terms, or None.
        ends: (E,) int64.

    Returns:
        y (M, N) in x's dtype; s (M, R) float32, or (0,) without an update.
    """
    (m, k), e = x.shape, ends.numel()
    if m > MOST_ROWS * e:
        return one_by_one(lora_linear.lora_linear, x, weight, n, bias, update, ends)
    x, ends = x.contiguous(), ends.contiguous()
    y = torch.zeros(m, n, dtype=x.dtype, device=x.device)
    s, scale, factor = x.new_empty(0, dtype=FLOAT32), 0.0, x
    if update is not None:
        A, factor, scale = update.A.contiguous(), update.B.contiguous(), float(update.scaling)
        s = _first(x, A, (k, 1), 1.0, ends)
    if m == 0 or n == 0:
        return y, s
    tile = _tile(m, e, x.dtype, k, weight.format == "dense")
    stored, meta, tile = _weight(weight, k, n, tile, x.dtype, True)
    grid = (_tiles(m, e, tile.block_m), -(-n // tile.block_o))
    with on_device(x):
        experts_linear_fwd_kernel[grid](
            x, *stored, x if bias is None else bias.contiguous(), s if update else x, factor, y,
            ends, n, k, 0 if update is None else s.shape[1], e, scale,
            **meta, **OPTIONS, DTYPE=TYPES[x.dtype],
            HAS_BIAS=bias is not None, HAS_LOW=update is not None, **_options(tile, e),
        )  # fmt: skip
    return y, s


def _options(tile: Tile, experts: int) -> dict[str, int]:
    return {
        "BLOCK_M": tile.block_m,
        "BLOCK_O": tile.block_o,
        "BLOCK_I": tile.block_i,
        "BLOCK_R": 16,
        "BLOCK_E": _experts_block(experts),
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }


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
    """Gradients of `experts_linear` for dy (M, N).

    Args:
        dy: (M, N).
        x: (M, K) and s: (M, R) of the forward pass, for `need_dlora`.
        s: see x.
        weight: as in the forward pass.
        k: columns of each weight.
        update: as in the forward pass.
        ends: as in the forward pass.
        need_dx: compute dx.
        need_dlora: compute dA and dB.

    Returns:
        dx (M, K) in dy's dtype, dA (E, R, K) and dB (E, N, R) in the update's dtype; without
        elements where not needed.
    """
    m, e = dy.shape[0], ends.numel()
    if m > MOST_ROWS * e:
        run, rest = lora_linear.lora_linear_backward, (update, ends, need_dx, need_dlora)
        return one_by_one_backward(run, dy, x, s, weight, k, *rest)
    dy, ends = dy.contiguous(), ends.contiguous()
    dx, dA, dB = dy.new_empty(0), dy.new_empty(0), dy.new_empty(0)
    ds = None
    if update is not None:
        B = update.B.contiguous()
        ds = _first(dy, B, (1, B.shape[2]), update.scaling, ends)
    if need_dx:
        dx = _input_gradient(dy, weight, k, ds, update, ends)
    if need_dlora and update is not None and ds is not None:
        assert x is not None and s is not None
        dA = _gradient(ds, x.contiguous(), 1.0, update.A, True, ends)
        dB = _gradient(s.contiguous(), dy, update.scaling, update.B, False, ends)
    return dx, dA, dB


def _input_gradient(
    dy: Tensor,
    weight: StoredWeight,
    k: int,
    ds: Tensor | None,
    update: ExpertsUpdate | None,
    ends: Tensor,
) -> Tensor:
    """Return ``dx = dy W_e + ds A_e``, (M, K), zero in rows of no expert."""
    (m, n), e = dy.shape, ends.numel()
    dx = torch.zeros(m, k, dtype=dy.dtype, device=dy.device)
    if m == 0:
        return dx
    tile = _tile(m, e, dy.dtype, k, weight.format == "dense")
    stored, meta, tile = _weight(weight, k, n, tile, dy.dtype, False)
    grid = (_tiles(m, e, tile.block_m), -(-k // tile.block_o))
    low = dy if ds is None or update is None else ds
    factor = dy if update is None else update.A.contiguous()
    with on_device(dy):
        experts_linear_bwd_dx_kernel[grid](
            dy, *stored, low, factor, dx, ends,
            n, k, 0 if ds is None else ds.shape[1], e,
            **meta, **OPTIONS, DTYPE=TYPES[dy.dtype], HAS_LOW=ds is not None, **_options(tile, e),
        )  # fmt: skip
    return dx
