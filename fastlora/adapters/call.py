"""One call of an adapted linear: what it stands on, and what is computed."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from fastlora_kernels.formats import StoredWeight
from fastlora_kernels.low_rank import LowRank
from torch import Tensor

from fastlora import ops
from fastlora.adapters.cache import Cache


class Base(NamedTuple):
    """The frozen linear (N, K) under an adapter.

    Attributes:
        weight: as it is stored.
        bias: (N,), or None.
        backend: "auto" or the name of one.
        cache: what the layer remembers.
    """

    weight: StoredWeight
    bias: Tensor | None
    backend: str
    cache: Cache


class Call(NamedTuple):
    """One call of an adapted linear: ``finish(x W^T + bias + update)``.

    Attributes:
        x: (..., K), the input or what takes its place.
        bias: (N,), or None.
        update: the low-rank term, or None.
        finish: what is done to the sum, or None.
        alone: the output in one piece, where no other linear shares the product; or None.
    """

    x: Tensor
    bias: Tensor | None
    update: LowRank | None
    finish: Callable[[Tensor], Tensor] | None
    alone: Callable[[], Tensor] | None = None

    def run(self, base: Base) -> Tensor:
        """Return the output, (..., N)."""
        if self.alone is not None:
            return self.alone()
        y = ops.linear(self.x, base.weight, self.bias, self.update, base.backend)
        return y if self.finish is None else self.finish(y)
