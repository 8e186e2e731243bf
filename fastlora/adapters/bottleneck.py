"""Bottleneck adapters: ``y <- y + scaling (act(y D^T + d) U^T + u)`` on a linear's output y.

They stand after the linears that end a sub-layer: the output projections of attention and of the
feed-forward part. Source: Houlsby et al. 2019, arXiv:1902.00751; Pfeiffer et al. 2020,
arXiv:2005.00247.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from fastlora.adapters.base import AdapterConfig, check_alpha, check_dropout
from fastlora.adapters.call import Base, Call
from fastlora.adapters.method import AdapterSpec, Method, uniform

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "relu": functional.relu,
    "gelu": functional.gelu,
    "silu": functional.silu,
    "tanh": torch.tanh,
}
_NO_MERGE = (
    "a bottleneck adapter can't be merged into a weight, because there is a non-linearity in it;"
    " keep it beside the model with save_adapter"
)


@dataclass(frozen=True, kw_only=True)
class BottleneckConfig(AdapterConfig):
    """How to put bottleneck adapters after linears.

    Attributes:
        r: width of the bottleneck.
        scaling: factor of what is added.
        non_linearity: "relu", "gelu", "silu" or "tanh".
        dropout: probability with which an element of the bottleneck is dropped in training.

    Raises:
        TypeError: a field has the wrong type.
        ValueError: a field has a value out of range, or a pattern is not safe.
    """

    peft_type: ClassVar[str] = "BOTTLENECK"  # PEFT itself has no such method
    alpha_field: ClassVar[str] = "scaling"

    r: int = 64
    scaling: float = 1.0
    non_linearity: str = "relu"
    dropout: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_alpha("scaling", self.scaling)
        check_dropout("dropout", self.dropout)
        if self.non_linearity not in ACTIVATIONS:
            raise ValueError(
                f"non_linearity must be one of {list(ACTIVATIONS)}, got {self.non_linearity!r};"
                " pass one of these"
            )


class Bottleneck(Method):
    """Bottleneck adapters: the identity at first, since U and u begin as zeros."""

    name = "bottleneck"
    config_class = BottleneckConfig
    file_keys = {
        "adapter_down": "adapter_down.weight",
        "adapter_down_bias": "adapter_down.bias",
        "adapter_up": "adapter_up.weight",
        "adapter_up_bias": "adapter_up.bias",
    }
    bounded = False
    mergeable = False

    def spec(
        self, config: BottleneckConfig, name: str, n: int, k: int, kernel: tuple[int, ...] = ()
    ) -> AdapterSpec:
        """Return width and shapes of the module `name`: D (r, N), U (N, r)."""
        if kernel:
            raise NotImplementedError(
                f"a bottleneck adapter stands after a linear, but {name!r} is a convolution;"
                " exclude it"
            )
        r, scaling = config.rank_of(name), config.alpha_of(name)
        shapes = {
            "adapter_down": (r, n),
            "adapter_down_bias": (r,),
            "adapter_up": (n, r),
            "adapter_up_bias": (n,),
        }
        return AdapterSpec(
            self.name, r, scaling, scaling, shapes, float(config.dropout),
            activation=config.non_linearity,
        )  # fmt: skip

    def init(
        self, config: BottleneckConfig, spec: AdapterSpec, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """Return D uniform as nn.Linear's, all else zero."""
        values = {name: torch.zeros(shape) for name, shape in spec.shapes.items()}
        uniform(values["adapter_down"], generator)
        return values

    def factors(self, params: Mapping[str, Tensor], backend: str = "auto") -> None:
        """Return None: what is added is no product of matrices."""

    def delta(self, params: Mapping[str, Tensor], spec: AdapterSpec) -> Tensor:
        """Raise: there is no update of the weight."""
        raise NotImplementedError(_NO_MERGE)

    def call(
        self, x: Tensor, base: Base, params: Mapping[str, Tensor], spec: AdapterSpec, training: bool
    ) -> Call:
        """Return what the layer computes for x (..., K): the fused linear, then the bottleneck."""
        down, down_bias, up, up_bias = (params[name] for name in spec.shapes)
        act, dropout = ACTIVATIONS[spec.activation], spec.dropout if training else 0.0

        def finish(y: Tensor) -> Tensor:
            h = act(functional.linear(y.to(down.dtype), down, down_bias))
            h = functional.dropout(h, dropout, training=dropout > 0)
            added = functional.linear(h, up, up_bias)
            return torch.add(y, added, alpha=spec.scaling).to(y.dtype)

        return Call(x, base.bias, None, finish)


METHOD = Bottleneck()
