"""Convolutions and embeddings with an adapter: torch computes them, on dense frozen weights.

As for linears, `__class__` is set on the layer that is there; its parameters keep their names and
the adapter's lie beside them. A convolution's weight is a matrix (N, K) whose columns are the input
channels and the window's places, as PEFT flattens it. Where it has groups, LoRA reaches over them,
as PEFT's does: it reads all channels, so the update is that of a convolution without groups.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastlora import ops
from fastlora.adapters import METHODS, AdapterConfig, AdapterSpec, magnitude, method_of
from fastlora.adapters.lora import Lora
from fastlora.adapters.method import Factors, Method
from fastlora.adapters.product import keep_rows
from fastlora.checks import FLOATS


class OtherLayer(nn.Module):
    """What adapted convolutions and embeddings have in common.

    Attributes:
        adapter: what the adapter is.
        plain: the class that it was made from.
    """

    adapter: AdapterSpec
    plain: ClassVar[type[nn.Module]]
    weight: Tensor

    def adapter_params(self) -> dict[str, nn.Parameter]:
        """Return the adapter's parameters by name."""
        own: Any = self._parameters
        return {name: own[name] for name in self.adapter.shapes}

    def merged_weight(self) -> Tensor:
        """Return the weight with the update folded in, rounded once to its dtype."""
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        method, params = METHODS[self.adapter.method], self.adapter_params()
        with torch.no_grad():
            flat = self.weight.detach().to(wide).flatten(1)
            merged = method.merge(flat, params, self.adapter)
        return merged.view(self.weight.shape).to(self.weight.dtype)

    def extra_repr(self) -> str:
        """Return the layer's own description and the adapter."""
        spec = self.adapter
        own = super().extra_repr()
        return f"{own}, adapter={spec.label}(r={spec.r}, scaling={spec.scaling:g})"


class _Convolution(OtherLayer):
    """``conv(x, W) + bias + scaling conv(drop(x), update)``; x is (M, channels, ...)."""

    bias: Tensor | None
    groups: int
    _conv_forward: Any

    def forward(self, x: Tensor) -> Tensor:
        """Return the convolution with the adapter's update."""
        params, spec = self.adapter_params(), self.adapter
        update = self._update(x, params, spec)
        if magnitude.NAME not in params:
            y: Tensor = self._conv_forward(x, self.weight, self.bias)
            return torch.add(y, update).to(y.dtype)
        z = self._conv_forward(x, self.weight, None)
        y = (z + update) * _columns(self._scale(params, spec), z)
        return (y if self.bias is None else y + _columns(self.bias, z)).to(z.dtype)

    def merged_weight(self) -> Tensor:
        """Return the weight with the update folded in; that of all channels where it needs them."""
        if self.groups == 1 or not isinstance(METHODS[self.adapter.method], Lora):
            return super().merged_weight()
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        with torch.no_grad():
            A, B = _whole(self.adapter_params(), self.groups)
            whole = _all_channels(self.weight.detach().to(wide), self.groups)
            whole += (B.to(wide) @ A.to(wide)).view(whole.shape) * self.adapter.scaling
        return whole.to(self.weight.dtype)

    def _factors(self, params: Mapping[str, Tensor], method: Method) -> Factors | None:
        """Return A (r, K) and B (N, r) of the update, or None; K: of all groups."""
        if self.groups == 1:
            return method.factors(params)
        return _whole(params, self.groups) if isinstance(method, Lora) else None

    def _update(self, x: Tensor, params: Mapping[str, Tensor], spec: AdapterSpec) -> Tensor:
        method = METHODS[spec.method]
        factors = self._factors(params, method)
        x = functional.dropout(x, spec.dropout, training=self.training and spec.dropout > 0)
        if factors is None:
            delta = method.delta(params, spec).view(self.weight.shape)
            update: Tensor = self._conv_forward(x.to(delta.dtype), delta, None)
        else:
            A, B = factors
            parts = (self.groups, A.shape[0])  # each group's channels are multiplied on their own
            first = A.view(*parts[::-1], *self.weight.shape[1:]).transpose(0, 1).flatten(0, 1)
            s: Tensor = self._conv_forward(x.to(A.dtype), first, None)
            if self.groups > 1:
                s = s.view(s.shape[0], *parts, *s.shape[2:]).sum(1)
            update = torch.einsum("nr,mr...->mn...", B.to(s.dtype), s) * spec.scaling
        rows = keep_rows(spec, update.shape[1], update.device, self.training)
        return update if rows is None else update * _columns(rows, update)

    def _scale(self, params: Mapping[str, Tensor], spec: AdapterSpec) -> Tensor:
        """Return magnitude / norm of each row; the norm counts as a constant (arXiv:2402.09353)."""
        return ops.over_norms(params[magnitude.NAME], self.norms(params, spec))

    def norms(self, params: Mapping[str, Tensor], spec: AdapterSpec) -> Tensor:
        """Return ``||W + update||`` of each row: (N,) float32."""
        with torch.no_grad():
            delta = METHODS[spec.method].delta(params, spec)
            total = self.weight.detach().to(delta.dtype).flatten(1) + delta
            norm: Tensor = total.square().sum(1).sqrt()
            return norm


def _whole(params: Mapping[str, Tensor], groups: int) -> Factors:
    """Return LoRA's A (r, K) and B (N, r), zero where a row is not of a rank's group."""
    blocks = params["lora_B"].chunk(groups)
    return params["lora_A"], torch.block_diag(*blocks)  # type: ignore[no-untyped-call]


