"""The tensors of a bnb-4bit checkpoint, to and from the fields of a 4-bit weight."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from fastlora_kernels.formats import (
    BLOCKSIZES,
    FORMATS,
    NESTED_BLOCKSIZE,
    code_table,
    dequantize_absmax,
    nested_table,
)
from torch import Tensor

if TYPE_CHECKING:
    from fastlora.quant import QuantizedWeight

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_STORAGE = (torch.uint8, torch.bfloat16, torch.float16, torch.float32)
_STATE = "quant_state.bitsandbytes__"
_KEYS = ("quant_type", "blocksize", "dtype", "shape")
_NESTED_KEYS = ("nested_blocksize", "nested_dtype", "nested_offset")
_TABLE_TOLERANCE = 1e-6  # the 8-bit table differs in the last bit between machines


def to_tensors(weight: QuantizedWeight, prefix: str) -> dict[str, Tensor]:
    """The tensors that a bnb-4bit checkpoint holds for a weight.

    Args:
        weight: the 4-bit weight.
        prefix: its name.

    Returns:
        Tensors by name, in the order that bitsandbytes writes them.
    """
    device = weight.packed.device
    tensors = {
        prefix: weight.packed,
        f"{prefix}.absmax": weight.absmax,
        f"{prefix}.quant_map": code_table(FORMATS[weight.quant_type], device).clone(),
    }
    if weight.nested_absmax is not None:
        tensors[f"{prefix}.nested_absmax"] = weight.nested_absmax
        tensors[f"{prefix}.nested_quant_map"] = nested_table(device).clone()
    description = list(json.dumps(_describe(weight)).encode())
    name = f"{prefix}.{_STATE}{weight.quant_type}"
    return tensors | {name: torch.tensor(description, dtype=torch.uint8)}


def _describe(weight: QuantizedWeight) -> dict[str, Any]:
    values = (weight.quant_type, weight.blocksize, _NAMES[weight.dtype], weight.shape)
    described: dict[str, Any] = dict(zip(_KEYS, values, strict=True))
    if weight.nested_offset is not None:
        nested = (NESTED_BLOCKSIZE, "float32", float(weight.nested_offset))
        described |= zip(_NESTED_KEYS, nested, strict=True)
    return described


def from_tensors(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Any]:
    """Read the fields of a 4-bit weight from the tensors of a checkpoint.

    Args:
        tensors: a mapping that holds the weight's tensors among others.
        prefix: name of the weight.

    Returns:
        The arguments of a `fastlora.quant.QuantizedWeight`, sharing memory with the tensors.

    Raises:
        ValueError: a tensor is missing, unexpected or wrong, or the description can't be read.
    """
    start = prefix + "."
    found = {name[len(start) :]: tensors[name] for name in tensors if name.startswith(start)}
    names = [name for name in found if name.startswith("quant_state.")]
    quant_type = names[0].removeprefix(_STATE) if len(names) == 1 else ""
    if quant_type not in FORMATS:
        raise _broken(prefix, f"one description {_STATE}<{'|'.join(FORMATS)}>", names or "none")
    nested = "nested_absmax" in found or "nested_quant_map" in found
    _check_names(prefix, prefix in tensors, found, names[0], nested)
    described = _parse(found[names[0]], prefix, nested)
    if described["quant_type"] != quant_type:
        raise _broken(prefix, f"quant_type {quant_type!r}", repr(described["quant_type"]))
    for name in ("absmax", "nested_absmax"):
        if name in found and not bool(torch.isfinite(found[name]).all()):
            raise _broken(prefix, f"a finite {name}", "NaN or infinity")
    packed = tensors[prefix]
    if packed.dtype not in _STORAGE or packed.dim() != 2 or packed.shape[1] != 1:
        wanted = "packed bytes (length, 1) of " + ", ".join(str(dtype) for dtype in _STORAGE)
        raise _broken(prefix, wanted, f"{packed.dtype} {tuple(packed.shape)}")
    inner = None
    if nested:
        offset = torch.tensor(described["nested_offset"], device=found["nested_absmax"].device)
        inner = (found["nested_absmax"], found["nested_quant_map"], offset)
    common = (quant_type, described["blocksize"], tuple(described["shape"]))
    dtype = _DTYPES[described["dtype"]]
    return fields_of(prefix, packed, found["absmax"], found["quant_map"], *common, dtype, inner)


def _broken(name: str, wanted: str, given: object) -> ValueError:
    return ValueError(
        f"the 4-bit weight {name!r} must have {wanted}, got {given}; "
        "the checkpoint is damaged or not in bitsandbytes' 4-bit format, so fetch or save it again"
    )


def _check_names(
    prefix: str, has_packed: bool, found: Mapping[str, Tensor], state: str, nested: bool
) -> None:
    """Exactly the tensors of this kind of weight, nothing missing and nothing more."""
    wanted = {"absmax", "quant_map", state}
    if nested:
        wanted |= {"nested_absmax", "nested_quant_map"}
    missing = sorted(wanted - set(found))
    unexpected = sorted(set(found) - wanted)
    if not has_packed or missing:
        absent = [prefix] * (not has_packed) + [f"{prefix}.{name}" for name in missing]
        raise _broken(prefix, "all of its tensors", f"none named {absent}")
    if unexpected:
        raise _broken(prefix, "its own tensors only", f"also {unexpected}")


def _parse(tensor: Tensor, prefix: str, nested: bool) -> dict[str, Any]:
    """The JSON description, every entry checked."""
    if tensor.dtype != torch.uint8 or tensor.dim() != 1 or tensor.numel() > _LONGEST:
        wanted = f"a description of at most {_LONGEST} uint8"
        raise _broken(prefix, wanted, f"{tensor.dtype} {tuple(tensor.shape)}")
    text = bytes(tensor.tolist())
    try:
        described = json.loads(text.decode())
    except (ValueError, RecursionError):
        raise _broken(prefix, "a description in JSON", repr(text[:80])) from None
    keys = set(_KEYS) | (set(_NESTED_KEYS) if nested else set())
    if not isinstance(described, dict) or set(described) != keys:
        raise _broken(prefix, f"a description with exactly {sorted(keys)}", repr(text[:200]))
    for key, is_good in _GOOD.items():
        if key in described and not is_good(described[key]):
            raise _broken(prefix, f"a valid {key}", repr(described[key]))
    return described


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_shape(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(_is_int(v) and v > 0 for v in value)


def _is_offset(value: object) -> bool:
    return isinstance(value, float) and bool(torch.tensor(value).float().isfinite())


_LONGEST = 4096
_GOOD: dict[str, Callable[[Any], bool]] = {
    "blocksize": lambda value: _is_int(value) and value in BLOCKSIZES,
    "dtype": lambda value: isinstance(value, str) and value in _DTYPES,
    "shape": _is_shape,
    "nested_blocksize": lambda value: _is_int(value) and value == NESTED_BLOCKSIZE,
    "nested_dtype": lambda value: value == "float32",
    "nested_offset": _is_offset,
}


def fields_of(
    name: str,
    packed: Tensor,
    absmax: Tensor,
    quant_map: Tensor,
    quant_type: str,
    blocksize: int,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    nested: tuple[Tensor, Tensor, Tensor] | None,
) -> dict[str, Any]:
    """Check the tables of a weight and read its packed bytes.

    Args:
        name: what errors call the weight.
        packed: ((numel + 1) // 2 bytes,) in any shape and dtype.
        absmax: block magnitudes, or their codes.
        quant_map: (16,) float32, the values of the nibbles.
        quant_type: a name in `FORMATS`.
        blocksize: values per block.
        shape: of the dense tensor.
        dtype: of the dense tensor.
        nested: double-quantised: nested_absmax, the 256 values of the codes, and the offset.

    Returns:
        The arguments of a `fastlora.quant.QuantizedWeight`.

    Raises:
        ValueError: a table is not the one of the format.
    """
    table = code_table(FORMATS[quant_type], quant_map.device)
    if quant_map.dtype != table.dtype or not torch.equal(quant_map, table):
        raise _broken(name, f"the 16 values of {quant_type} as quant_map", quant_map.tolist())
    fields: dict[str, Any] = {
        "packed": packed.contiguous().view(torch.uint8).view(-1, 1),
        "absmax": absmax,
        "shape": shape,
        "dtype": dtype,
        "quant_type": quant_type,
        "blocksize": blocksize,
    }
    return fields if nested is None else fields | _nested_fields(name, absmax, *nested)


def _nested_fields(
    name: str, codes: Tensor, nested_absmax: Tensor, table: Tensor, offset: Tensor
) -> dict[str, Any]:
    """The fields of double quantisation.

    bitsandbytes computes its 8-bit table on each machine, and the last bit may differ. Magnitudes
    that were coded with another table are decoded with it, once, so that the values stay exact.
    """
    ours = nested_table(table.device)
    same_kind = table.dtype == ours.dtype and table.shape == ours.shape
    if not same_kind or not torch.allclose(table, ours, rtol=0, atol=_TABLE_TOLERANCE):
        raise _broken(name, "the 256 values of the dynamic 8-bit map as nested_quant_map", "others")
    offset = offset.to(torch.float32)
    if torch.equal(table, ours):
        return {"nested_absmax": nested_absmax, "nested_offset": offset}
    if codes.dtype != torch.uint8:
        raise _broken(name, "uint8 absmax", str(codes.dtype))
    return {"absmax": dequantize_absmax(codes, nested_absmax, offset, table)}
