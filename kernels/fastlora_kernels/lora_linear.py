"""The LoRA linear on Triton: launchers for the kernels of `_lora_linear_kernels`.

``y = x W^T + bias + s (x A^T) B^T``, ``dx = dy W + s (dy B) A``, ``dA = s (dy B)^T x``,
``dB = s dy^T (x A^T)``; shapes, dtypes and traffic are stated with the kernels.

Up to `CROSSOVER` tokens the weight is decoded inside the product. Above, decoding it again for
every tile of tokens costs more than it saves: the weight is dequantised once, `torch` multiplies,
and the adapter is added in place by the finishing kernel. A dense weight always takes this way.

Source: Hu et al. 2021, arXiv:2106.09685, eq. 3; Dettmers et al. 2023, arXiv:2305.14314.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from fastlora_kernels._launch import OPTIONS, on_device, split_reduction, stored_arguments
from fastlora_kernels._lora_linear_kernels import (
    lora_linear_bwd_dx_kernel,
    lora_linear_finish_kernel,
    lora_linear_fwd_kernel,
)
from fastlora_kernels.dequantize import dequantize
from fastlora_kernels.formats import StoredWeight


class Tile(NamedTuple):
    """Block sizes of a partial kernel: tokens, outputs and terms of the sum per step."""

    block_m: int
    block_o: int
    block_i: int
    num_warps: int
    num_stages: int


# Chosen by the roofline model (H200: decoding a tile takes as long as multiplying it with about
# 150 tokens) and by what compiles without register spills; not measured on a GPU yet.
CROSSOVER = {torch.bfloat16: 128, torch.float16: 128, torch.float32: 32}  # tokens
TILES_16BIT = {
    16: Tile(16, 64, 64, 4, 4),
    32: Tile(32, 128, 64, 8, 3),
    64: Tile(64, 128, 64, 8, 3),
    128: Tile(128, 64, 64, 8, 3),
}
TILE_FLOAT32 = Tile(16, 32, 32, 4, 2)
TILE_RAGGED = Tile(16, 32, 32, 4, 2)  # rows that share bytes or blocks: decoded value by value
BLOCK_R = 16
FINISH = {"BLOCK_M": 16, "BLOCK_O": 64, "BLOCK_R": BLOCK_R, "num_warps": 4, "num_stages": 1}


def pick_tile(dtype: torch.dtype, m: int, k: int, blocksize: int) -> tuple[Tile, bool]:
    """Return the block sizes for M tokens, and whether rows of a tile have one absmax each."""
    tile = TILE_FLOAT32
    if dtype != torch.float32:
        tile = next((tile for limit, tile in TILES_16BIT.items() if m <= limit), TILES_16BIT[128])
    for width in (64, 32):
        if k % width == 0 and blocksize % width == 0:
            return tile._replace(block_i=min(tile.block_i, width)), True
    return TILE_RAGGED, False


def lora_linear(
    x: Tensor,
    weight: StoredWeight,
    bias: Tensor | None,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    scaling: float,
) -> tuple[Tensor, Tensor]:
    """Return ``y = x W^T + bias + scaling (x A^T) B^T`` and ``s = x A^T``.

    Args:
        x: (M, K), float32, bfloat16 or float16, any strides.
        weight: the stored (N, K) weight.
        bias: (N,), or None.
        lora_A: (r, K), x's dtype or float32, or None.
        lora_B: (N, r), the dtype of lora_A, or None.
        scaling: alpha / r.

    Returns:
        y (M, N) in x's dtype; s (M, r) float32, shape (0,) without an adapter.
    """
    m, k = x.shape
    n = weight.data.shape[0] if weight.format == "dense" or k % 2 == 0 else _rows(weight, k)
    factors = None if lora_A is None or lora_B is None else (lora_A, lora_B.t())
    s = x.new_empty((m, factors[0].shape[0]) if factors else (0,), dtype=torch.float32)
    if _fused(x, weight):
        y = _fused_product(lora_linear_fwd_kernel, x, weight, n, n, k, bias, factors, s, scaling)
        return y, s
    y = functional.linear(x, dequantize(weight, n, k, x.dtype), bias)
    if factors:
        s = _first_product(x, factors[0].t())
        _add_low_rank(y, s, factors[1], scaling)
    return y, s


def lora_linear_backward(
    dy: Tensor,
    x: Tensor | None,
    s: Tensor | None,
    weight: StoredWeight,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    scaling: float,
    need_dx: bool,
    need_dlora: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients ``dx``, ``dA``, ``dB``; those not needed have no elements.

    Args:
        dy: (M, N), float32, bfloat16 or float16, any strides.
        x: (M, K) of the forward; needed for `need_dlora`, or when a packed weight has odd K.
        s: (M, r) float32 of the forward; needed for `need_dlora`.
        weight: the stored (N, K) weight.
        lora_A: (r, K), or None.
        lora_B: (N, r), or None.
        scaling: alpha / r.
        need_dx: compute dx.
        need_dlora: compute dA and dB.

    Returns:
        dx (M, K) in dy's dtype; dA (r, K) and dB (N, r) in the adapter's dtype.

    Raises:
        ValueError: the adapter's gradient is needed and x or s is missing.
    """
    dx, dA, dB = dy.new_empty(0), dy.new_empty(0), dy.new_empty(0)
    t: Tensor | None = None  # dy B, (M, r) float32
    if need_dx:
        dx, t = _input_gradient(dy, x, weight, lora_A, lora_B, scaling)
    if need_dlora and lora_A is not None and lora_B is not None:
        if x is None or s is None:
            raise ValueError("the gradient of the adapter needs x and s, got None; pass both")
        t = _first_product(dy, lora_B) if t is None else t
        dA = (t * scaling).to(lora_A.dtype).t() @ x.to(lora_A.dtype)
        dB = (dy.to(lora_B.dtype).t() @ s.to(lora_B.dtype)) * scaling
    return dx, dA, dB


