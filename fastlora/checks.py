"""Check the operands of an op: the same sentences in the real, the fake and the eager path."""

from __future__ import annotations

import torch
from fastlora_kernels.formats import StoredWeight
from fastlora_kernels.low_rank import LowRank
from torch import Tensor

from fastlora.weight_checks import same_device, weight_shape

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which sums over x are kept: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def low_rank(
    A: Tensor | None,
    B: Tensor | None,
    scaling: float,
    dropout: float,
    seed: Tensor | None,
    spans: Tensor | None,
) -> LowRank | None:
    """Return the update that an op's separate arguments are; None without A and B.

    Raises:
        TypeError: only one of A and B is given.
    """
    if A is None and B is None:
        return None
    if A is None or B is None:
        raise TypeError("lora_A and lora_B come together, got only one; pass both or neither")
    return LowRank(A, B, scaling, dropout, seed, spans)


def check_forward(
    x: Tensor, weight: StoredWeight, bias: Tensor | None, update: LowRank | None
) -> tuple[int, int]:
    """Return (N, K) after checking that the operands of `lora_linear` fit together.

    Args:
        x: (..., K).
        weight: the stored (N, K) weight.
        bias: (N,), or None.
        update: the low-rank term, or None.

    Raises:
        TypeError: a dtype, or a missing or superfluous operand.
        ValueError: a shape, a device, a format or a block size.
    """
    if x.dim() == 0:
        raise ValueError("x must have at least one dimension, got a scalar; pass x of (..., K)")
    n, k = weight_shape(weight, x.shape[-1])
    _check_common("x", x, weight)
    if update is not None:
        _check_update("x", x, n, k, update)
    if bias is not None:
        _check_bias(bias, x, n)
    return n, k


def check_backward(
    dy: Tensor,
    x: Tensor | None,
    s: Tensor | None,
    weight: StoredWeight,
    update: LowRank | None,
    need_dlora: bool,
) -> tuple[int, int]:
    """Return (N, K) after checking that the operands of `lora_linear_backward` fit together.

    Args:
        dy: (..., N).
        x: (..., K), or None.
        s: (M, R), or None.
        weight: the stored (N, K) weight.
        update: the low-rank term, or None.
        need_dlora: dA and dB are wanted, from x and s.

    Raises:
        TypeError: a dtype, or a missing or superfluous operand.
        ValueError: a shape, a device, a format or a block size.
    """
    n, k = weight_shape(weight, weight.columns() if x is None else x.shape[-1])
    if dy.dim() == 0 or dy.shape[-1] != n:
        raise ValueError(f"dy must have shape (..., {n}), got {tuple(dy.shape)}; N is {n}")
    _check_common("dy", dy, weight)
    if update is not None:
        _check_update("dy", dy, n, k, update)
    if need_dlora and (x is None or s is None or update is None):
        raise TypeError("dA and dB need x, s and the adapter, got None for one; pass all of them")
    if need_dlora and x is not None and x.shape[:-1] != dy.shape[:-1]:
        raise ValueError(
            f"x and dy must have the same rows, got {tuple(x.shape)} and {tuple(dy.shape)}"
        )
    return n, k


def check_columns(z: Tensor, scale: Tensor, bias: Tensor | None) -> int:
    """Return N after checking that the operands of `scale_columns` fit together.

    Args:
        z: (..., N).
        scale: (N,).
        bias: (N,), or None.

    Raises:
        TypeError: a dtype.
        ValueError: a shape or a device.
    """
    n = _check_scale("z", z, scale)
    if bias is not None:
        _check_bias(bias, z, n)
    return n


def check_columns_backward(dy: Tensor, z: Tensor | None, scale: Tensor, need_dscale: bool) -> int:
    """Return N after checking that the operands of `scale_columns_backward` fit together."""
    n = _check_scale("dy", dy, scale)
    if need_dscale and z is None:
        raise TypeError("the gradient of the scale needs z, got None; pass it")
    if z is not None and (z.shape != dy.shape or z.dtype != dy.dtype):
        raise ValueError(
            f"z and dy must have one shape and dtype, got {z.dtype} {tuple(z.shape)} and"
            f" {dy.dtype} {tuple(dy.shape)}"
        )
    return n


def _check_scale(name: str, rows: Tensor, scale: Tensor) -> int:
    """Return N after checking z or dy, `rows`, against the scale of its columns."""
    if rows.dtype not in FLOATS:
        raise TypeError(
            f"{name} must be float32, bfloat16 or float16, got {rows.dtype}; cast it first"
        )
    if rows.dim() == 0 or scale.shape != (rows.shape[-1],):
        raise ValueError(
            f"{name} must have shape (..., N) and scale (N,), got {tuple(rows.shape)} and"
            f" {tuple(scale.shape)}"
        )
    wide = wide_dtype(rows.dtype)
    if scale.dtype != wide:
        raise TypeError(
            f"scale must be {wide} for {name} of {rows.dtype}, got {scale.dtype}; cast it"
        )
    same_device("scale", scale, rows)
    return rows.shape[-1]


