"""What LoHa and LoKr, whose updates are products of small matrices, have in common."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from fastlora_kernels.low_rank import LowRank
from torch import Tensor

from fastlora.adapters import magnitude
from fastlora.adapters.base import AdapterConfig, check_alpha, check_dropout, check_flag
from fastlora.adapters.call import Base
from fastlora.adapters.method import AdapterSpec, Method, uniform


@dataclass(frozen=True, kw_only=True)
class ProductConfig(AdapterConfig):
    """The fields of LoHa and LoKr; names and defaults are PEFT's.

    Attributes:
        alpha: the update is scaled by alpha / r.
        rank_dropout: probability with which a row of the update is dropped in training.
        module_dropout: probability with which a call of a layer in training has no update.
        use_effective_conv2d: False; a convolution's weight is taken as a matrix.

    Raises:
        TypeError: a field has the wrong type.
        ValueError: a field has a value out of range, or a pattern is not safe.
        NotImplementedError: use_effective_conv2d.
    """

    inits: ClassVar[tuple[bool | str, ...]] = (True, False)

    alpha: float = 8
    rank_dropout: float = 0.0
    module_dropout: float = 0.0
    use_effective_conv2d: bool = False
    init_weights: bool | str = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_alpha("alpha", self.alpha)
        check_dropout("rank_dropout", self.rank_dropout)
        check_dropout("module_dropout", self.module_dropout)
        check_flag("use_effective_conv2d", self.use_effective_conv2d)
        if self.use_effective_conv2d:
            raise NotImplementedError(
                "use_effective_conv2d must be False, got True; fastlora takes a convolution's"
                " weight as a matrix, as PEFT does with False"
            )
        if self.init_weights not in self.inits:
            raise ValueError(
                f"init_weights must be one of {list(self.inits)}, got {self.init_weights!r}; pass"
                " one of these"
            )


class Product(Method):
    """A method whose update is a product, with PEFT's dropout of rows and of whole calls."""

    def make_spec(
        self,
        config: ProductConfig,
        name: str,
        shapes: Mapping[str, tuple[int, ...]],
        rescale: bool,
        kernel: tuple[int, ...] = (),
    ) -> AdapterSpec:
        """Return what the adapter of the module `name` is."""
        r, alpha = config.rank_of(name), config.alpha_of(name)
        drops = float(config.rank_dropout), float(config.module_dropout)
        return AdapterSpec(
            self.name, r, alpha, alpha / r, shapes, 0.0, *drops, rescale, kernel=kernel
        )

    @abstractmethod
    def zero(self, config: Any, spec: AdapterSpec) -> str | None:
        """Return the parameter that is zero at first, so that the update is; None: no one."""

    def init(self, config: Any, spec: AdapterSpec, generator: torch.Generator) -> dict[str, Tensor]:
        """Return first values, by `init_weights`: uniform, one of them zero."""
        values = {name: torch.zeros(shape) for name, shape in spec.shapes.items()}
        left = self.zero(config, spec), magnitude.NAME
        for name, value in values.items():
            if name not in left:
                uniform(value, generator)
        return values

    def update(
        self, base: Base, params: Mapping[str, Tensor], spec: AdapterSpec, training: bool
    ) -> LowRank | None:
        """Return the low-rank form, or None; in training some of its rows are dropped."""
        update = super().update(base, params, spec, training)
        if update is None:
            return None
        rows = keep_rows(spec, update.B.shape[0], update.B.device, training)
        if rows is None:
            return update
        return update._replace(B=(update.B * rows.unsqueeze(1)).to(update.B.dtype))


def keep_rows(spec: AdapterSpec, n: int, device: torch.device, training: bool) -> Tensor | None:
    """Return the factor of each row of the update in this call: (N,) float32; None: 1 for all."""
    if not training or not (spec.rank_dropout or spec.module_dropout):
        return None
    rows = torch.ones(n, device=device)
    if spec.rank_dropout:
        rows = (torch.rand(n, device=device) > spec.rank_dropout).to(rows.dtype)
        if spec.rescale:
            rows = rows / rows.mean().clamp_min(1 / n)
    if spec.module_dropout:
        rows = rows * (torch.rand(1, device=device) > spec.module_dropout)
    return rows