def _input_gradient(
    dy: Tensor,
    x: Tensor | None,
    weight: StoredWeight,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    scaling: float,
) -> tuple[Tensor, Tensor | None]:
    """Return dx (M, K) and dy B (M, r) float32, None without an adapter."""
    m, n = dy.shape
    k = _columns(weight, n, x, lora_A)
    factors = None if lora_A is None or lora_B is None else (lora_B.t(), lora_A)
    if _fused(dy, weight):
        low = dy.new_empty((m, factors[0].shape[0]) if factors else (0,), dtype=torch.float32)
        kernel = lora_linear_bwd_dx_kernel
        dx = _fused_product(kernel, dy, weight, k, n, k, None, factors, low, scaling)
        return dx, low if factors else None
    dx = dy @ dequantize(weight, n, k, dy.dtype)
    if factors is None:
        return dx, None
    low = _first_product(dy, factors[0].t())
    _add_low_rank(dx, low, factors[1], scaling)
    return dx, low


def _fused(x: Tensor, weight: StoredWeight) -> bool:
    return weight.format != "dense" and x.shape[0] <= CROSSOVER[x.dtype]


def _rows(weight: StoredWeight, k: int) -> int:
    """Return N of a packed weight with odd K, which is stored flat."""
    return 2 * weight.data.numel() // k


def _columns(weight: StoredWeight, n: int, x: Tensor | None, lora_A: Tensor | None) -> int:
    """Return K; a packed weight with odd K is flat, so x or lora_A must tell it."""
    for known in (x, lora_A):
        if known is not None:
            return known.shape[1]
    return weight.data.shape[1] * (1 if weight.format == "dense" else 2)


def _first_product(x: Tensor, factor: Tensor) -> Tensor:
    """Return x @ factor in the factor's dtype, as float32: (M, r)."""
    return (x.to(factor.dtype) @ factor).float()


def _fused_product(
    kernel: Any,
    x: Tensor,
    weight: StoredWeight,
    outputs: int,
    n: int,
    k: int,
    bias: Tensor | None,
    factors: tuple[Tensor, Tensor] | None,
    low_out: Tensor,
    scaling: float,
) -> Tensor:
    """Return one direction for few tokens: the partial kernel, then the finishing one.

    Args:
        kernel: `lora_linear_fwd_kernel` or `lora_linear_bwd_dx_kernel`.
        x: (M, inputs): x or dy.
        weight: the packed (n, k) weight.
        outputs: n forward, k backward.
        n: rows of the weight.
        k: columns of the weight.
        bias: (outputs,), or None.
        factors: (r, inputs) and (r, outputs), or None.
        low_out: (M, r) float32, filled with x @ factors[0]^T.
        scaling: of the adapter.
    """
    (m, inputs), device = x.shape, x.device
    out = torch.empty(m, outputs, dtype=x.dtype, device=device)
    if m == 0 or outputs == 0:
        return out
    tile, aligned = pick_tile(x.dtype, m, k, weight.blocksize)
    if kernel is lora_linear_bwd_dx_kernel:  # the aligned width lies along K, the outputs here
        tile = tile._replace(block_o=tile.block_i, block_i=tile.block_o)
    rank = factors[0].shape[0] if factors else 0
    tiles_m, tiles_o = -(-m // tile.block_m), -(-outputs // tile.block_o)
    parts, span = split_reduction(tiles_m * tiles_o, inputs, tile.block_i, device)
    part = torch.empty(parts, m, outputs, dtype=torch.float32, device=device)
    low = torch.empty(parts, m, rank, dtype=torch.float32, device=device)
    stored, meta = stored_arguments(weight)
    first = factors[0] if factors else part
    tiles_low = -(-rank // BLOCK_R) * (tile.block_m // BLOCK_R)
    with on_device(x):
        kernel[(tiles_m, tiles_o + tiles_low, parts)](
            x, *stored, first, part, low, m, n, k, rank, span,
            x.stride(0), x.stride(1), first.stride(0), first.stride(1),
            **meta, **OPTIONS, ALIGNED=aligned,
            BLOCK_M=tile.block_m, BLOCK_O=tile.block_o, BLOCK_I=tile.block_i, BLOCK_R=BLOCK_R,
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
        second = factors[1] if factors else None
        _finish(part, bias, low, second, out, low_out if factors else None, scaling)
    return out


def _finish(
    part: Tensor,
    bias: Tensor | None,
    low: Tensor,
    factor: Tensor | None,
    out: Tensor,
    low_out: Tensor | None,
    scaling: float,
) -> None:
    """Launch the finishing kernel: out (M, O) from part (parts, M, O) and low (parts, M, r)."""
    parts, m, outputs = part.shape
    grid = (-(-m // FINISH["BLOCK_M"]), -(-outputs // FINISH["BLOCK_O"]))
    second = part[0] if factor is None else factor
    lora_linear_finish_kernel[grid](
        part, part if bias is None else bias, low, second, out, low if low_out is None else low_out,
        m, outputs, low.shape[2], parts, float(scaling), second.stride(0), second.stride(1),
        HAS_BIAS=bias is not None, HAS_LOW=factor is not None, STORE_LOW=low_out is not None,
        **FINISH, **OPTIONS,
    )  # fmt: skip


def _add_low_rank(y: Tensor, low: Tensor, factor: Tensor, scaling: float) -> None:
    """Add scaling low @ factor to y (M, O), in place; low (M, r) float32, factor (r, O)."""
    if y.numel():
        with on_device(y):
            _finish(y[None], None, low[None], factor, y, None, scaling)
