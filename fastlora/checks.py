"""Check the operands of an op: the same sentences in the real, the fake and the eager path."""

from __future__ import annotations

import torch
from fastlora_kernels.formats import BLOCKSIZES, FORMATS, StoredWeight
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which sums over x are kept: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_forward(
    x: Tensor,
    weight: StoredWeight,
    bias: Tensor | None,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
) -> tuple[int, int]:
    """Return (N, K) after checking that the operands of `lora_linear` fit together.

    Args:
        x: (..., K).
        weight: the stored (N, K) weight.
        bias: (N,), or None.
        lora_A: (r, K), or None.
        lora_B: (N, r), or None.

    Raises:
        TypeError: a dtype, or a missing or superfluous operand.
        ValueError: a shape, a device, a format or a block size.
    """
    if x.dim() == 0:
        raise ValueError("x must have at least one dimension, got a scalar; pass x of (..., K)")
    n, k = _weight_shape(weight, x.shape[-1])
    _check_common("x", x, weight, n, k, lora_A, lora_B)
    if bias is not None:
        if bias.shape != (n,):
            raise ValueError(
                f"bias must have shape ({n},), got {tuple(bias.shape)}; it has one value per row of"
                " the weight"
            )
        if bias.dtype not in (x.dtype, torch.float32):
            raise TypeError(f"bias must be float32 or {x.dtype} like x, got {bias.dtype}; cast it")
        _same_device("bias", bias, x)
    return n, k


def check_backward(
    dy: Tensor,
    x: Tensor | None,
    s: Tensor | None,
    weight: StoredWeight,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    need_dlora: bool,
) -> tuple[int, int]:
    """Return (N, K) after checking that the operands of `lora_linear_backward` fit together.

    Args:
        dy: (..., N).
        x: (..., K), or None.
        s: (M, r), or None.
        weight: the stored (N, K) weight.
        lora_A: (r, K), or None.
        lora_B: (N, r), or None.
        need_dlora: dA and dB are wanted, from x and s.

    Raises:
        TypeError: a dtype, or a missing or superfluous operand.
        ValueError: a shape, a device, a format or a block size.
    """
    packed_columns = weight.data.shape[-1] * (1 if weight.format == "dense" else 2)
    n, k = _weight_shape(weight, packed_columns if x is None else x.shape[-1])
    if dy.dim() == 0 or dy.shape[-1] != n:
        raise ValueError(f"dy must have shape (..., {n}), got {tuple(dy.shape)}; N is {n}")
    _check_common("dy", dy, weight, n, k, lora_A, lora_B)
    if need_dlora and (x is None or s is None or lora_A is None):
        raise TypeError("dA and dB need x, s and the adapter, got None for one; pass all of them")
    if need_dlora and x is not None and x.shape[:-1] != dy.shape[:-1]:
        raise ValueError(
            f"x and dy must have the same rows, got {tuple(x.shape)} and {tuple(dy.shape)}"
        )
    return n, k


def _check_common(
    name: str,
    rows: Tensor,
    weight: StoredWeight,
    n: int,
    k: int,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
) -> None:
    """Check dtypes, devices and adapter shapes that both directions share; `rows` is x or dy."""
    if rows.dtype not in FLOATS:
        raise TypeError(
            f"{name} must be float32, bfloat16 or float16, got {rows.dtype}; cast it first"
        )
    if weight.format == "dense" and weight.data.dtype != rows.dtype:
        raise TypeError(
            f"{name} and a dense weight must have one dtype, got {rows.dtype} and"
            f" {weight.data.dtype}; cast one of them"
        )
    _same_device("weight", weight.data, rows)
    if (lora_A is None) != (lora_B is None):
        raise TypeError("lora_A and lora_B come together, got only one; pass both or neither")
    if lora_A is None or lora_B is None:
        return
    r = lora_A.shape[0] if lora_A.dim() == 2 else 0
    if r == 0 or lora_A.shape[1] != k or lora_B.shape != (n, r):
        raise ValueError(
            f"lora_A must have shape (r, {k}) and lora_B ({n}, r) with r at least 1, got"
            f" {tuple(lora_A.shape)} and {tuple(lora_B.shape)}"
        )
    if lora_A.dtype != lora_B.dtype or lora_A.dtype not in (torch.float32, rows.dtype):
        raise TypeError(
            f"lora_A and lora_B must both be float32 or {rows.dtype} like {name}, got"
            f" {lora_A.dtype} and {lora_B.dtype}; cast them"
        )
    _same_device("lora_A", lora_A, rows)
    _same_device("lora_B", lora_B, rows)


def _same_device(name: str, tensor: Tensor, rows: Tensor) -> None:
    if tensor.device != rows.device:
        raise ValueError(
            f"all operands must be on one device, got {name} on {tensor.device} and the activations"
            f" on {rows.device}; move one of them"
        )


def _weight_shape(weight: StoredWeight, k: int) -> tuple[int, int]:
    """Return (N, K) of a stored weight whose input has `k` columns."""
    data = weight.data
    if weight.format == "dense":
        if data.dim() != 2 or data.shape[1] != k or k == 0:
            raise ValueError(
                f"a dense weight must have shape (N, K) with K = {k} like the input, got"
                f" {tuple(data.shape)}"
            )
        return data.shape[0], k
    if weight.format not in FORMATS:
        raise ValueError(f"format must be one of {['dense', *FORMATS]}, got {weight.format!r}")
    if data.dtype != torch.uint8 or weight.absmax is None:
        raise TypeError(
            f"a {weight.format} weight must be packed uint8 with its absmax, got {data.dtype} and"
            f" absmax {'None' if weight.absmax is None else weight.absmax.dtype}"
        )
    even = k % 2 == 0
    n = data.shape[0] if even else 2 * data.numel() // max(k, 1)
    want = (n, k // 2) if even else ((n * k + 1) // 2, 1)
    if k == 0 or data.shape != want or not data.is_contiguous():
        raise ValueError(
            f"a {weight.format} weight for an input of K = {k} columns must be a contiguous"
            f" {'(N, K // 2)' if even else '((N * K + 1) // 2, 1)'} tensor, got shape"
            f" {tuple(data.shape)}"
        )
    _check_absmax(weight, weight.absmax, n * k)
    return n, k


def _check_absmax(weight: StoredWeight, absmax: Tensor, values: int) -> None:
    """Check the magnitudes of a 4-bit weight with `values` values."""
    if weight.blocksize not in BLOCKSIZES:
        raise ValueError(f"blocksize must be one of {tuple(BLOCKSIZES)}, got {weight.blocksize}")
    nested = weight.nested_absmax
    want = torch.float32 if nested is None else torch.uint8
    if absmax.dtype != want or (nested is not None and nested.dtype != torch.float32):
        raise TypeError(
            "absmax must be float32, or uint8 together with a float32 nested_absmax, got"
            f" {absmax.dtype} and {None if nested is None else nested.dtype}"
        )
    blocks = -(-values // weight.blocksize)
    if absmax.numel() != blocks:
        raise ValueError(
            f"absmax must have {blocks} values, one per {weight.blocksize} of {values} weights, got"
            f" {absmax.numel()}"
        )
    _same_device("absmax", absmax, weight.data)
    if nested is not None and nested.numel() != -(-blocks // 256):
        raise ValueError(
            f"nested_absmax must have {-(-blocks // 256)} values, one per 256 of {blocks} absmax,"
            f" got {nested.numel()}"
        )
    if nested is not None:
        _same_device("nested_absmax", nested, weight.data)
