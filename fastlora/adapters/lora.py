"""LoRA: ``y = x W^T + bias + scaling (x A^T) B^T``; DoRA is LoRA with a magnitude.

Source: Hu et al. 2021, arXiv:2106.09685; rank-stabilised scaling: Kalajdzievski 2023,
arXiv:2312.03732; DoRA: Liu et al. 2024, arXiv:2402.09353.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from fastlora.adapters import magnitude
from fastlora.adapters.base import (
    AdapterConfig,
    check_alpha,
    check_dropout,
    check_flag,
    check_names,
)
from fastlora.adapters.method import AdapterSpec, Method, uniform

EMBEDDING_A, EMBEDDING_B = "lora_embedding_A", "lora_embedding_B"
INITS = (True, False, "gaussian")
BIASES = ("none", "all", "lora_only")


@dataclass(frozen=True, kw_only=True)
class LoraConfig(AdapterConfig):
    """How to adapt a model with LoRA; field names and defaults are PEFT's.

    Attributes:
        lora_alpha: the update is scaled by lora_alpha / r.
        lora_dropout: probability with which an element of the adapter's input is dropped in
            training; with use_dora this costs a second product with the weight.
        bias: "none", "lora_only" (train the biases of the adapted layers) or "all".
        use_rslora: scale by lora_alpha / sqrt(r) instead.
        use_dora: give each output a magnitude of its own, see `fastlora.adapters.magnitude`.
        init_lora_weights: True: A uniform as nn.Linear, B zero; "gaussian": A normal with standard
            deviation 1 / r, B zero; False: both uniform, so the update is not zero at first.
        target_parameters: list of names or ends of names of fused expert weights, parameters of
            three dimensions, such as "mlp.experts.gate_up_proj". With it and without
            target_modules no linear is adapted.

    Raises:
        TypeError: a field has the wrong type.
        ValueError: a field has a value out of range, or a pattern is not safe.
    """

    peft_type: ClassVar[str] = "LORA"
    alpha_field: ClassVar[str] = "lora_alpha"

    lora_alpha: float = 8
    lora_dropout: float = 0.0
    bias: str = "none"
    use_rslora: bool = False
    use_dora: bool = False
    init_lora_weights: bool | str = True
    target_parameters: Sequence[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_alpha("lora_alpha", self.lora_alpha)
        check_dropout("lora_dropout", self.lora_dropout)
        if self.bias not in BIASES:
            raise ValueError(f"bias must be one of {list(BIASES)}, got {self.bias!r}; pass one")
        for name in ("use_rslora", "use_dora"):
            check_flag(name, getattr(self, name))
        if self.init_lora_weights not in INITS:
            raise ValueError(
                f"init_lora_weights must be one of {list(INITS)}, got {self.init_lora_weights!r};"
                " pass one of these"
            )
        names = check_names("target_parameters", self.target_parameters)
        self._set("target_parameters", names or None)
        if self.target_parameters:
            self._check_parameters()

    def _check_parameters(self) -> None:
        """Raise unless the other fields are possible for parameters; PEFT has the same limits."""
        if isinstance(self.target_parameters, str):
            raise TypeError(
                f"target_parameters must be a list of names, got {self.target_parameters!r}; put it"
                " in a list"
            )
        for name, value in (("lora_dropout", 0.0), ("use_dora", False), ("bias", "none")):
            if getattr(self, name) != value:
                raise ValueError(
                    f"{name} must be {value!r} together with target_parameters, got"
                    f" {getattr(self, name)!r}; leave it out or adapt linears alone"
                )
        if self.target_modules is None:
            self._set("target_modules", ())


class Lora(Method):
    """Low-rank adaptation."""

    name = "lora"
    config_class = LoraConfig
    file_keys = {
        "lora_A": "lora_A.weight",
        "lora_B": "lora_B.weight",
        magnitude.NAME: magnitude.NAME,
        EMBEDDING_A: EMBEDDING_A,
        EMBEDDING_B: EMBEDDING_B,
    }
    derived = False

    def spec(
        self, config: LoraConfig, name: str, n: int, k: int, kernel: tuple[int, ...] = ()
    ) -> AdapterSpec:
        """Return rank, scaling and shapes of the module `name`: A (r, K), B (N, r)."""
        r, alpha, scaling = self._scaling(config, name)
        columns = k * math.prod(kernel)
        shapes: dict[str, tuple[int, ...]] = {"lora_A": (r, columns), "lora_B": (n, r)}
        if config.use_dora:
            shapes[magnitude.NAME] = (n,)
        dropout = float(config.lora_dropout)
        return AdapterSpec(self.name, r, alpha, scaling, shapes, dropout, kernel=kernel)

    def grouped_spec(
        self, config: LoraConfig, name: str, n: int, k: int, kernel: tuple[int, ...], groups: int
    ) -> AdapterSpec:
        """Return rank, scaling and shapes for a convolution with groups, which are PEFT's.

        A (r, K) reads the channels of all groups, k of them; a row of B (N, r / groups) has only
        the ranks of its own group.
        """
        if config.use_dora:
            raise NotImplementedError(
                f"use_dora must be False for a convolution with groups, but {name!r} has {groups};"
                " exclude it"
            )
        spec = self.spec(config, name, n, k, kernel)
        if spec.r % groups:
            raise ValueError(
                f"the rank of {name!r} must be a multiple of its {groups} groups, got {spec.r}; set"
                " rank_pattern or exclude it"
            )
        return replace(spec, shapes={**spec.shapes, "lora_B": (n, spec.r // groups)})

    def embedding_spec(self, config: LoraConfig, name: str, count: int, width: int) -> AdapterSpec:
        """Return rank, scaling and shapes for an embedding: A (r, count), B (width, r)."""
        if config.use_dora:
            raise NotImplementedError(
                f"use_dora must be False for an embedding, but {name!r} is one; exclude it"
            )
        r, alpha, scaling = self._scaling(config, name)
        return AdapterSpec(
            self.name, r, alpha, scaling, {EMBEDDING_A: (r, count), EMBEDDING_B: (width, r)}
        )

    def experts_spec(
        self, config: LoraConfig, name: str, shape: tuple[int, int, int]
    ) -> AdapterSpec:
        """Return rank, scaling and shapes for expert weights (E, N, K): A (E, r, K), B (E, N, r).

        Args:
            config: the config.
            name: the parameter's name.
            shape: (E, N, K).
        """
        r, alpha, scaling = self._scaling(config, name)
        e, n, k = shape
        shapes = {"lora_A": (e, r, k), "lora_B": (e, n, r)}
        return AdapterSpec(self.name, r, alpha, scaling, shapes)

    def _scaling(self, config: LoraConfig, name: str) -> tuple[int, float, float]:
        r, alpha = config.rank_of(name), config.alpha_of(name)
        return r, alpha, alpha / (math.sqrt(r) if config.use_rslora else r)

    def file_shape(self, spec: AdapterSpec, name: str) -> tuple[int, ...]:
        """Return PEFT's shape: a convolution's A and B are convolutions themselves."""
        shape, ones = spec.shapes[name], (1,) * len(spec.kernel)
        if not spec.kernel:
            return shape
        if name == "lora_A":
            return (shape[0], shape[1] // math.prod(spec.kernel), *spec.kernel)
        return (1, *shape, *ones) if name == magnitude.NAME else (*shape, *ones)

    def init(
        self, config: LoraConfig, spec: AdapterSpec, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """Return first values, by `init_lora_weights`; `settle` gives the magnitude its own."""
        values = {name: torch.zeros(shape) for name, shape in spec.shapes.items()}
        if EMBEDDING_A in values:  # as in PEFT: A is zero, B normal
            values[EMBEDDING_B].normal_(generator=generator)
            return values
        lora_A, lora_B = values["lora_A"], values["lora_B"]
        if config.init_lora_weights == "gaussian":
            lora_A.normal_(std=1 / spec.r, generator=generator)
            return values
        uniform(lora_A, generator, columns=lora_A.shape[-1])
        if config.init_lora_weights is False:  # of experts PEFT has one B for all: (N, r E)
            uniform(lora_B, generator, columns=lora_B.numel() // lora_B.shape[-2])
        return values

    def factors(self, params: Mapping[str, Tensor], backend: str = "auto") -> tuple[Tensor, Tensor]:
        """Return A and B."""
        return params["lora_A"], params["lora_B"]

    def delta(self, params: Mapping[str, Tensor], spec: AdapterSpec) -> Tensor:
        """Return ``scaling B A``."""
        if EMBEDDING_A in params:
            return (params[EMBEDDING_B] @ params[EMBEDDING_A]).T * spec.scaling
        lora_A, lora_B = params["lora_A"], params["lora_B"]
        wide = torch.promote_types(lora_A.dtype, torch.float32)
        return (lora_B.to(wide) @ lora_A.to(wide)) * spec.scaling


METHOD = Lora()
