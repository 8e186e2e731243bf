"""bitsandbytes' 4-bit linear, run by fastlora's kernels on the same packed bytes."""

from __future__ import annotations

from typing import Any, ClassVar

import bitsandbytes as bnb
import torch
from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse, dequantize_4bit
from fastlora_kernels.formats import BLOCKSIZES, FORMATS, StoredWeight
from torch import Tensor, nn

from fastlora import ops
from fastlora.dispatch import Problem, pick
from fastlora.in_place import META, Accelerated, Swap, one_device, refusal
from fastlora.integrations.versions import check_version
from fastlora.linears import sizes
from fastlora.ops.library import activation_dtype, is_transformed
from fastlora.quant import QuantizedWeight

BATCH = 512
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def quant_state(module: Any) -> Any:
    """Return the quant state of a 4-bit linear, or None before it is quantised."""
    state = getattr(module._parameters["weight"], "quant_state", None)
    return getattr(module, "quant_state", None) if state is None else state


def stored(module: Any) -> StoredWeight:
    """Return the weight (N, K) as kernels read it, sharing memory; it is remembered."""
    state = quant_state(module)
    if torch.compiler.is_compiling():
        return _traced(module, state)
    weight = module._parameters["weight"]

    def read() -> StoredWeight:
        packed = weight.detach().as_subclass(Tensor)
        found = QuantizedWeight.from_bnb((packed, state)).stored()
        return found._replace(compute=module.fastlora_state.compute)

    cache = module.fastlora_state.cache
    kept: StoredWeight = cache.views("stored", (weight, state), weight.data_ptr(), read)
    return kept


