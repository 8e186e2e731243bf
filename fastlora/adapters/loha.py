"""LoHa: the update is the product, element by element, of two matrices of low rank.

``dW = scaling (w1_a w1_b) * (w2_a w2_b)`` has rank r^2 at most, and is computed as an update of
that rank: no matrix (N, K) is made.

Source: Hyeon-Woo et al. 2021, arXiv:2108.06098 (FedPara); Yeh et al. 2023, arXiv:2309.14859.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fastlora.adapters.method import AdapterSpec
from fastlora.adapters.product import Product, ProductConfig
from fastlora.factors import hada_factors

W1_A, W1_B, W2_A, W2_B = _NAMES = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")


@dataclass(frozen=True, kw_only=True)
class LoHaConfig(ProductConfig):
    """How to adapt a model with LoHa; field names and defaults are PEFT's.

    Attributes:
        alpha: the update is scaled by alpha / r.
        rank_dropout: probability with which a row of the update is dropped in training; the rows
            that are kept grow by as much.
        module_dropout: probability with which a call of a layer in training has no update.
        use_effective_conv2d: False; a convolution's weight is taken as a matrix.
        init_weights: True: w2_b zero, the others uniform as in nn.Linear; False: all uniform.

    Raises:
        TypeError: a field has the wrong type.
        ValueError: a field has a value out of range, or a pattern is not safe.
        NotImplementedError: use_effective_conv2d.
    """

    peft_type: ClassVar[str] = "LOHA"


class LoHa(Product):
    """Low-rank Hadamard product adaptation."""

    name = "loha"
    config_class = LoHaConfig
    file_keys = {name: name for name in _NAMES}

    def spec(
        self, config: LoHaConfig, name: str, n: int, k: int, kernel: tuple[int, ...] = ()
    ) -> AdapterSpec:
        """Return rank, scaling and shapes of the module `name`: w_a (N, r), w_b (r, K)."""
        r, columns = config.rank_of(name), k * math.prod(kernel)
        shapes = {W1_A: (n, r), W1_B: (r, columns), W2_A: (n, r), W2_B: (r, columns)}
        return self.make_spec(config, name, shapes, True, kernel)

    def zero(self, config: LoHaConfig, spec: AdapterSpec) -> str | None:
        """Return w2_b."""
        return W2_B if config.init_weights else None

    def factors(self, params: Mapping[str, Tensor], backend: str = "auto") -> tuple[Tensor, Tensor]:
        """Return A (r^2, K) and B (N, r^2)."""
        w1_a, w1_b, w2_a, w2_b = (params[name] for name in _NAMES)
        return hada_factors(w1_a, w1_b, w2_a, w2_b, backend)

    def delta(self, params: Mapping[str, Tensor], spec: AdapterSpec) -> Tensor:
        """Return the scaled update."""
        wide = torch.promote_types(params[W1_A].dtype, torch.float32)
        w1_a, w1_b, w2_a, w2_b = (params[name].to(wide) for name in _NAMES)
        return (w1_a @ w1_b) * (w2_a @ w2_b) * spec.scaling


METHOD = LoHa()
