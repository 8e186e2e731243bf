"""What an adapter method is: its parameters, its low-rank form and its merge."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from fastlora_kernels.low_rank import LowRank
from torch import Tensor

from fastlora import ops
from fastlora.adapters import magnitude
from fastlora.adapters.base import AdapterConfig
from fastlora.adapters.call import Base, Call


@dataclass(frozen=True)
class AdapterSpec:
    """What one layer's adapter is.

    Attributes:
        method: name of the method, "lora".
        r: rank.
        alpha: numerator of the scaling.
        scaling: factor of the update.
        shapes: the shape of each parameter, by name.
        dropout: probability with which an element of the adapter's input is dropped in training.
        rank_dropout: probability with which a row of the update is dropped in training.
        module_dropout: probability with which a call in training has no update.
        rescale: whether the rows that `rank_dropout` keeps grow by the share that it drops.
        activation: name of the non-linearity of a bottleneck; "" for the other methods.
        kernel: size of a convolution's window; () for a linear.
    """

    method: str
    r: int
    alpha: float
    scaling: float
    shapes: Mapping[str, tuple[int, ...]]
    dropout: float = 0.0
    rank_dropout: float = 0.0
    module_dropout: float = 0.0
    rescale: bool = False
    activation: str = ""
    kernel: tuple[int, ...] = ()

    @property
    def label(self) -> str:
        """The name that people know the adapter by: "dora" is LoRA with a magnitude."""
        if magnitude.NAME not in self.shapes:
            return self.method
        return "dora" if self.method == "lora" else f"{self.method} with magnitude"


Factors = tuple[Tensor, Tensor]
_NO_MAGNITUDE = (
    "a magnitude needs an update of low rank, which {} has not for this layer; leave the magnitude"
    " out"
)


class Method(ABC):
    """One adapter method. It keeps no state itself.

    A file of this folder that has a `METHOD` is a method. Its parameters live on the layer, under
    the names of `AdapterSpec.shapes`. Any method with a low-rank form may have the parameter
    `magnitude.NAME` too.

    Attributes:
        name: as in `AdapterSpec.method`.
        config_class: its config.
        file_keys: parameter name -> end of its key in an adapter file; every name it may have.
        derived: whether `factors` computes something.
        bounded: whether the rank may not exceed the smaller side of the weight.
        mergeable: whether it is an update of the weight.
    """

    name: ClassVar[str]
    config_class: ClassVar[type[AdapterConfig]]
    file_keys: ClassVar[Mapping[str, str]]
    derived: ClassVar[bool] = True
    bounded: ClassVar[bool] = True
    mergeable: ClassVar[bool] = True

    @abstractmethod
    def spec(
        self, config: Any, name: str, n: int, k: int, kernel: tuple[int, ...] = ()
    ) -> AdapterSpec:
        """Return what the adapter of the module `name` is, whose weight is (n, k).

        With a kernel it is a convolution's, (n, k, *kernel), taken as a matrix of n rows.
        """

    def embedding_spec(self, config: Any, name: str, count: int, width: int) -> AdapterSpec:
        """Return what the adapter of an embedding (count, width) is.

        Raises:
            NotImplementedError: the method has none for embeddings.
        """
        raise NotImplementedError(
            f"an embedding can have LoRA alone, but {name!r} is to get {self.name}; exclude it"
        )

    def file_shape(self, spec: AdapterSpec, name: str) -> tuple[int, ...]:
        """Return the shape that a parameter has in an adapter file; it holds the same numbers."""
        return spec.shapes[name]

    @abstractmethod
    def init(self, config: Any, spec: AdapterSpec, generator: torch.Generator) -> dict[str, Tensor]:
        """Return the first values of each parameter, float32 on CPU, drawn from `generator`."""

    @abstractmethod
    def factors(self, params: Mapping[str, Tensor], backend: str = "auto") -> Factors | None:
        """Return A (R, K) and B (N, R) of the unscaled update B A; None: it has no cheap one.

        Args:
            params: by name.
            backend: "auto", or the name of one backend.
        """

    @abstractmethod
    def delta(self, params: Mapping[str, Tensor], spec: AdapterSpec) -> Tensor:
        """Return the scaled update, (N, K) float32 or wider, without the magnitude."""

    def rank(self, spec: AdapterSpec, device: str = "meta", backend: str = "auto") -> int:
        """Return the rank of the low-rank form on a device of this type; 0 when there is none."""
        empty = {n: torch.empty(shape, device="meta") for n, shape in spec.shapes.items()}
        factors = self.factors(empty)
        return 0 if factors is None else factors[0].shape[0]

    def settle(
        self, base: Base, params: Mapping[str, Tensor], spec: AdapterSpec, dtype: torch.dtype
    ) -> None:
        """Give the parameters that depend on the weight, decoded to `dtype`, their first values."""
        if magnitude.NAME in params:
            with torch.no_grad():
                update = self.update(base, params, spec, training=False)
                if update is None:
                    raise NotImplementedError(_NO_MAGNITUDE.format(self.name))
                params[magnitude.NAME].copy_(magnitude.norms(base, update, dtype))

    def update(
        self, base: Base, params: Mapping[str, Tensor], spec: AdapterSpec, training: bool
    ) -> LowRank | None:
        """Return the low-rank form without dropout, or None; what is computed is kept."""
        if self.derived:
            sources = tuple(params.values())
            factors = base.cache.trained(
                "factors", sources, training, lambda: self.factors(params, base.backend)
            )
        else:
            factors = self.factors(params)
        return None if factors is None else LowRank(*factors, spec.scaling)

    def call(
        self, x: Tensor, base: Base, params: Mapping[str, Tensor], spec: AdapterSpec, training: bool
    ) -> Call:
        """Return what the layer computes for x (..., K)."""
        update = self.update(base, params, spec, training)
        assert update is not None  # a method without a low-rank form has a call of its own
        return self.low_rank_call(x, base, params, spec, update, training)

    def low_rank_call(
        self,
        x: Tensor,
        base: Base,
        params: Mapping[str, Tensor],
        spec: AdapterSpec,
        update: LowRank,
        training: bool,
    ) -> Call:
        """Return what a layer with this update computes, with its dropout and its magnitude."""
        dropout = spec.dropout if training else 0.0
        if magnitude.NAME in params:
            return magnitude.call(x, base, params, update, dropout, training)
        if dropout > 0:
            update = update._replace(dropout=dropout, seed=ops.dropout_seed(x))
        return Call(x, base.bias, update, None)

    def merge(self, weight: Tensor, params: Mapping[str, Tensor], spec: AdapterSpec) -> Tensor:
        """Return the weight (N, K), float32 or wider, with the update folded in."""
        total = weight + self.delta(params, spec)
        if magnitude.NAME in params:
            total = magnitude.apply(total, params[magnitude.NAME])
        return total


def uniform(tensor: Tensor, generator: torch.Generator, columns: int = 0) -> None:
    """Fill a parameter as nn.Linear does its weight: between -1 and 1 over the root of its columns.

    Args:
        tensor: the parameter.
        generator: of the values.
        columns: how many columns count; 0: its own.

    Source: He et al. 2015, arXiv:1502.01852, with PyTorch's and PEFT's a = sqrt(5).
    """
    bound = 1 / math.sqrt(columns or tensor.shape[1])
    tensor.uniform_(-bound, bound, generator=generator)