def _traced(module: Any, state: Any) -> StoredWeight:
    """Return the same for a graph, which reads it at each call; `why_not` has checked its tables.

    Of a double-quantised weight whose 8-bit table differs from ours in the last bit, so do values.
    """
    n, k = state.shape
    data = module.weight.detach().view(torch.uint8).reshape((n, k // 2) if k % 2 == 0 else (-1, 1))
    kind = (state.quant_type, state.blocksize, module.fastlora_state.compute)
    if state.nested:
        return StoredWeight(data, state.absmax, state.state2.absmax, state.offset.float(), *kind)
    return StoredWeight(data, state.absmax.float(), None, None, *kind)


def input_of(module: Any, x: Tensor) -> Tensor:
    """Return x in the dtype that the layer computes in, which bitsandbytes may choose by x."""
    if not module.compute_type_is_set:
        module.set_compute_type(x)
        module.compute_type_is_set = True
    return x if module.compute_dtype is None else x.to(module.compute_dtype)


def bias_of(module: Any, x: Tensor) -> Tensor | None:
    """Return the bias in a dtype that kernels take with x; bitsandbytes casts it to x's too."""
    bias: Tensor | None = module.bias
    if bias is None or bias.dtype == torch.float32:
        return bias
    return bias.to(activation_dtype(x))


def computes(module: Any, x: Tensor) -> bool:
    """Return whether kernels take x as this layer would compute it."""
    state = quant_state(module)
    if is_transformed() or (torch.compiler.is_compiling() and _is_repacked(state)):
        return False
    wanted = module.compute_dtype if module.compute_type_is_set else x.dtype
    return state is not None and (wanted or x.dtype) in FLOATS


def _is_repacked(state: Any) -> bool:
    return bool(getattr(state, "packing_format_for_cpu", False))


class Linear4bit(Accelerated, bnb.nn.Linear4bit):  # type: ignore[misc]
    """A 4-bit linear of bitsandbytes; PEFT knows it by this name too."""

    plain: ClassVar[type[nn.Module]] = bnb.nn.Linear4bit

    def prepare(self) -> None:
        """Undo the layout of bitsandbytes' own CPU kernel, as bitsandbytes does in training."""
        state = quant_state(self)
        if _is_repacked(state):
            data, state = _convert_weight_packed_for_cpu_inverse(self.weight.data, state)
            if not state.nested:  # of which bitsandbytes restores the bytes alone
                state.absmax = state.absmax.T.reshape(-1).float()
            weight: Any = self.weight
            weight.data, weight.quant_state = data, state
            self.quant_state = state

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x W^T + bias``; x is (..., K)."""
        if not computes(self, x):
            if is_transformed() and quant_state(self) is not None:
                return self._by_torch(x)
            other: Tensor = super().forward(x)
            return other
        rows, backend = input_of(self, x), self.fastlora_state.backend
        return ops.linear(rows, stored(self), bias_of(self, rows), None, backend).to(x.dtype)

    def _by_torch(self, x: Tensor) -> Tensor:
        """Return the same by torch's operations, which its transforms see, on a dense weight."""
        rows = input_of(self, x)
        with torch._C._DisableFuncTorch(), torch.no_grad():
            weight = dequantize_4bit(self.weight.data, quant_state(self))
        bias = bias_of(self, rows)
        bias = None if bias is None else bias.to(rows.dtype)
        return nn.functional.linear(rows, weight.to(rows.dtype), bias).to(x.dtype)

    def problem(self) -> Problem:
        """Return a training batch of this layer."""
        return problem(self, 0, None, self.fastlora_state.compute)

    def hidden(self) -> int:
        """Return how many values the weight holds beyond its bytes."""
        n, k = quant_state(self).shape
        packed = self._parameters["weight"]
        return 0 if packed is None else int(n * k - packed.numel())

    def packed(self) -> StoredWeight:
        """Return the 4-bit weight."""
        return stored(self)

    def describe(self) -> dict[str, Any]:
        """Return the report's columns."""
        return {"method": None, "r": None, "scaling": None, **weight_columns(self)}


def weight_columns(module: Any) -> dict[str, Any]:
    """Return the report's columns of a linear's weight: format, shape and bytes."""
    state = quant_state(module) if isinstance(module, bnb.nn.Linear4bit) else None
    nbytes = sum(p.nbytes for p in module.parameters(recurse=False))
    if state is None:
        return {"format": "dense", "shape": sizes(module), "bytes": nbytes}
    parts = [state.absmax, getattr(state.state2, "absmax", None)]
    nbytes += sum(t.nbytes for t in parts if t is not None)
    return {"format": state.quant_type, "shape": tuple(state.shape), "bytes": nbytes}


def problem(module: Any, r: int, adapter: torch.dtype | None, compute: str = "auto") -> Problem:
    """Return the problem of a training batch on a 4-bit or dense linear."""
    if isinstance(module, bnb.nn.Linear4bit):
        state, dtype = quant_state(module), module.compute_dtype or quant_state(module).dtype
        (n, k), kind = state.shape, (state.quant_type, state.blocksize)
    else:
        (n, k), dtype, kind = sizes(module), module.weight.dtype, ("dense", 0)
        compute = "auto"
    device = module.weight.device.type
    return Problem("lora_linear", device, dtype, *kind, BATCH, n, k, r, adapter, compute)


def why_not(name: str, module: Any, backend: str, compute: str) -> str | None:
    """Return why a 4-bit linear can't be accelerated, or None.

    Raises:
        NotImplementedError: no backend computes it in 8 bits, which was asked for.
    """
    state = quant_state(module)
    if state is None:
        return "not quantised yet: move the model to its device first"
    if state.quant_type not in FORMATS or state.blocksize not in BLOCKSIZES:
        return f"stored as {state.quant_type} in blocks of {state.blocksize}"
    if len(state.shape) != 2:
        return f"a weight of {len(state.shape)} dimensions"
    if module.weight.is_meta:
        return META
    one_device(name, [module.weight, state.absmax, *_biases(module)])
    reason = None if _is_repacked(state) else _broken(module, state)
    if reason is not None:
        return reason
    if compute != "auto":
        pick(problem(module, 0, None, compute), backend)
    return refusal(problem(module, 0, None), backend)


def _broken(module: Any, state: Any) -> str | None:
    """Return what is wrong with the tables of a 4-bit weight, or None."""
    try:
        QuantizedWeight.from_bnb((module.weight, state))
    except ValueError as error:
        return str(error)
    return None


def _biases(module: Any) -> list[Tensor]:
    return [] if module.bias is None else [module.bias]


def plan(name: str, module: nn.Module, backend: str, compute: str) -> Swap | str | None:
    """Return what becomes of a layer of bitsandbytes, or why nothing does; None: it is no layer."""
    if type(module) is not bnb.nn.Linear4bit:
        if isinstance(module, (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt)):
            return f"bitsandbytes' {type(module).__name__} is left to bitsandbytes"
        return None
    check_version("bitsandbytes")
    reason = why_not(name, module, backend, compute)
    if reason is not None:
        return reason
    repacked = _is_repacked(quant_state(module))
    return Swap(Linear4bit, "repacked from bitsandbytes' CPU layout" if repacked else "")
