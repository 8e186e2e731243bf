"""LoRA: ``y = x W^T + bias + scaling (x A^T) B^T``.

Source: Hu et al. 2021, arXiv:2106.09685; rank-stabilised scaling: Kalajdzievski 2023,
arXiv:2312.03732.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from fastlora_kernels.formats import StoredWeight
from torch import Tensor
from torch.nn import functional

from fastlora import ops
from fastlora.adapters.base import AdapterConfig, AdapterSpec, Method, check_alpha, check_dropout

INITS = (True, False, "gaussian")
BIASES = ("none", "all", "lora_only")


@dataclass(frozen=True, kw_only=True)
class LoraConfig(AdapterConfig):
    """How to adapt a model with LoRA; field names and defaults are PEFT's.

    Attributes:
        lora_alpha: the update is scaled by lora_alpha / r.
        lora_dropout: probability with which the adapter's input is dropped in training. Above 0
            the adapter runs as separate torch operations while the model is in training mode.
        bias: "none", "lora_only" (train the biases of the adapted layers) or "all".
        use_rslora: scale by lora_alpha / sqrt(r) instead.
        use_dora: not available yet.
        init_lora_weights: True: A uniform as nn.Linear, B zero; "gaussian": A normal with standard
            deviation 1 / r, B zero; False: both uniform, so the update is not zero at first.

    Raises:
        TypeError: a field has the wrong type.
        ValueError: a field has a value out of range, or a pattern is not safe.
        NotImplementedError: use_dora.
    """

    peft_type: ClassVar[str] = "LORA"
    alpha_field: ClassVar[str] = "lora_alpha"

    lora_alpha: float = 8
    lora_dropout: float = 0.0
    bias: str = "none"
    use_rslora: bool = False
    use_dora: bool = False
    init_lora_weights: bool | str = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_alpha("lora_alpha", self.lora_alpha)
        check_dropout("lora_dropout", self.lora_dropout)
        if self.bias not in BIASES:
            raise ValueError(f"bias must be one of {list(BIASES)}, got {self.bias!r}; pass one")
        for name in ("use_rslora", "use_dora"):
            if not isinstance(getattr(self, name), bool):
                given = getattr(self, name)
                raise TypeError(f"{name} must be True or False, got {given!r}; pass one")
        if self.use_dora:
            raise NotImplementedError(
                "use_dora must be False, got True; this version has no DoRA, so use plain LoRA"
            )
        if self.init_lora_weights not in INITS:
            raise ValueError(
                f"init_lora_weights must be one of {list(INITS)}, got {self.init_lora_weights!r};"
                " pass one of these"
            )


class Lora(Method):
    """Low-rank adaptation."""

    name = "lora"
    config_class = LoraConfig
    file_keys = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight"}

    def spec(self, config: LoraConfig, name: str) -> AdapterSpec:
        """Return rank, alpha and scaling of the module `name`."""
        r, alpha = config.rank(name), config.alpha(name)
        scaling = alpha / (math.sqrt(r) if config.use_rslora else r)
        return AdapterSpec(self.name, r, alpha, scaling, float(config.lora_dropout))

    def shapes(self, spec: AdapterSpec, n: int, k: int) -> dict[str, tuple[int, ...]]:
        """Return lora_A (r, K) and lora_B (N, r)."""
        return {"lora_A": (spec.r, k), "lora_B": (n, spec.r)}

    def init(
        self, config: LoraConfig, spec: AdapterSpec, n: int, k: int, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """Return first values, by `init_lora_weights`."""
        lora_A, lora_B = torch.empty(spec.r, k), torch.zeros(n, spec.r)
        if config.init_lora_weights == "gaussian":
            lora_A.normal_(std=1 / spec.r, generator=generator)
            return {"lora_A": lora_A, "lora_B": lora_B}
        lora_A.uniform_(-1 / math.sqrt(k), 1 / math.sqrt(k), generator=generator)
        if config.init_lora_weights is False:
            bound = 1 / math.sqrt(spec.r)
            lora_B.uniform_(-bound, bound, generator=generator)
        return {"lora_A": lora_A, "lora_B": lora_B}

    def forward(
        self,
        x: Tensor,
        weight: StoredWeight,
        bias: Tensor | None,
        params: Mapping[str, Tensor],
        spec: AdapterSpec,
        training: bool,
        backend: str,
    ) -> Tensor:
        """Return the layer's output; with dropout in training the adapter is not fused."""
        lora_A, lora_B = params["lora_A"], params["lora_B"]
        if not (training and spec.dropout > 0):
            return ops.linear(x, weight, bias, lora_A, lora_B, spec.scaling, backend)
        y = ops.linear(x, weight, bias, None, None, 0.0, backend)
        dropped = functional.dropout(x.to(lora_A.dtype), spec.dropout)
        update = functional.linear(functional.linear(dropped, lora_A), lora_B) * spec.scaling
        return (y + update).to(y.dtype)

    def delta(self, params: Mapping[str, Tensor], spec: AdapterSpec) -> Tensor:
        """Return ``scaling B A``."""
        lora_A, lora_B = params["lora_A"], params["lora_B"]
        wide = torch.promote_types(lora_A.dtype, torch.float32)
        return (lora_B.to(wide) @ lora_A.to(wide)) * spec.scaling


METHOD = Lora()
