"""Fused experts of transformers, with LoRA and 4-bit weights: what `patch_model` makes of them.

transformers keeps the weights of all experts of a layer in one 3-D parameter, and its experts
modules say of themselves how they are built (`use_experts_implementation`): with a gate or without,
with biases, transposed. That is all that this file reads: no model is known by name. `__class__` is
set on the module that is there; its parameters keep their names, the adapter's lie beside them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from fastlora_kernels.experts import ExpertsUpdate
from fastlora_kernels.formats import StoredWeight
from torch import Tensor, nn

from fastlora import ops
from fastlora.adapters import AdapterSpec
from fastlora.grouped import combine_rows, dispatch_rows, route
from fastlora.layers import QuantState
from fastlora.quant import QuantConfig
from fastlora.quant_experts import PARTS, QuantizedExperts, quantize_experts

Shape = tuple[int, int, int]
STATE = "fastlora_experts"


@dataclass
class ExpertsState:
    """What such a module is beside its tensors.

    Attributes:
        shapes: parameter -> (E, N, K), whatever way it is stored.
        specs: parameter -> its adapter, or None.
        backend: "auto", or the name of the backend that runs it.
        quant: how 4-bit weights are stored; None: they are dense.
        dtype: dtype of the weights that the module was made from, and that packed ones decode to.
    """

    shapes: dict[str, Shape]
    specs: dict[str, AdapterSpec | None]
    backend: str
    quant: QuantState | None
    dtype: torch.dtype


class AdapterExperts(nn.Module):
    """Mixed into the class of an experts module, before it.

    Attributes:
        plain: the class that it was made from.
    """

    plain: ClassVar[type[nn.Module]]
    fastlora_experts: ExpertsState

    def forward(
        self,
        hidden_states: Tensor,
        top_k_index: Tensor | None = None,
        top_k_weights: Tensor | None = None,
        **names: Tensor,
    ) -> Tensor:
        """Return the weighted sum of each row's experts.

        Args:
            hidden_states: (M, H).
            top_k_index: (M, k), the experts of each row.
            top_k_weights: (M, k), their weights.
            names: the same two by the names `router_indices` and `routing_weights`.
        """
        module: Any = self
        index = names["router_indices"] if top_k_index is None else top_k_index
        weights = names["routing_weights"] if top_k_weights is None else top_k_weights
        up, down = projections(self)
        count = self.fastlora_experts.shapes[up][0]
        to = route(index, count)
        h = self.project(up, dispatch_rows(hidden_states, to), to.ends)
        h = module._apply_gate(h) if getattr(module, "has_gate", True) else module.act_fn(h)
        y = self.project(down, h, to.ends)
        if getattr(module, "has_post_expert_norm", False):
            y = module.post_expert_norm(y)
        weights = weights.masked_fill(index >= count, 0)
        return combine_rows(y, to, weights).to(hidden_states.dtype)

    def project(self, name: str, x: Tensor, ends: Tensor) -> Tensor:
        """Return the linear `name` of each expert's rows: x (S, K) -> (S, N)."""
        module: Any = self
        state, own = self.fastlora_experts, module._parameters
        spec, bias = state.specs[name], own.get(f"{name}_bias")
        update = None
        if spec is not None:
            A, B = own[f"{name}_lora_A"], own[f"{name}_lora_B"]
            update = ExpertsUpdate(A, B, spec.scaling)
        bias = bias if module.has_bias else None
        return ops.experts_linear(x, self.stored(name), bias, update, ends, state.backend)

    def stored(self, name: str) -> StoredWeight:
        """Return the weights of a parameter as kernels read them, sharing memory."""
        data, quant = cast(Tensor, self._parameters[name]), self.fastlora_experts.quant
        if quant is None:
            transposed = bool(cast(Any, self).is_transposed)
            data = data.transpose(1, 2) if transposed else data
            return StoredWeight(data, None, None, None, "dense", 0)
        absmax, nested, offset = (self._buffers[f"{name}_{part}"] for part in PARTS[1:])
        assert absmax is not None
        if nested is None or offset is None:
            absmax = absmax.view(torch.float32)
            return StoredWeight(data, absmax, None, None, quant.quant_type, quant.blocksize)
        nested = nested.view(torch.float32)
        offset = offset.view(torch.float32).view(-1)
        return StoredWeight(data, absmax, nested, offset, quant.quant_type, quant.blocksize)

    def quantized(self, name: str) -> QuantizedExperts:
        """Return the 4-bit weights of a parameter, sharing memory."""
        stored, state = self.stored(name), self.fastlora_experts
        assert stored.absmax is not None
        kind = (state.shapes[name], state.dtype, stored.format, stored.blocksize)
        nested = (stored.nested_absmax, stored.nested_offset)
        return QuantizedExperts(stored.data.detach(), stored.absmax, *kind, *nested)

    def adapter_params(self, name: str) -> dict[str, nn.Parameter]:
        """Return the adapter's parameters of a weight, lora_A (E, r, K) and lora_B (E, N, r)."""
        if self.fastlora_experts.specs[name] is None:
            return {}
        own: Any = self._parameters
        return {part: own[f"{name}_{part}"] for part in ("lora_A", "lora_B")}

    def original_dtype(self) -> torch.dtype:
        """Return the dtype of the weights, or that they had before they became 4-bit."""
        state = self.fastlora_experts
        own = cast(Tensor, self._parameters[next(iter(state.shapes))])
        return own.dtype if state.quant is None else state.dtype

    def merged_weight(self, name: str) -> Tensor:
        """Return ``W + update`` (E, N, K) in the first dtype, added in float32 expert by expert."""
        state, dtype = self.fastlora_experts, self.original_dtype()
        wide = torch.promote_types(dtype, torch.float32)
        spec, params = state.specs[name], self.adapter_params(name)
        packed = None if state.quant is None else self.quantized(name)
        dense = self.stored(name).data.detach()
        device = cast(Tensor, self._parameters[name]).device
        out = torch.empty(state.shapes[name], dtype=dtype, device=device)
        for index in range(out.shape[0]):
            own = dense[index] if packed is None else packed[index].dequantize(wide)
            if spec is not None:
                A, B = params["lora_A"][index].to(wide), params["lora_B"][index].to(wide)
                own = own.to(wide) + (B.detach() @ A.detach()) * spec.scaling
            out[index] = own
        return out

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle and copy by the class that it was made from."""
        return _blank, (self.plain,), self.__dict__

    def extra_repr(self) -> str:
        """Return what the adapters are, and how the weights are stored."""
        state = self.fastlora_experts
        labels = {n: "none" if s is None else f"{s.label}(r={s.r})" for n, s in state.specs.items()}
        kind = "dense" if state.quant is None else state.quant.quant_type
        return f"{super().extra_repr()}adapters={labels}, format={kind}, backend={state.backend}"


_CLASSES: dict[type[nn.Module], type[AdapterExperts]] = {}


def adapted_class(plain: type[nn.Module]) -> type[AdapterExperts]:
    """Return the subclass of an experts class that has adapters and 4-bit weights."""
    if plain not in _CLASSES:
        body = {"plain": plain, "__module__": plain.__module__, "__doc__": plain.__doc__}
        _CLASSES[plain] = type(f"Adapter{plain.__name__}", (AdapterExperts, plain), body)
    return _CLASSES[plain]


def _blank(plain: type[nn.Module]) -> AdapterExperts:
    cls = adapted_class(plain)
    return cls.__new__(cls)


def projections(module: nn.Module) -> tuple[str, str]:
    """Return the names of the two weights of an experts module."""
    return "gate_up_proj" if getattr(module, "has_gate", True) else "up_proj", "down_proj"


def refusal(module: nn.Module) -> str | None:
    """Return why a module is no experts module that can be adapted, or None."""
    if isinstance(module, AdapterExperts):
        return None
    described = all(hasattr(module, n) for n in ("is_transposed", "has_bias", "num_experts"))
    if not described or not hasattr(type(module).forward, "__wrapped__"):
        return (
            f"a {type(module).__name__} does not use transformers' experts interface, so that what"
            " it computes is not known"
        )
    if "forward" in vars(module):
        return "it has a forward of its own, perhaps from a hook of accelerate"
    if getattr(module, "_is_expert_parallel", False):
        return "its experts are spread over several devices"
    own: Any = module._parameters
    for name in projections(module):
        weight = own.get(name)
        if weight is None or weight.dim() != 3 or weight.shape[0] != module.num_experts:
            return f"it has no {name} of {module.num_experts} stacked matrices"
    return None


def shape_of(module: Any, name: str) -> Shape:
    """Return (E, N, K) of a weight of an experts module, adapted or not."""
    if isinstance(module, AdapterExperts):
        return module.fastlora_experts.shapes[name]
    e, n, k = module._parameters[name].shape
    return (e, k, n) if module.is_transposed else (e, n, k)


def to_experts(
    module: Any,
    specs: Mapping[str, AdapterSpec | None],
    params: Mapping[str, Mapping[str, Tensor]],
    quant: QuantConfig | None,
    backend: str,
) -> None:
    """Turn an experts module into one with adapters and 4-bit weights, in place.

    Args:
        module: one that `refusal` has nothing against; one without adapters keeps its weights.
        specs: weight -> its adapter; those without one may be left out.
        params: weight -> the adapter's first values.
        quant: how to store the weights in 4 bits; None keeps them dense.
        backend: "auto" or the name of a backend.
    """
    names = projections(module)
    if not isinstance(module, AdapterExperts):
        begin(module, backend)
        for name in names:
            weight = matrices(module, name)
            if quant is None:
                _lay_out(module, name, weight)
            else:
                kind = (quant.quant_type, quant.blocksize, quant.double_quant)
                set_quantized(module, name, quantize_experts(weight, *kind))
    state: ExpertsState = module.fastlora_experts
    state.backend = backend
    wide = torch.promote_types(state.dtype, torch.float32)
    for name in names:
        state.specs[name] = specs.get(name)
        for part, value in params.get(name, {}).items():
            device = module._parameters[name].device
            module.register_parameter(f"{name}_{part}", nn.Parameter(value.to(device, wide)))


def begin(module: Any, backend: str) -> None:
    """Give an experts module its new class and its state; its weights stay as they are."""
    names = projections(module)
    shapes = {name: shape_of(module, name) for name in names}
    dtype = module._parameters[names[0]].dtype
    state = ExpertsState(shapes, dict.fromkeys(names), backend, None, dtype)
    setattr(module, STATE, state)
    module.__class__ = adapted_class(type(module))
    for name in names:
        module._parameters[name].requires_grad_(False)


def matrices(module: Any, name: str) -> Tensor:
    """Return the dense weights of a parameter as (E, N, K), sharing memory."""
    weight: Tensor = module._parameters[name].detach()
    return weight.transpose(1, 2) if module.is_transposed else weight


def set_quantized(module: Any, name: str, weight: QuantizedExperts) -> None:
    """Put 4-bit weights in the place of a parameter; magnitudes are kept as raw bytes."""
    module._parameters[name] = nn.Parameter(weight.packed, requires_grad=False)
    for part in PARTS[1:]:
        values = getattr(weight, part)
        if values is not None:
            rows = values.reshape(values.shape[0], -1)
            values = rows.contiguous().view(torch.uint8)
        module.register_buffer(f"{name}_{part}", values)
    module.fastlora_experts.quant = QuantState(weight.quant_type, weight.blocksize, weight.dtype)


def _lay_out(module: Any, name: str, weight: Tensor) -> None:
    """Store a parameter so that each expert's (N, K) matrix is contiguous.

    The shape and the values of a transposed one stay as they are; its strides change.
    """
    if not weight.is_contiguous():
        laid = weight.contiguous()
        laid = laid.transpose(1, 2) if module.is_transposed else laid
        module._parameters[name] = nn.Parameter(laid, requires_grad=False)


def to_plain_experts(module: Any, merged: bool) -> None:
    """Turn such a module back into a plain one, with the updates folded in or left out."""
    state: ExpertsState = module.fastlora_experts
    for name in projections(module):
        adapter = module.adapter_params(name)
        if state.quant is not None or (merged and adapter):
            weight = module.merged_weight(name) if merged else module.quantized(name).dequantize()
        else:
            weight = module.stored(name).data.detach()
        weight = weight.transpose(1, 2) if module.is_transposed else weight
        if weight.data_ptr() != module._parameters[name].data_ptr() or not weight.is_contiguous():
            module._parameters[name] = nn.Parameter(weight.contiguous(), requires_grad=False)
        for part in adapter:
            delattr(module, f"{name}_{part}")
        for part in PARTS[1:] if state.quant is not None else ():
            delattr(module, f"{name}_{part}")
    plain = module.plain
    delattr(module, STATE)
    module.__class__ = plain


def hidden_values(module: AdapterExperts) -> int:
    """Return how many values 4-bit weights hold beyond their bytes."""
    state = module.fastlora_experts
    if state.quant is None:
        return 0
    bytes_of = (cast(Tensor, module._parameters[name]).numel() for name in state.shapes)
    return sum(math.prod(shape) for shape in state.shapes.values()) - sum(bytes_of)
