"""LoKr: the update is the Kronecker product of two small matrices, each full or of low rank.

``dW = scaling kron(w1, w2)``. It is computed as an update of low rank where that is cheap, and
else by two small products around x: no matrix (N, K) is made.

Source: Yeh et al. 2023, arXiv:2309.14859.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from fastlora.adapters.base import check_flag
from fastlora.adapters.call import Base, Call
from fastlora.adapters.method import AdapterSpec
from fastlora.adapters.product import Product, ProductConfig, keep_rows
from fastlora.factors import kron_factors
from fastlora.kron import (
    Factor,
    add_in_place,
    kron_linear,
    kron_product,
    native_adds,
    passes_of,
    rank_form,
    scaled,
    shape_of,
)

W1, W2 = "lokr_w1", "lokr_w2"


@dataclass(frozen=True, kw_only=True)
class LoKrConfig(ProductConfig):
    """How to adapt a model with LoKr; field names and defaults are PEFT's.

    Attributes:
        alpha: the update is scaled by alpha / r.
        decompose_both: whether w1 may be of low rank too, as w2 always may.
        decompose_factor: rows and columns of w1, where they divide those of the weight, else the
            next smaller divisors; -1: the divisors nearest to the root.
        rank_dropout: probability with which a row of the update is dropped in training.
        rank_dropout_scale: whether the rows that are kept grow by as much.
        module_dropout: probability with which a call of a layer in training has no update.
        use_effective_conv2d: False; a convolution's weight is taken as a matrix.
        init_weights: True: w1 zero (w1_a where it is of low rank), the rest uniform as in
            nn.Linear; "lycoris": w2 (w2_b) zero instead; False: all uniform.

    Raises:
        TypeError: a field has the wrong type.
        ValueError: a field has a value out of range, or a pattern is not safe.
        NotImplementedError: use_effective_conv2d.
    """

    peft_type: ClassVar[str] = "LOKR"
    inits: ClassVar[tuple[bool | str, ...]] = (True, False, "lycoris")

    decompose_both: bool = False
    decompose_factor: int = -1
    rank_dropout_scale: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("decompose_both", "rank_dropout_scale"):
            check_flag(name, getattr(self, name))
        factor = self.decompose_factor
        if not isinstance(factor, int) or isinstance(factor, bool):
            raise TypeError(f"decompose_factor must be an int, got {factor!r}; pass a whole number")
        if factor < -1:
            raise ValueError(
                f"decompose_factor must be at least 1, or -1 for the divisors nearest to the root,"
                f" got {factor}; pass one of these"
            )


def divide(dimension: int, factor: int) -> tuple[int, int]:
    """Return two numbers whose product is `dimension`, the first one of them for w1.

    It is `factor` where that divides; else the largest divisor that is neither above `factor`
    (-1: no bound) nor above the root.
    """
    if factor > 0 and dimension % factor == 0:
        return factor, dimension // factor
    bound = math.isqrt(dimension) if factor == -1 else min(factor, math.isqrt(dimension))
    first = next((d for d in range(bound, 1, -1) if dimension % d == 0), 1)
    return first, dimension // first


class LoKr(Product):
    """Low-rank Kronecker product adaptation."""

    name = "lokr"
    config_class = LoKrConfig
    file_keys = {f"{w}{end}": f"{w}{end}" for w in (W1, W2) for end in ("", "_a", "_b")}
    bounded = False

    def spec(
        self, config: LoKrConfig, name: str, n: int, k: int, kernel: tuple[int, ...] = ()
    ) -> AdapterSpec:
        """Return rank, scaling and shapes of the module `name`.

        w1 is (n1, k1) and w2 (n2, k2), with n1 n2 = N and k1 k2 = K; of low rank, they are w_a
        (n, r) and w_b (r, k). They are where r is less than half of the longer side. The window
        of a convolution lies in w2.
        """
        r, factor = config.rank_of(name), config.decompose_factor
        (n1, n2), (k1, k2) = divide(n, factor), divide(k, factor)
        low1 = config.decompose_both and 2 * r < max(n1, k1)
        low2, columns = 2 * r < max(n2, k2), k2 * math.prod(kernel)
        if len(kernel) == 1 and not low2:
            raise NotImplementedError(
                f"LoKr on a 1-d convolution needs r below {max(n2, k2) / 2:g}, got {r} for"
                f" {name!r}: PEFT orders the numbers of a whole w2 in another way there; lower r or"
                " exclude it"
            )
        shapes = {**_shapes(W1, n1, k1, r, low1), **_shapes(W2, n2, columns, r, low2)}
        return self.make_spec(config, name, shapes, config.rank_dropout_scale, kernel)

    def file_shape(self, spec: AdapterSpec, name: str) -> tuple[int, ...]:
        """Return PEFT's shape: a whole w2 of a convolution has its window."""
        shape = spec.shapes[name]
        if name != W2 or not spec.kernel:
            return shape
        return (shape[0], shape[1] // math.prod(spec.kernel), *spec.kernel)

    def zero(self, config: LoKrConfig, spec: AdapterSpec) -> str | None:
        """Return w1 or its left half, or w2 or its right half."""
        if not config.init_weights:
            return None
        full, half = (W2, f"{W2}_b") if config.init_weights == "lycoris" else (W1, f"{W1}_a")
        return full if full in spec.shapes else half

    def rank(self, spec: AdapterSpec, device: str = "meta", backend: str = "auto") -> int:
        """Return the rank of the low-rank form on a device of this type; 0 when there is none."""
        empty = {n: torch.empty(shape, device="meta") for n, shape in spec.shapes.items()}
        w1, w2 = _factor(empty, W1), _factor(empty, W2)
        form = rank_form(w1, w2, passes_of(w1, w2, backend, device == "cpu"))
        return 0 if form is None else form[0]

    def factors(
        self, params: Mapping[str, Tensor], backend: str = "auto"
    ) -> tuple[Tensor, Tensor] | None:
        """Return A (R, K) and B (N, R), or None."""
        return kron_factors(_factor(params, W1), _factor(params, W2), backend)

    def call(
        self, x: Tensor, base: Base, params: Mapping[str, Tensor], spec: AdapterSpec, training: bool
    ) -> Call:
        """Return what the layer computes for x (..., K)."""
        update = self.update(base, params, spec, training)
        if update is not None:
            return self.low_rank_call(x, base, params, spec, update, training)
        w1, w2 = scaled(_factor(params, W1), spec.scaling), _factor(params, W2)
        rows = keep_rows(spec, shape_of(w1)[0] * shape_of(w2)[0], x.device, training)
        if rows is not None or not native_adds(x, w1, w2, base.backend):
            return Call(x, base.bias, None, partial(_add, x, w1, w2, rows))
        if not torch.is_grad_enabled():  # a group's product may have been shared
            return Call(x, base.bias, None, partial(add_in_place, x, w1, w2))
        alone = partial(kron_linear, x, base.weight, base.bias, w1, w2, base.backend)
        return Call(x, base.bias, None, None, alone)

    def delta(self, params: Mapping[str, Tensor], spec: AdapterSpec) -> Tensor:
        """Return the scaled update."""
        return torch.kron(_whole(params, W1), _whole(params, W2)) * spec.scaling


def _add(x: Tensor, w1: Factor, w2: Factor, rows: Tensor | None, y: Tensor) -> Tensor:
    """Return y plus the update of x, some of whose rows are dropped."""
    update = kron_product(x, w1, w2)
    return (y + (update if rows is None else update * rows)).to(y.dtype)


def _shapes(name: str, n: int, k: int, r: int, low: bool) -> dict[str, tuple[int, ...]]:
    return {f"{name}_a": (n, r), f"{name}_b": (r, k)} if low else {name: (n, k)}


def _factor(params: Mapping[str, Tensor], name: str) -> Factor:
    if name in params:
        return params[name]
    return params[f"{name}_a"], params[f"{name}_b"]


def _whole(params: Mapping[str, Tensor], name: str) -> Tensor:
    factor = _factor(params, name)
    parts = factor if isinstance(factor, tuple) else (factor,)
    wide = torch.promote_types(parts[0].dtype, torch.float32)
    first = parts[0].to(wide)
    return first @ parts[1].to(wide) if len(parts) == 2 else first


METHOD = LoKr()