def check_dots(a: Tensor, weight: StoredWeight, dtype: torch.dtype) -> tuple[int, int]:
    """Return (N, K) after checking that the operands of `weight_dots` fit together.

    Args:
        a: (R, K).
        weight: the stored (N, K) weight.
        dtype: to which W is decoded.

    Raises:
        TypeError: a dtype.
        ValueError: a shape or a device.
    """
    if a.dim() != 2:
        raise ValueError(f"a must have shape (R, K), got {tuple(a.shape)}")
    n, k = weight_shape(weight, a.shape[1])
    _check_decoded(weight, dtype)
    if a.dtype not in (torch.float32, dtype):
        raise TypeError(f"a must be float32 or {dtype} like the weight, got {a.dtype}; cast it")
    same_device("weight", weight.data, a)
    return n, k


def check_squares(weight: StoredWeight, k: int, dtype: torch.dtype) -> int:
    """Return N after checking a stored weight of K columns and the dtype it is decoded to."""
    n, _ = weight_shape(weight, k)
    _check_decoded(weight, dtype)
    return n


def _check_decoded(weight: StoredWeight, dtype: torch.dtype) -> None:
    if dtype not in FLOATS:
        raise TypeError(
            f"a weight decodes to float32, bfloat16, float16 or float64, got {dtype}; name another"
        )
    if weight.format == "dense" and weight.data.dtype != dtype:
        raise TypeError(
            f"dtype must be that of a dense weight, {weight.data.dtype}, got {dtype}; cast it first"
        )


def _check_common(name: str, rows: Tensor, weight: StoredWeight) -> None:
    """Check the dtype and the device of x or dy, `rows`, against the weight."""
    if rows.dtype not in FLOATS:
        raise TypeError(
            f"{name} must be float32, bfloat16 or float16, got {rows.dtype}; cast it first"
        )
    data = weight.data
    if weight.format == "dense" and data.dtype != rows.dtype:
        raise TypeError(
            f"{name} and a dense weight must have one dtype, got {rows.dtype} and"
            f" {data.dtype}; cast one of them"
        )
    if data.device != rows.device:
        same_device("weight", data, rows)


def _check_update(name: str, rows: Tensor, n: int, k: int, update: LowRank) -> None:
    """Check a low-rank term of an (n, k) weight against x or dy, `rows`."""
    A, B = update.A, update.B
    shape = A.shape
    r = shape[0] if len(shape) == 2 else 0
    if r == 0 or shape[1] != k or B.shape != (n, r):
        raise ValueError(
            f"lora_A must have shape (r, {k}) and lora_B ({n}, r) with r at least 1, got"
            f" {tuple(A.shape)} and {tuple(B.shape)}"
        )
    dtype = A.dtype
    if dtype != B.dtype or (dtype != torch.float32 and dtype != rows.dtype):
        raise TypeError(
            f"lora_A and lora_B must both be float32 or {rows.dtype} like {name}, got"
            f" {A.dtype} and {B.dtype}; cast them"
        )
    device = rows.device
    if A.device != device or B.device != device:
        same_device("lora_A", A, rows)
        same_device("lora_B", B, rows)
    if update.seed is not None:
        _check_dropout(rows, update.dropout, update.seed)
    if update.spans is not None:
        _check_spans(rows, update.spans)


def _check_bias(bias: Tensor, x: Tensor, n: int) -> None:
    if bias.shape != (n,):
        raise ValueError(
            f"bias must have shape ({n},), got {tuple(bias.shape)}; it has one value per row of"
            " the weight"
        )
    if bias.dtype not in (x.dtype, torch.float32):
        raise TypeError(f"bias must be float32 or {x.dtype} like x, got {bias.dtype}; cast it")
    same_device("bias", bias, x)


def check_drop(x: Tensor, seed: Tensor, dropout: float) -> None:
    """Check the operands of `drop`: x (..., K), a seed and a probability.

    Raises:
        TypeError: a dtype.
        ValueError: a shape, a device or the probability.
    """
    if x.dim() == 0:
        raise ValueError("x must have at least one dimension, got a scalar; pass x of (..., K)")
    if x.dtype not in FLOATS:
        raise TypeError(f"x must be float32, bfloat16 or float16, got {x.dtype}; cast it first")
    _check_dropout(x, dropout, seed)


def _check_dropout(rows: Tensor, dropout: float, seed: Tensor) -> None:
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must be at least 0 and below 1, got {dropout}; pass another")
    if seed.dtype != torch.int64 or seed.numel() != 1:
        raise TypeError(
            f"seed must be one int64, got {seed.dtype} {tuple(seed.shape)}; use ops.dropout_seed"
        )
    same_device("seed", seed, rows)


def _check_spans(rows: Tensor, spans: Tensor) -> None:
    if spans.dtype != torch.int32 or spans.dim() != 2 or spans.shape[1] != 2:
        raise TypeError(
            "spans must be int32 of shape (M, 2), the first rank of each row and the one after its"
            f" last, got {spans.dtype} {tuple(spans.shape)}"
        )
    if spans.shape[0] * rows.shape[-1] != rows.numel():
        raise ValueError(
            f"spans must have one row for each row of the activations {tuple(rows.shape)}, got"
            f" {spans.shape[0]}"
        )
    same_device("spans", spans, rows)
