"""4-bit weights made by the plain PyTorch reference: kernel tests need no other backend."""

from __future__ import annotations

from fastlora_kernels import formats
from fastlora_kernels.formats import StoredWeight
from torch import Tensor


def quantized(
    dense: Tensor, quant_type: str, blocksize: int, double: bool, device: str
) -> StoredWeight:
    """Return a float (n, k) matrix in 4 bits, on `device`."""
    n, k = dense.shape
    packed, absmax = formats.quantize_blocks(
        dense.reshape(-1), formats.FORMATS[quant_type], blocksize
    )
    data = packed.view(n, k // 2) if k % 2 == 0 else packed
    if not double:
        absmax = absmax.to(device)
        return StoredWeight(data.to(device), absmax, None, None, quant_type, blocksize)
    codes, nested, offset = formats.quantize_absmax(absmax)
    return StoredWeight(
        data.to(device), codes.to(device), nested.to(device), offset, quant_type, blocksize
    )
