"""Launchers of the low-rank kernels; formulas, dtypes and traffic are stated with the kernels."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastlora_kernels._launch import OPTIONS, on_device, split_reduction
from fastlora_kernels._low_rank_kernels import (
    low_rank_both_kernel,
    low_rank_finish_kernel,
    low_rank_first_kernel,
    low_rank_gradient_kernel,
    low_rank_reduce_kernel,
)
from fastlora_kernels.low_rank import LowRank, drop_threshold, keep_scale

SMALL = 128  # tokens up to which a finishing tile is small, to fill the device
FINISH_FEW = {"BLOCK_M": 16, "BLOCK_O": 64, "BLOCK_R": 16, "num_warps": 4, "num_stages": 1}
FINISH_MANY = {"BLOCK_M": 64, "BLOCK_O": 128, "BLOCK_R": 16, "num_warps": 8, "num_stages": 1}
FIRST = {"BLOCK_M": 64, "BLOCK_I": 64, "num_warps": 4, "num_stages": 3}
FIRST_MIXED = {"BLOCK_M": 64, "BLOCK_I": 32, "num_warps": 4, "num_stages": 3}
FIRST_FLOAT32 = {"BLOCK_M": 32, "BLOCK_I": 32, "num_warps": 4, "num_stages": 2}
GRADIENT = {"BLOCK_M": 32, "BLOCK_O": 128, "BLOCK_R": 16, "num_warps": 4, "num_stages": 3}
BOTH = {"BLOCK_M": 32, "BLOCK_N": 256, "num_warps": 8, "num_stages": 2}
BOTH_MIXED = {"BLOCK_M": 32, "BLOCK_N": 128, "num_warps": 4, "num_stages": 2}
BOTH_FLOAT32 = {"BLOCK_M": 32, "BLOCK_N": 64, "num_warps": 4, "num_stages": 2}
REDUCE = 1024


class Masks(NamedTuple):
    """What an update leaves out, as kernels take it."""

    seed: Tensor | None = None
    threshold: int = 0  # the bits of an uint32
    scale: float = 1.0  # of the elements that are kept
    spans: Tensor | None = None


def masks(update: LowRank | None) -> Masks:
    """Return the masks of an update."""
    if update is None:
        return Masks()
    spans = None if update.spans is None else update.spans.contiguous()
    if update.seed is None:
        return Masks(spans=spans)
    threshold = drop_threshold(update.dropout)
    signed = threshold - 2**32 if threshold >= 2**31 else threshold
    return Masks(update.seed, signed, keep_scale(update.dropout), spans)


def _rank_block(r: int) -> int:
    return 16 if r <= 16 else 32


def first_product(x: Tensor, factor: Tensor, mask: Masks, drop: bool) -> Tensor:
    """Return the parts of ``drop(x) factor^T``.

    Args:
        x: (M, I), float32, bfloat16 or float16, any strides.
        factor: (R, I), x's dtype or float32, any strides.
        mask: seed and spans.
        drop: drop elements of x.

    Returns:
        (parts, M, R) float32; to be added, and zero at least where a row has no rank at all.
    """
    (m, i), r = x.shape, factor.shape[0]
    block = FIRST_MIXED if x.dtype != factor.dtype else FIRST
    block = block if x.dtype != torch.float32 else FIRST_FLOAT32
    ranks = _rank_block(r)
    tiles = (-(-m // block["BLOCK_M"]), -(-r // ranks))
    parts, span = split_reduction(tiles[0] * tiles[1], i, block["BLOCK_I"], x.device)
    low = torch.empty(parts, m, r, dtype=torch.float32, device=x.device)
    if low.numel():
        seed, spans = mask.seed if drop else None, mask.spans
        with on_device(x):
            low_rank_first_kernel[(tiles[0], tiles[1], parts)](
                x, factor, low, x if seed is None else seed, x if spans is None else spans,
                m, i, r, span, mask.threshold,
                x.stride(0), x.stride(1), factor.stride(0), factor.stride(1),
                DROP=seed is not None, SPANS=spans is not None, BLOCK_R=ranks, **block, **OPTIONS,
            )  # fmt: skip
    return low


def finish(
    part: Tensor,
    bias: Tensor | None,
    low: Tensor | None,
    factor: Tensor | None,
    out: Tensor,
    low_out: Tensor | None,
    scales: tuple[float, float],
    mask: Masks,
    drop: bool,
) -> None:
    """Write ``out = sum of part + bias + drop(low factor) scales[1]``.

    Args:
        part: (parts, M, O); `out[None]` to add in place.
        bias: (O,), or None.
        low: (low_parts, M, R) float32, or None without an update.
        factor: (R, O), any strides; None without an update.
        out: (M, O), contiguous.
        low_out: (M, R) float32, gets ``spans(scales[0] sum of low)``; or None.
        scales: of the first product and of the second.
        mask: seed and spans.
        drop: drop elements of the second product.
    """
    m, o = out.shape
    if out.numel() == 0:
        return
    block = FINISH_FEW if m <= SMALL else FINISH_MANY
    second = part[0] if factor is None else factor
    seed, spans = mask.seed if drop else None, mask.spans
    with on_device(out):
        low_rank_finish_kernel[(-(-m // block["BLOCK_M"]), -(-o // block["BLOCK_O"]))](
            part, out if bias is None else bias, out if low is None else low, second, out,
            out if low_out is None else low_out,
            out if seed is None else seed, out if spans is None else spans,
            m, o, 0 if low is None else low.shape[2], part.shape[0],
            0 if low is None else low.shape[0], *scales, mask.threshold,
            second.stride(0), second.stride(1),
            HAS_BIAS=bias is not None, HAS_LOW=low is not None, STORE_LOW=low_out is not None,
            DROP=seed is not None, SPANS=spans is not None, **block, **OPTIONS,
        )  # fmt: skip


def reduced(part: Tensor, out: Tensor, scale: float = 1.0, spans: Tensor | None = None) -> Tensor:
    """Return `out` (rows, cols), any strides, with ``scale spans(sum of part)``.

    Args:
        part: (parts, rows, cols) float32.
        out: where to write, float.
        scale: dimensionless.
        spans: (rows, 2) int32, columns that each row has; None: all of them.
    """
    parts, rows, cols = part.shape
    if out.numel():
        with on_device(out):
            low_rank_reduce_kernel[(-(-out.numel() // REDUCE),)](
                part, out, out if spans is None else spans, rows, cols, parts, float(scale),
                out.stride(0), out.stride(1),
                SPANS=spans is not None, BLOCK=REDUCE, num_warps=4, **OPTIONS,
            )  # fmt: skip
    return out


def gradient(
    low: Tensor, wide: Tensor, scale: float, out: Tensor, mask: Masks, drop: bool
) -> Tensor:
    """Return `out` (R, O), any strides, with ``scale low^T drop(wide)``.

    Args:
        low: (M, R) float32, contiguous.
        wide: (M, O), float32, bfloat16 or float16, any strides.
        scale: dimensionless.
        out: where to write, float.
        mask: the seed.
        drop: drop elements of wide.
    """
    (m, o), r = wide.shape, low.shape[1]
    if out.numel() == 0:
        return out
    block = GRADIENT
    tiles = (-(-o // block["BLOCK_O"]), -(-r // block["BLOCK_R"]))
    parts, span = split_reduction(tiles[0] * tiles[1], m, block["BLOCK_M"], wide.device)
    into, seed = out[None], mask.seed if drop else None
    if parts > 1:
        into = torch.empty(parts, r, o, dtype=torch.float32, device=wide.device)
    with on_device(wide):
        low_rank_gradient_kernel[(tiles[0], tiles[1], parts)](
            low, wide, into, wide if seed is None else seed, m, o, r, span,
            float(scale) if parts == 1 else 1.0, mask.threshold,
            wide.stride(0), wide.stride(1), into.stride(0), into.stride(1), into.stride(2),
            DROP=seed is not None, **block, **OPTIONS,
        )  # fmt: skip
    return out if parts == 1 else reduced(into, out, scale)


def both_block(dy: Tensor, factor: Tensor) -> dict[str, int] | None:
    """Return the block sizes of one pass over dy, or None where two passes cost less.

    One pass saves reading dy, e bytes per element, and writes and reads partial sums of dy B, 8 R /
    BLOCK_N bytes per element.
    """
    if dy.dtype == factor.dtype:
        block: dict[str, int] | None = BOTH_FLOAT32 if dy.dtype == torch.float32 else BOTH
    else:  # float16 times float32 takes five matrix instructions: too many registers
        block = BOTH_MIXED if dy.dtype == torch.bfloat16 else None
    if block is None or 8 * _padded(factor) >= dy.element_size() * block["BLOCK_N"]:
        return None
    return block


def _padded(factor: Tensor) -> int:
    """Return R of a factor (N, R), padded to the side of a block of ranks."""
    return max(16, 1 << (factor.shape[1] - 1).bit_length())


def both(dy: Tensor, factor: Tensor, s: Tensor, block: dict[str, int]) -> tuple[Tensor, Tensor]:
    """Return the parts of ``dy B`` and of ``s^T dy``, in one pass over dy.

    Args:
        dy: (M, N), float32, bfloat16 or float16, any strides.
        factor: B (N, R), dy's dtype or float32, any strides; R at most 32.
        s: (M, R) float32, contiguous.
        block: what `both_block` returns.

    Returns:
        (tiles, M, R) and (parts, R, N), float32.
    """
    (m, n), r = dy.shape, factor.shape[1]
    tiles = -(-n // block["BLOCK_N"])
    parts, span = split_reduction(tiles, m, block["BLOCK_M"], dy.device)
    ds = torch.empty(tiles, m, r, dtype=torch.float32, device=dy.device)
    db = torch.empty(parts, r, n, dtype=torch.float32, device=dy.device)
    arguments: tuple[Any, ...] = (dy, factor, s, ds, db, m, n, r, span)
    with on_device(dy):
        low_rank_both_kernel[(tiles, parts)](
            *arguments, dy.stride(0), dy.stride(1), factor.stride(0), factor.stride(1),
            BLOCK_R=_padded(factor), **block, **OPTIONS,
        )  # fmt: skip
    return ds, db
