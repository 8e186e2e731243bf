"""Live bitsandbytes weights, to and from the fields of a 4-bit weight.

bitsandbytes is imported only when a function needs it.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from fastlora_kernels.formats import (
    BLOCKSIZES,
    FORMATS,
    NESTED_BLOCKSIZE,
    code_table,
    nested_table,
)
from torch import Tensor

from fastlora.bnb_format import fields_of

if TYPE_CHECKING:
    from fastlora.quant import QuantizedWeight


def from_params(weight: Any) -> dict[str, Any]:
    """Read the fields of a 4-bit weight from a live bitsandbytes weight.

    Args:
        weight: a ``Params4bit``, or the pair (packed tensor, ``QuantState``).

    Returns:
        The arguments of a `fastlora.quant.QuantizedWeight`, sharing memory unless bitsandbytes has
        repacked the weight for its CPU kernel.

    Raises:
        TypeError: another object.
        ValueError: a weight that is not quantised yet, or of a format that is not supported.
    """
    packed, state = _live_parts(weight)
    if state.quant_type not in FORMATS or state.blocksize not in BLOCKSIZES:
        wanted = f"a quant_type of {sorted(FORMATS)} and a blocksize of {list(BLOCKSIZES)}"
        raise ValueError(
            f"a bitsandbytes weight must have {wanted}, got {state.quant_type!r} and "
            f"{state.blocksize!r}; quantise it again"
        )
    if getattr(state, "packing_format_for_cpu", False):
        packed, state = _unpack_for_cpu(packed, state)
    nested = None
    if state.nested:
        if state.state2.blocksize != NESTED_BLOCKSIZE:
            raise ValueError(
                f"double-quantised magnitudes must come in groups of {NESTED_BLOCKSIZE}, got "
                f"{state.state2.blocksize}; quantise the weight again"
            )
        nested = (state.state2.absmax, state.state2.code, state.offset)
    absmax = state.absmax if state.nested else state.absmax.float()
    common = (state.quant_type, state.blocksize, tuple(state.shape), state.dtype)
    return fields_of("of bitsandbytes", packed, absmax, state.code, *common, nested)


def _live_parts(weight: Any) -> tuple[Tensor, Any]:
    """The packed tensor and its QuantState."""
    if isinstance(weight, tuple) and len(weight) == 2:
        packed, state = weight
    else:
        packed, state = weight, getattr(weight, "quant_state", weight)
        if state is None:
            raise ValueError(
                "a bitsandbytes weight must be quantised before it is converted, but this one has "
                "no quant_state yet; move its layer to a device first, which quantises it"
            )
    if not isinstance(packed, Tensor) or not hasattr(state, "absmax"):
        raise TypeError(
            "from_bnb takes a bitsandbytes Params4bit or a pair (packed tensor, QuantState), got "
            f"{type(weight).__name__}; pass one of these, or use quantize_4bit on a dense tensor"
        )
    return packed.detach().as_subclass(Tensor), state


def _unpack_for_cpu(packed: Tensor, state: Any) -> tuple[Tensor, Any]:
    """Undo the layout of bitsandbytes' CPU kernel; returns new bytes and a copy of the state.

    Its inverse changes the state it is given and restores the bytes only. The magnitudes are read
    here, transposed and in bfloat16, as its kernel uses them.
    """
    from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

    bytes_state, state = copy.copy(state), copy.copy(state)
    bytes_state.original_nested = False
    packed, _ = _convert_weight_packed_for_cpu_inverse(packed, bytes_state)
    state.absmax = state.absmax.T.reshape(-1)
    state.dtype, state.nested, state.state2 = state.original_dtype, False, None
    return packed, state


def to_params(weight: QuantizedWeight) -> Any:
    """A 4-bit weight as a bitsandbytes parameter.

    Args:
        weight: the 4-bit weight.

    Returns:
        A frozen ``Params4bit`` that shares memory with it.

    Raises:
        ImportError: bitsandbytes is not installed.
    """
    from bitsandbytes.functional import QuantState
    from bitsandbytes.nn import Params4bit

    device = weight.packed.device
    offset = state2 = None
    if weight.nested_absmax is not None:
        offset = weight.nested_offset
        state2 = QuantState(
            absmax=weight.nested_absmax,
            code=nested_table(device).clone(),
            blocksize=NESTED_BLOCKSIZE,
            dtype=torch.float32,
        )
    state = QuantState(
        absmax=weight.absmax,
        shape=torch.Size(weight.shape),
        code=code_table(FORMATS[weight.quant_type], device).clone(),
        blocksize=weight.blocksize,
        quant_type=weight.quant_type,
        dtype=weight.dtype,
        offset=offset,
        state2=state2,
    )
    return Params4bit(
        weight.packed,
        requires_grad=False,
        quant_state=state,
        blocksize=weight.blocksize,
        compress_statistics=weight.double_quant,
        quant_type=weight.quant_type,
        quant_storage=weight.packed.dtype,
        bnb_quantized=True,
    )
