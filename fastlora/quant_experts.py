"""4-bit weights of stacked experts: each expert is a matrix of its own, stored as one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from fastlora_kernels.formats import StoredWeight
from torch import Tensor

from fastlora.quant import QuantConfig, QuantizedWeight, quantize_4bit

PARTS = ("packed", "absmax", "nested_absmax", "nested_offset")


@dataclass(frozen=True, eq=False)
class QuantizedExperts:
    """The 4-bit weights (N, K) of E experts; no block spans two experts.

    Attributes:
        packed: (E, ceil(N K / 2)) uint8, each row as in `QuantizedWeight`.
        absmax: (E, blocks): float32, or uint8 codes when double-quantised.
        shape: (E, N, K).
        dtype: dtype of the weights it was made from.
        quant_type: the format, ``"nf4"`` or ``"fp4"``.
        blocksize: values that share one magnitude.
        nested_absmax: double-quantised: (E, ceil(blocks / 256)) float32. Otherwise None.
        nested_offset: double-quantised: (E,) float32. Otherwise None.
    """

    packed: Tensor
    absmax: Tensor
    shape: tuple[int, int, int]
    dtype: torch.dtype
    quant_type: str
    blocksize: int
    nested_absmax: Tensor | None = None
    nested_offset: Tensor | None = None

    def __post_init__(self) -> None:
        """Check the tensors of the first expert, and that all parts have one row per expert.

        Raises:
            ValueError: a tensor's dtype or shape does not fit the rest.
            TypeError: dtype is not a float of 16 or 32 bits.
        """
        count = self.shape[0] if len(self.shape) == 3 else 0
        rows = {name: part for name in PARTS if (part := getattr(self, name)) is not None}
        whole = all(p.shape[:1] == (count,) and p.is_contiguous() for p in rows.values())
        if count < 1 or not whole:
            shapes = {name: tuple(part.shape) for name, part in rows.items()}
            raise ValueError(
                "stacked 4-bit weights must have a shape (E, N, K) and E rows in each part, without"
                f" gaps, got {self.shape} and {shapes}; pass the tensors that belong together"
            )
        self[0]

    def __getitem__(self, index: int) -> QuantizedWeight:
        """One expert's weight (N, K), sharing memory."""
        nested, offset = self.nested_absmax, self.nested_offset
        return QuantizedWeight(
            self.packed[index].unsqueeze(1),
            self.absmax[index],
            self.shape[1:],
            self.dtype,
            self.quant_type,
            self.blocksize,
            None if nested is None else nested[index],
            None if offset is None else offset[index],
        )

    def stored(self) -> StoredWeight:
        """The weights as kernels read them, sharing memory."""
        parts = (self.packed, self.absmax, self.nested_absmax, self.nested_offset)
        return StoredWeight(*parts, self.quant_type, self.blocksize)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The dense weights (E, N, K), by default in the dtype that they were made from."""
        out = torch.empty(self.shape, dtype=dtype or self.dtype, device=self.packed.device)
        for index in range(self.shape[0]):
            out[index] = self[index].dequantize(dtype)
        return out

    @property
    def nbytes(self) -> int:
        """Bytes that its tensors take."""
        parts = (getattr(self, name) for name in PARTS)
        return sum(part.nbytes for part in parts if part is not None)


def quantize_experts(
    weight: Tensor, quant_type: str = "nf4", blocksize: int = 64, double_quant: bool = True
) -> QuantizedExperts:
    """Store the weights of stacked experts in 4 bits, each as `quantize_4bit` stores it.

    Args:
        weight: (E, N, K) float32, bfloat16 or float16, finite; any strides.
        quant_type: the format, ``"nf4"`` or ``"fp4"``.
        blocksize: values that share one magnitude: 32, 64, ... 4096.
        double_quant: whether to store the magnitudes themselves in 8 bits.

    Returns:
        The 4-bit weights, on the device of ``weight``.

    Raises:
        TypeError: weight is not a tensor of these dtypes, or double_quant not a bool.
        ValueError: weight has another shape, is empty or not finite, or an unknown scheme.
    """
    QuantConfig(quant_type, blocksize, double_quant)
    if not isinstance(weight, Tensor) or weight.dim() != 3:
        given = tuple(weight.shape) if isinstance(weight, Tensor) else type(weight).__name__
        raise ValueError(f"the weights of experts must have shape (E, N, K), got {given}")
    if weight.numel() == 0 or weight.shape[2] == 1:
        raise ValueError(
            "the weights of experts must have values and at least two columns to be stored in 4"
            f" bits, got {tuple(weight.shape)}; keep them dense"
        )
    parts: dict[str, Any] = dict.fromkeys(PARTS)
    for index, matrix in enumerate(weight.detach()):
        one = quantize_4bit(matrix, quant_type, blocksize, double_quant)
        for name in PARTS:
            part = getattr(one, name)
            if part is None:
                continue
            flat = part.reshape(-1) if name != "nested_offset" else part.reshape(())
            if parts[name] is None:
                parts[name] = flat.new_empty(weight.shape[0], *flat.shape)
            parts[name][index] = flat
    shape = (weight.shape[0], weight.shape[1], weight.shape[2])
    kind = (shape, weight.dtype, quant_type, blocksize)
    nested = (parts["nested_absmax"], parts["nested_offset"])
    return QuantizedExperts(parts["packed"], parts["absmax"], *kind, *nested)


__all__ = ["QuantizedExperts", "quantize_experts"]