def _all_channels(weight: Tensor, groups: int) -> Tensor:
    """Return a weight (N, K / groups, ...) as (N, K, ...), zero where a row reads no channel."""
    channels, window = weight.shape[1], (0, 0) * (weight.dim() - 2)
    return torch.cat(
        [
            functional.pad(rows, (*window, i * channels, (groups - 1 - i) * channels))
            for i, rows in enumerate(weight.chunk(groups))
        ]
    )


def _columns(values: Tensor, like: Tensor) -> Tensor:
    """Return (N,) values in the shape that multiplies (M, N, ...)."""
    return values.view(1, -1, *[1] * (like.dim() - 2))


class AdapterConv1d(_Convolution, nn.Conv1d):
    """An nn.Conv1d with a frozen weight and an adapter."""

    plain = nn.Conv1d


class AdapterConv2d(_Convolution, nn.Conv2d):
    """An nn.Conv2d with a frozen weight and an adapter."""

    plain = nn.Conv2d


class AdapterConv3d(_Convolution, nn.Conv3d):
    """An nn.Conv3d with a frozen weight and an adapter."""

    plain = nn.Conv3d


class AdapterEmbedding(OtherLayer, nn.Embedding):
    """An nn.Embedding (V, D) with LoRA: ``W[i] + scaling B A[:, i]``, A (r, V), B (D, r)."""

    plain = nn.Embedding

    def forward(self, input: Tensor) -> Tensor:
        """Return the embeddings of indices (...), (..., D)."""
        y = nn.Embedding.forward(self, input)
        params = self.adapter_params()
        s = functional.embedding(input, params["lora_embedding_A"].T, self.padding_idx)
        update = functional.linear(s, params["lora_embedding_B"]) * self.adapter.scaling
        return torch.add(y, update).to(y.dtype)


KINDS: dict[type[nn.Module], type[OtherLayer]] = {
    kind.plain: kind for kind in (AdapterConv1d, AdapterConv2d, AdapterConv3d, AdapterEmbedding)
}
"""Layers that can have an adapter beside linears -> what they become."""


def can_adapt(module: nn.Module) -> bool:
    """Return whether a module is, or was before its patch, such a layer."""
    return type(module) in KINDS or isinstance(module, OtherLayer)


def spec_of(config: AdapterConfig, name: str, module: nn.Module) -> AdapterSpec:
    """Return what the adapter of such a layer is.

    Raises:
        NotImplementedError: the method has none for this kind of layer.
        ValueError: the weight has not finite values, is tied or not dense.
    """
    method = method_of(config)
    if isinstance(module, nn.Embedding):
        _check_embedding(name, module)
        spec = method.embedding_spec(config, name, module.num_embeddings, module.embedding_dim)
    else:
        assert isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
        spec = _convolution_spec(method, config, name, module)
    weight = module.weight
    n, k = weight.shape[0], math.prod(weight.shape[1:])
    if isinstance(method, Lora):
        k *= getattr(module, "groups", 1)  # its update reads the channels of all
    if method.bounded and spec.r > min(n, k):
        raise ValueError(
            f"the rank of {name!r} must be at most {min(n, k)}, the smaller side of its {n} x {k}"
            f" weight, got {spec.r}; lower r or set rank_pattern"
        )
    if weight.dtype not in FLOATS or weight.is_meta or not bool(torch.isfinite(weight).all()):
        raise ValueError(
            f"the weight of {name!r} must hold finite floating values, but it does not; load the"
            " model in float32, bfloat16 or float16"
        )
    return spec


def _convolution_spec(
    method: Method, config: Any, name: str, module: nn.Conv1d | nn.Conv2d | nn.Conv3d
) -> AdapterSpec:
    n, kernel, groups = module.out_channels, tuple(module.kernel_size), module.groups
    if groups > 1 and isinstance(method, Lora):
        return method.grouped_spec(config, name, n, module.in_channels, kernel, groups)
    return method.spec(config, name, n, module.in_channels // groups, kernel)


def _check_embedding(name: str, module: nn.Embedding) -> None:
    if module.max_norm is not None or module.sparse or module.scale_grad_by_freq:
        raise NotImplementedError(
            f"an embedding must have no max_norm, sparse or scale_grad_by_freq to get an adapter,"
            f" but {name!r} has; exclude it"
        )


def to_other_layer(module: Any, spec: AdapterSpec, params: Mapping[str, Tensor]) -> None:
    """Turn a convolution or an embedding into one with an adapter, in place.

    Args:
        module: checked by `spec_of`.
        spec: its adapter.
        params: the adapter's first values by name.
    """
    module.__class__ = KINDS[type(module)]
    module.adapter = spec
    module.weight.requires_grad_(False)
    wide = torch.promote_types(module.weight.dtype, torch.float32)
    for name, value in params.items():
        module.register_parameter(name, nn.Parameter(value.to(module.weight.device, wide)))
    if magnitude.NAME in spec.shapes:
        with torch.no_grad():
            own = module.adapter_params()
            own[magnitude.NAME].copy_(module.norms(own, spec))


def to_plain(module: OtherLayer, weight: Tensor) -> None:
    """Turn such a layer back into a plain one with this weight, in place.

    A convolution whose weight has come to read all channels has no groups any more.
    """
    for name in module.adapter_params():
        delattr(module, name)
    kind = module.plain
    del module.adapter
    if isinstance(module, _Convolution) and module.weight.shape != weight.shape:
        module.groups = 1
    if module.weight is not weight:
        module.weight = nn.Parameter(weight, requires_grad=False)
    module.__class__ = kind  # type: ignore[assignment]
