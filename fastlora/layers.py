"""The modules that `patch_model` swaps in, by setting the `__class__` of an nn.Linear.

An `AdapterLinear` has a dense weight and an adapter. A `QuantizedLinear` has a 4-bit weight and,
possibly, an adapter. Both keep the names `weight` and `bias`; the adapter's parameters lie beside
them. All state is plain tensors and plain Python, so copies, pickles and `.to()` work as usual.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
from fastlora_kernels.formats import StoredWeight
from torch import Tensor, nn

from fastlora.adapters import METHODS, AdapterSpec, Base, Cache, Call
from fastlora.linears import by_outputs, conv1d_class, is_conv1d, lay_by_outputs, sizes
from fastlora.quant import QuantConfig, QuantizedWeight, quantize_4bit

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True)
class QuantState:
    """What a 4-bit weight is beside its tensors; see `fastlora.QuantizedWeight`."""

    quant_type: str
    blocksize: int
    dtype: torch.dtype


class Group(Protocol):
    """Linears that are fed the same tensor."""

    def take(self, member: AdapterLinear, x: Tensor) -> Tensor | None:
        """Return a member's output for x, computed with the others; None: compute it alone."""


class AdapterLinear(nn.Linear):
    """An nn.Linear with a frozen dense weight (N, K) and an adapter.

    Attributes:
        adapter: what the adapter is; None: no adapter.
        backend: "auto", or the name of the backend that runs it.
        cache: what the layer remembers between calls.
        group: the linears that it is computed with, or None; see `fastlora.fuse_groups`.
        fan_in_fan_out: whether it was a Conv1D of transformers; a dense `weight` is (K, N) then.
    """

    adapter: AdapterSpec | None
    backend: str
    cache: Cache
    group: Group | None = None
    fan_in_fan_out: bool = False

    def stored_weight(self) -> StoredWeight:
        """Return the weight as kernels read it, sharing memory."""
        weight = self.weight.t() if self.fan_in_fan_out else self.weight
        return StoredWeight(weight, None, None, None, "dense", 0)

    def adapter_params(self) -> dict[str, nn.Parameter]:
        """Return the adapter's parameters by name; none without an adapter."""
        if self.adapter is None:
            return {}
        own: Any = self._parameters  # several times faster than attributes, per call
        return {name: own[name] for name in self.adapter.shapes}

    def base(self) -> Base:
        """Return the linear without its adapter."""
        return Base(self.stored_weight(), self.bias, self.backend, self.cache)

    def call(self, x: Tensor, base: Base) -> Call:
        """Return what is to be computed for x (..., K)."""
        spec = self.adapter
        if spec is None:
            return Call(x, base.bias, None, None)
        return METHODS[spec.method].call(x, base, self.adapter_params(), spec, self.training)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x W^T + bias`` with the adapter's update; x is (..., K)."""
        if self.group is not None:
            shared = self.group.take(self, x)
            if shared is not None:
                return shared
        return self.alone(x)

    def alone(self, x: Tensor) -> Tensor:
        """Return the output without regard to a group."""
        base = self.base()
        return self.call(x, base).run(base)

    def train(self, mode: bool = True) -> Self:
        """Set the mode, as every module does, and forget what was remembered."""
        self.cache.drop()
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self.cache.drop()
        return cast("Self", super()._apply(fn, recurse))  # type: ignore[no-untyped-call]

    def dense_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return the base weight (N, K), without the adapter."""
        weight = self.weight.detach().to(dtype or self.weight.dtype)
        return weight.t() if self.fan_in_fan_out else weight

    def original_dtype(self) -> torch.dtype:
        """Return the dtype of the weight that the layer was made from."""
        return self.weight.dtype

    def merged_weight(self) -> Tensor:
        """Return ``W + update`` (N, K), added in float32 and rounded once to the first dtype."""
        dtype = self.original_dtype()
        if self.adapter is None:
            return self.dense_weight(dtype)
        method, wide = METHODS[self.adapter.method], torch.promote_types(dtype, torch.float32)
        with torch.no_grad():
            weight = self.dense_weight(wide)
            return method.merge(weight, self.adapter_params(), self.adapter).to(dtype)

    def extra_repr(self) -> str:
        """Return the shape, the adapter and the backend."""
        spec = self.adapter
        method = "none" if spec is None else f"{spec.label}(r={spec.r}, scaling={spec.scaling:g})"
        return f"{super().extra_repr()}, adapter={method}, backend={self.backend}"


class QuantizedLinear(AdapterLinear):
    """A linear with a 4-bit weight and, possibly, an adapter.

    `weight` is the packed bytes, a frozen uint8 parameter. The magnitudes are kept as raw bytes,
    uint8 buffers too, so that no change of the model's dtype alters them. The state dict holds
    the tensors that bitsandbytes writes: `weight`, `weight.absmax`, `weight.quant_map` and so on.

    Attributes:
        compute: "auto", or "fp8" for a base product with operands in 8 bits.
    """

    quant: QuantState
    compute: str = "auto"
    weight_absmax: Tensor
    weight_nested_absmax: Tensor | None
    weight_nested_offset: Tensor | None

    def stored_weight(self) -> StoredWeight:
        """Return the weight as kernels read it, sharing memory."""
        own: Any = self._buffers  # several times faster than attributes, per call
        absmax, nested, quant = own["weight_absmax"], own["weight_nested_absmax"], self.quant
        offset = None
        if nested is None:
            absmax = absmax.view(torch.float32)
        else:
            nested = nested.view(torch.float32)
            offset = own["weight_nested_offset"].view(torch.float32)
        data, kind = cast(Tensor, self._parameters["weight"]), (quant.quant_type, quant.blocksize)
        return StoredWeight(data, absmax, nested, offset, *kind, self.compute)

    def quantized_weight(self) -> QuantizedWeight:
        """Return the 4-bit weight, sharing memory."""
        stored, quant = self.stored_weight(), self.quant
        shape = (self.out_features, self.in_features)
        kind = (quant.dtype, quant.quant_type, quant.blocksize)
        packed = self.weight.detach().view(-1, 1)
        return QuantizedWeight(
            packed, _given(stored.absmax), shape, *kind, stored.nested_absmax, stored.nested_offset
        )

    def set_quantized(self, weight: QuantizedWeight) -> None:
        """Take the tensors of `weight`, sharing memory; a packed weight of this size is kept."""
        data = weight.stored().data
        if self.weight.dtype == torch.uint8 and self.weight.shape == data.shape:
            with torch.no_grad():
                self.weight.copy_(data)
        else:
            self.weight = nn.Parameter(data, requires_grad=False)
        device = self.weight.device
        for name in ("absmax", "nested_absmax", "nested_offset"):
            part = getattr(weight, name)
            buffer = None if part is None else _bytes(part, device)
            self.register_buffer(f"weight_{name}", buffer, persistent=False)
        self.quant = QuantState(weight.quant_type, weight.blocksize, weight.dtype)

    def dense_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return the decoded base weight (N, K), without the adapter."""
        return self.quantized_weight().dequantize(dtype)

    def original_dtype(self) -> torch.dtype:
        """Return the dtype of the weight that was quantised."""
        return self.quant.dtype

    def extra_repr(self) -> str:
        """Return the shape, the format, the adapter and the backend."""
        double = self.weight_nested_absmax is not None
        kind = f"{self.quant.quant_type}, blocksize={self.quant.blocksize}, double_quant={double}"
        compute = "" if self.compute == "auto" else f", compute={self.compute}"
        return f"{super().extra_repr()}, {kind}{compute}"

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.update(self.quantized_weight().state_dict(f"{prefix}weight"))

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Load strictly: the 4-bit tensors are taken together or not at all."""
        key = f"{prefix}weight"
        own = {k: v for k, v in state_dict.items() if k == key or k.startswith(f"{key}.")}
        rest = {k: v for k, v in state_dict.items() if k not in own}
        rest[key] = self.weight.detach()
        super()._load_from_state_dict(
            rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if not own:
            if strict:
                missing_keys.append(key)
            return
        shape = (self.out_features, self.in_features)
        try:
            weight = QuantizedWeight.from_state_dict(own, key)
            if weight.shape != shape:
                raise ValueError(f"{key!r} must have shape {shape}, got {weight.shape}")
        except ValueError as error:
            error_msgs.append(str(error))
            return
        self.set_quantized(weight)


def _bytes(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.detach().to(device).contiguous().view(-1).view(torch.uint8)


def _given(tensor: Tensor | None) -> Tensor:
    if tensor is None:
        raise ValueError("a 4-bit weight must have its absmax, got None")
    return tensor


def to_adapter_linear(
    linear: nn.Module,
    spec: AdapterSpec | None,
    params: Mapping[str, Tensor],
    quant: QuantConfig | None,
    backend: str,
    compute: str = "auto",
) -> None:
    """Turn a linear into one of these modules, in place.

    Args:
        linear: exactly an nn.Linear or a Conv1D of transformers, checked by the caller, or one of
            these without an adapter, whose weight is kept as it is.
        spec: its adapter, or None.
        params: the adapter's first values by name; they get the weight's device.
        quant: how to store the weight in 4 bits; None keeps it dense.
        backend: "auto" or the name of a backend.
        compute: "fp8", for a 4-bit weight: multiply in 8 bits from now on.
    """
    module: Any = linear
    dense = by_outputs(linear).detach()
    wide = torch.float32 if quant or dense.dtype.itemsize < 4 else dense.dtype
    if isinstance(linear, AdapterLinear):
        quant = None
    else:
        to_class(linear, AdapterLinear if quant is None else QuantizedLinear)
    module.adapter, module.backend, module.cache = spec, backend, Cache()
    module.weight.requires_grad_(False)
    if compute != "auto" and isinstance(module, QuantizedLinear):
        module.compute = compute
    if quant is not None:
        module.set_quantized(
            quantize_4bit(dense, quant.quant_type, quant.blocksize, quant.double_quant)
        )
    for name, value in params.items():
        module.register_parameter(name, nn.Parameter(value.to(dense.device, wide)))
    if spec is not None:
        params, dtype = module.adapter_params(), module.original_dtype()
        METHODS[spec.method].settle(module.base(), params, spec, dtype)


def to_class(linear: Any, kind: type[AdapterLinear]) -> None:
    """Give a linear the class of a swapped one; a dense weight of a Conv1D is laid out by rows."""
    if is_conv1d(linear):
        linear.out_features, linear.in_features = sizes(linear)
        linear.fan_in_fan_out = True
        if kind is AdapterLinear:
            lay_by_outputs(linear)
    linear.__class__ = kind


def to_linear(module: AdapterLinear, weight: Tensor | None) -> None:
    """Turn a swapped module back into what it was, with this weight (N, K); None: its own."""
    for name in module.adapter_params():
        delattr(module, name)
    if isinstance(module, QuantizedLinear):
        del module.weight_absmax, module.weight_nested_absmax, module.weight_nested_offset
        del module.quant
        vars(module).pop("compute", None)
    del module.adapter, module.backend, module.cache
    vars(module).pop("group", None)
    plain: Any = nn.Linear
    if module.fan_in_fan_out:
        del module.fan_in_fan_out, module.out_features, module.in_features
        plain, weight = conv1d_class(), _turned(weight)
    if weight is not None:
        module.weight = nn.Parameter(weight, requires_grad=False)
    module.weight.data = module.weight.data.contiguous()
    module.__class__ = plain


def _turned(weight: Tensor | None) -> Tensor | None:
    return None if weight is None else weight.t()
