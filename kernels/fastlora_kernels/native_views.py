"""How tensors look from C: structs of pointers, and the tensors that must outlive them."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from fastlora_kernels.formats import FORMATS, StoredWeight, code_table, nested_table
from fastlora_kernels.low_rank import LowRank
from fastlora_kernels.native_library import DTYPES, Lora, Weight

CPU = torch.device("cpu")
_NO_UPDATE = Lora()


@functools.cache
def _tables(format: str) -> tuple[int, int]:
    """Addresses of a format's code book and of the code book of nested magnitudes, kept alive."""
    return code_table(FORMATS[format], CPU).data_ptr(), nested_table(CPU).data_ptr()


@functools.lru_cache(maxsize=4096)
def _packed(
    n: int,
    k: int,
    format: str,
    blocksize: int,
    data: int,
    absmax: int,
    nested: int | None,
    offset: int | None,
) -> Weight:
    """The C view of a 4-bit weight, a function of its addresses; not to be changed."""
    code, nested_code = _tables(format)
    shift = blocksize.bit_length() - 1
    return Weight(n, k, 1, 0, data, code, absmax, nested, nested_code, offset, shift)


def describe(weight: StoredWeight, n: int, k: int) -> Weight:
    """The C view of a stored weight. The caller keeps the tensors alive and the view as it is."""
    data, absmax, nested, offset, format, blocksize, _ = weight
    if absmax is None:
        return Weight(n, k, 0, DTYPES[data.dtype], data.data_ptr())
    inner = None if nested is None else nested.data_ptr()
    mean = None if offset is None else offset.data_ptr()
    return _packed(n, k, format, blocksize, data.data_ptr(), absmax.data_ptr(), inner, mean)


def contiguous(weight: StoredWeight) -> StoredWeight:
    """The weight with its tensors contiguous."""
    data, absmax, nested = weight[:3]
    if (
        data.is_contiguous()
        and (absmax is None or absmax.is_contiguous())
        and (nested is None or nested.is_contiguous())
    ):
        return weight
    absmax = None if absmax is None else absmax.contiguous()
    nested = None if nested is None else nested.contiguous()
    return weight._replace(data=data.contiguous(), absmax=absmax, nested_absmax=nested)


@functools.lru_cache(maxsize=4096)
def _factors(r: int, dtype: torch.dtype, scaling: float, a: int, b: int) -> Lora:
    """The C view of an update for all rows and without dropout; not to be changed."""
    return Lora(r, DTYPES[dtype], scaling, a, b)


def low_rank(update: LowRank | None) -> tuple[Lora, LowRank | None]:
    """The C view of an update, and the update whose tensors must outlive it."""
    if update is None:
        return _NO_UPDATE, None
    a, b, scaling, dropout, seed, spans = update
    if not (a.is_contiguous() and b.is_contiguous() and (spans is None or spans.is_contiguous())):
        a, b = a.contiguous(), b.contiguous()
        spans = None if spans is None else spans.contiguous()
        update = LowRank(a, b, scaling, dropout, seed, spans)
    if seed is None and spans is None:
        return _factors(a.shape[0], a.dtype, scaling, a.data_ptr(), b.data_ptr()), update
    pointers = (a.data_ptr(), b.data_ptr(), pointer(spans), pointer(seed))
    return Lora(a.shape[0], DTYPES[a.dtype], scaling, *pointers, dropout), update


def by_rows(x: Tensor) -> Tensor:
    """A matrix whose rows are contiguous."""
    if x.is_contiguous():
        return x
    return x if x.stride(1) == 1 and x.stride(0) >= x.shape[1] else x.contiguous()


def pointer(tensor: Tensor | None) -> int | None:
    """The address of a tensor's values."""
    return None if tensor is None else tensor.data_ptr()


def check(status: int, name: str) -> None:
    """Raise a RuntimeError unless a function of the library did what it was asked."""
    if status != 0:
        raise RuntimeError(f"{name} refused its arguments (status {status}): please report this.")
