"""A weight, an update and the inputs of both directions, for the tests of the Triton linear."""

from __future__ import annotations

from typing import Any

import torch
from fastlora_kernels import formats
from fastlora_kernels.formats import StoredWeight
from fastlora_kernels.low_rank import LowRank
from torch import Tensor

from fastlora.backends import reference
from fastlora.backends import triton as backend
from tests import contract, interpreter
from tests.kernels.weights import quantized

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SCALING = 0.7


class Setup:
    """A weight and the inputs of both directions."""

    def __init__(
        self,
        m: int,
        n: int,
        k: int,
        r: int,
        dtype: torch.dtype = BF16,
        adapter: torch.dtype = FP32,
        quant: tuple[str, int, bool] | None = ("nf4", 64, True),
        device: str = "cpu",
        dropout: float = 0.0,
        spans: list[tuple[int, int]] | None = None,
    ) -> None:
        def make(*shape: int, scale: float = 1.0, kind: torch.dtype = dtype) -> Tensor:
            return (torch.randn(shape) * scale).to(kind).to(device)

        dense = torch.randn(n, k) / k**0.5
        if quant is None:
            self.weight = stored(dense.to(dtype).to(device))
        else:
            self.weight = quantized(dense, *quant, device)
        self.exact = stored(formats.dequantize(self.weight, n, k, dtype).double())
        self.x, self.dy, self.bias = make(m, k), make(m, n), make(n)
        self.lora_A = make(r, k, scale=k**-0.5, kind=adapter)
        self.lora_B = make(n, r, scale=r**-0.5, kind=adapter)
        self.dropout = dropout
        self.seed = torch.tensor([(123 << 32) + 2**31 + 5], device=device) if dropout else None
        self.spans = None if spans is None else torch.tensor(spans, dtype=torch.int32).to(device)

    @property
    def inputs(self) -> list[Tensor]:
        return [self.x, self.bias, self.lora_A, self.lora_B, self.dy]

    def update(self, a: Tensor | None = None, b: Tensor | None = None) -> LowRank:
        a, b = self.lora_A if a is None else a, self.lora_B if b is None else b
        return LowRank(a, b, SCALING, self.dropout, self.seed, self.spans)


def stored(dense: Tensor) -> StoredWeight:
    return StoredWeight(dense, None, None, None, "dense", 0)


def both(module: Any, setup: Setup, weight: StoredWeight | None = None) -> Any:
    """Return a function of (x, bias, A, B, dy) that gives y, dx, dA, dB through `module`."""
    held = setup.weight if weight is None else weight

    def run(x: Tensor, bias: Tensor, a: Tensor, b: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
        update = setup.update(a, b)
        y, s = module.lora_linear(x, held, bias, update)
        return (y, *module.lora_linear_backward(dy, x, s, held, update, True, True))

    return run


def check(setup: Setup, name: str) -> None:
    """Hold the contract for y, dx, dA and dB."""
    ours, plain = both(backend, setup), both(reference, setup)
    truth = both(reference, setup, setup.exact)
    contract.check(name, ours, plain, setup.inputs, truth, reps=interpreter.REPS)
