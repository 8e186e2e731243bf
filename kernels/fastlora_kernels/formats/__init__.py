"""Weight formats: what is stored, and the registry of 4-bit formats."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastlora_kernels.formats.blockwise import BLOCKSIZES, dequantize_blocks, quantize_blocks
from fastlora_kernels.formats.codebook import Codebook, code_table, pair_table, rounding_tables
from fastlora_kernels.formats.fp4 import FP4
from fastlora_kernels.formats.nested import (
    NESTED_BLOCKSIZE,
    NESTED_CODE,
    dequantize_absmax,
    nested_table,
    quantize_absmax,
)
from fastlora_kernels.formats.nf4 import NF4

FORMATS: dict[str, Codebook] = {book.name: book for book in (NF4, FP4)}


class StoredWeight(NamedTuple):
    """A weight (N, K) as kernels read it.

    Attributes:
        data: dense: (N, K) float. 4-bit: uint8, row-major over the flattened (N, K), the first
            value in the high nibble: (N, K // 2) when K is even, else ((N * K + 1) // 2, 1).
        absmax: 4-bit: float32 (blocks,), or uint8 (blocks,) when double-quantised, with
            blocks = ceil(N * K / blocksize). Dense: None.
        nested_absmax: double-quantised: float32 (ceil(blocks / 256),). Otherwise None.
        nested_offset: double-quantised: one float32, added to every decoded absmax. Otherwise None.
        format: ``"dense"`` or a name in `FORMATS`.
        blocksize: 4-bit: values per block. Dense: 0.
        compute: how it is multiplied: "auto", in the dtype of the activations, or "fp8", with
            operands in 8 bits (4-bit only); see `fastlora_kernels.fp8`.
    """

    data: Tensor
    absmax: Tensor | None
    nested_absmax: Tensor | None
    nested_offset: Tensor | None
    format: str
    blocksize: int
    compute: str = "auto"

    def is_flat(self, k: int) -> bool:
        """Whether the data of this weight with K = k does not show its shape: packed, odd K."""
        return self.format != "dense" and k % 2 == 1

    def rows(self, k: int) -> int:
        """N of this weight with K = k."""
        return 2 * self.data.numel() // k if self.is_flat(k) else self.data.shape[0]

    def columns(self) -> int:
        """K, which the data of a flat weight does not show."""
        return self.data.shape[-1] * (1 if self.format == "dense" else 2)


def decoded_absmax(weight: StoredWeight) -> Tensor:
    """The magnitude of each block.

    Args:
        weight: a 4-bit weight.

    Returns:
        (blocks,) float32.

    Raises:
        ValueError: the weight is dense.
    """
    if weight.absmax is None:
        raise ValueError(
            f"block magnitudes need a 4-bit weight, but this one is {weight.format!r}; "
            "use its data as it is"
        )
    if weight.nested_absmax is None or weight.nested_offset is None:
        return weight.absmax
    return dequantize_absmax(weight.absmax, weight.nested_absmax, weight.nested_offset)


def dequantize(weight: StoredWeight, n: int, k: int, dtype: torch.dtype) -> Tensor:
    """The dense matrix of a stored weight.

    Args:
        weight: dense or 4-bit.
        n: rows.
        k: columns.
        dtype: of the result.

    Returns:
        (n, k) ``dtype``, on the device of the weight; a dense weight that already has this dtype
        is returned as it is.
    """
    if weight.format == "dense":
        return weight.data.to(dtype)
    absmax, book = decoded_absmax(weight), FORMATS[weight.format]
    flat = dequantize_blocks(weight.data, absmax, book, weight.blocksize, n * k, dtype)
    return flat.view(n, k)


__all__ = [
    "BLOCKSIZES",
    "FORMATS",
    "NESTED_BLOCKSIZE",
    "NESTED_CODE",
    "Codebook",
    "StoredWeight",
    "code_table",
    "decoded_absmax",
    "dequantize",
    "dequantize_absmax",
    "dequantize_blocks",
    "nested_table",
    "pair_table",
    "quantize_absmax",
    "quantize_blocks",
    "rounding_tables",
]
