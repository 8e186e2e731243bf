"""4-bit weights: what one is, how to make one, and how it meets bitsandbytes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from fastlora_kernels import native
from fastlora_kernels.formats import (
    BLOCKSIZES,
    FORMATS,
    NESTED_BLOCKSIZE,
    StoredWeight,
    dequantize,
    quantize_absmax,
    quantize_blocks,
)
from torch import Tensor

from fastlora import bnb_format, bnb_live

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _check_scheme(quant_type: str, blocksize: int, double_quant: bool) -> None:
    if quant_type not in FORMATS:
        raise ValueError(
            f"quant_type must be one of {sorted(FORMATS)}, got {quant_type!r}; pass one of these"
        )
    if isinstance(blocksize, bool) or blocksize not in BLOCKSIZES:
        raise ValueError(
            f"blocksize must be one of {list(BLOCKSIZES)}, got {blocksize!r}; pass one of these"
        )
    if not isinstance(double_quant, bool):
        raise TypeError(f"double_quant must be True or False, got {double_quant!r}; pass a bool")


def _check_float(dtype: torch.dtype, what: str) -> None:
    if dtype not in FLOAT_DTYPES:
        raise TypeError(
            f"{what} must be float32, bfloat16 or float16, got {dtype}; convert to one of these"
        )


@dataclass(frozen=True)
class QuantConfig:
    """How to store a weight in 4 bits.

    Attributes:
        quant_type: the format, ``"nf4"`` or ``"fp4"``.
        blocksize: values that share one magnitude: 32, 64, ... 4096.
        double_quant: whether the magnitudes are themselves stored in 8 bits.

    Raises:
        ValueError: an unknown format or block size.
        TypeError: double_quant is not a bool.
    """

    quant_type: str = "nf4"
    blocksize: int = 64
    double_quant: bool = True

    def __post_init__(self) -> None:
        _check_scheme(self.quant_type, self.blocksize, self.double_quant)


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """A tensor stored in 4 bits, byte for byte as bitsandbytes 0.50 stores it.

    Attributes:
        packed: ((numel + 1) // 2, 1) uint8: two values a byte, the first in the high half.
        absmax: block magnitudes: (blocks,) float32, or uint8 codes when double-quantised.
        shape: shape of the tensor it stands for.
        dtype: dtype of the tensor it was made from, and of `dequantize` by default.
        quant_type: the format, ``"nf4"`` or ``"fp4"``.
        blocksize: values that share one magnitude.
        nested_absmax: double-quantised: (ceil(blocks / 256),) float32. Otherwise None.
        nested_offset: double-quantised: one float32, added to the decoded magnitudes. Otherwise
            None.

    Raises:
        ValueError: a tensor's dtype or shape does not fit the rest.
        TypeError: dtype is not a float of 16 or 32 bits.
    """

    packed: Tensor
    absmax: Tensor
    shape: tuple[int, ...]
    dtype: torch.dtype
    quant_type: str
    blocksize: int
    nested_absmax: Tensor | None = None
    nested_offset: Tensor | None = None

    def __post_init__(self) -> None:
        _check_scheme(self.quant_type, self.blocksize, self.double_quant)
        _check_float(self.dtype, "the dtype of a 4-bit weight")
        blocks = -(-self.numel // self.blocksize)
        absmax_dtype = torch.uint8 if self.double_quant else torch.float32
        self._check("packed", self.packed, torch.uint8, ((self.numel + 1) // 2, 1))
        self._check("absmax", self.absmax, absmax_dtype, (blocks,))
        if self.nested_absmax is not None:
            groups = -(-blocks // NESTED_BLOCKSIZE)
            self._check("nested_absmax", self.nested_absmax, torch.float32, (groups,))
        offset = self.nested_offset
        if (offset is not None) != self.double_quant:
            raise ValueError(
                "nested_absmax and nested_offset of a 4-bit weight come together, got only one;"
                " pass both or neither"
            )
        if offset is not None:
            self._check("nested_offset", offset.reshape(-1), torch.float32, (1,))

    def _check(self, name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        if tensor.dtype != dtype or tuple(tensor.shape) != shape or not tensor.is_contiguous():
            raise ValueError(
                f"{name} of a 4-bit weight of shape {self.shape} must be contiguous {dtype} "
                f"{shape}, got {tensor.dtype} {tuple(tensor.shape)}; pass the tensors that "
                "belong together"
            )

    @property
    def numel(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    @property
    def double_quant(self) -> bool:
        """Whether the block magnitudes are stored in 8 bits."""
        return self.nested_absmax is not None

    @property
    def nbytes(self) -> int:
        """Bytes that its tensors take."""
        parts = (self.packed, self.absmax, self.nested_absmax, self.nested_offset)
        return sum(part.nbytes for part in parts if part is not None)

    def _stored_as(self, n: int, k: int) -> StoredWeight:
        data = self.packed.view(n, k // 2) if k % 2 == 0 else self.packed
        nested = (self.nested_absmax, self.nested_offset)
        return StoredWeight(data, self.absmax, *nested, self.quant_type, self.blocksize)

    def stored(self) -> StoredWeight:
        """The weight as kernels read it, sharing memory.

        Returns:
            A `StoredWeight` of a matrix (N, K).

        Raises:
            ValueError: the weight is not a matrix.
        """
        if len(self.shape) != 2:
            raise ValueError(
                f"a kernel reads a matrix, but this 4-bit weight has shape {self.shape}; "
                "dequantise it instead"
            )
        return self._stored_as(*self.shape)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The dense tensor.

        Args:
            dtype: float32, bfloat16 or float16; by default the dtype that it was made from.

        Returns:
            A tensor of this shape, on the same device.

        Raises:
            TypeError: another dtype.
        """
        dtype = self.dtype if dtype is None else dtype
        _check_float(dtype, "the dtype to dequantise to")
        stored = self._stored_as(1, self.numel)
        read = native.dequantize_4bit if self.packed.device.type == "cpu" else dequantize
        return read(stored, 1, self.numel, dtype).view(self.shape)

    def to(self, device: torch.device | str) -> QuantizedWeight:
        """The same weight on another device.

        Args:
            device: where to.

        Returns:
            A weight whose tensors live there; those that already do are shared.
        """
        nested = None if self.nested_absmax is None else self.nested_absmax.to(device)
        offset = None if self.nested_offset is None else self.nested_offset.to(device)
        packed, absmax = self.packed.to(device), self.absmax.to(device)
        parts: dict[str, Any] = {"packed": packed, "absmax": absmax, "nested_absmax": nested}
        return replace(self, **parts, nested_offset=offset)

    def state_dict(self, prefix: str = "weight") -> dict[str, Tensor]:
        """The tensors that a bnb-4bit checkpoint of transformers holds for this weight.

        Args:
            prefix: name of the weight, such as ``"model.layers.0.mlp.up_proj.weight"``.

        Returns:
            Tensors named ``prefix``, ``prefix.absmax``, ... sharing memory with this weight.
        """
        return bnb_format.to_tensors(self, prefix)

    @classmethod
    def from_state_dict(
        cls, tensors: Mapping[str, Tensor], prefix: str = "weight"
    ) -> QuantizedWeight:
        """Read a weight of a bnb-4bit checkpoint, strictly.

        Args:
            tensors: holds the weight's tensors; names without ``prefix`` are not looked at.
            prefix: name of the weight.

        Returns:
            The weight, sharing memory with the tensors.

        Raises:
            ValueError: a tensor is missing, unexpected, misshapen, of another dtype or not
                finite, or its description can't be read.
        """
        fields = bnb_format.from_tensors(tensors, prefix)
        try:
            return cls(**fields)
        except ValueError as error:
            sentence = f"the checkpoint's {prefix!r} does not fit together: {error}"
            raise ValueError(sentence) from None

    @classmethod
    def from_bnb(cls, weight: Any) -> QuantizedWeight:
        """Take over a live bitsandbytes weight; the packed bytes are not copied.

        A weight that bitsandbytes has repacked for its own CPU kernel is put back in order, which
        copies it; its magnitudes stay as that kernel has them, rounded to bfloat16.

        Args:
            weight: a ``Params4bit``, or the pair (packed tensor, ``QuantState``).

        Returns:
            The weight, with the same bytes and the same floats.

        Raises:
            TypeError: another object.
            ValueError: a ``Params4bit`` that has not been quantised yet, or a format that is not
                supported.
        """
        return cls(**bnb_live.from_params(weight))

    def to_bnb(self) -> Any:
        """This weight as bitsandbytes knows it.

        Returns:
            A frozen ``Params4bit`` that shares memory with this weight.

        Raises:
            ImportError: bitsandbytes is not installed.
        """
        return bnb_live.to_params(self)


def quantize_4bit(
    weight: Tensor, quant_type: str = "nf4", blocksize: int = 64, double_quant: bool = True
) -> QuantizedWeight:
    """Store a tensor in 4 bits; bytes and magnitudes equal those of bitsandbytes 0.50 on CPU.

    Args:
        weight: float32, bfloat16 or float16, any shape, finite.
        quant_type: the format, ``"nf4"`` or ``"fp4"``.
        blocksize: values that share one magnitude: 32, 64, ... 4096.
        double_quant: whether to store the magnitudes themselves in 8 bits.

    Returns:
        The 4-bit weight, on the device of ``weight``.

    Raises:
        TypeError: weight is not a tensor of these dtypes, or double_quant not a bool.
        ValueError: weight is empty, not finite or too large, or an unknown scheme.
        ImportError: weight is on CPU and the native library is missing.
    """
    _check_scheme(quant_type, blocksize, double_quant)
    if not isinstance(weight, Tensor):
        raise TypeError(f"weight must be a tensor, got {type(weight).__name__}; pass a tensor")
    _check_float(weight.dtype, "weight")
    if weight.dim() == 0 or weight.numel() == 0:
        raise ValueError(
            "weight must have at least one dimension and one value, got shape "
            f"{tuple(weight.shape)}; pass a tensor that is not empty"
        )
    flat = weight.detach().reshape(-1)
    if flat.device.type == "cpu":
        packed, absmax = native.quantize_4bit(flat, quant_type, blocksize)
    else:
        packed, absmax = quantize_blocks(flat, FORMATS[quant_type], blocksize)
    if not bool(torch.isfinite(absmax).all()):
        count = int(torch.isfinite(flat).logical_not_().sum())
        raise ValueError(
            f"a weight must be finite to be stored in 4 bits, but {count} of its {flat.numel()} "
            "values are NaN or infinite; repair the checkpoint or leave this weight dense"
        )
    common = (tuple(weight.shape), weight.dtype, quant_type, blocksize)
    if not double_quant:
        return QuantizedWeight(packed, absmax, *common)
    codes, nested, offset = quantize_absmax(absmax)
    if not bool(torch.isfinite(offset)):
        raise ValueError(
            "double quantisation needs block magnitudes whose sum float32 can hold, but this "
            f"weight's reach {float(absmax.max()):.3g}; pass double_quant=False"
        )
    return QuantizedWeight(packed, codes, *common, nested, offset)
