"""Microbenchmarks of the ops, one number of tokens at a time, by pytest-benchmark.

pytest bench/kernels.py                                  # on CUDA where there is a device
pytest bench/kernels.py -k "lora and 256" --benchmark-autosave
pytest bench/kernels.py --benchmark-compare              # against what was saved before

For comparisons with other libraries see bench.linear and bench.engine.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastlora

N, K, R = 2048, 2048, 16
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Linear = Callable[[Tensor], Tensor]


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape, device=DEVICE) * shape[-1] ** -0.5)


def linear(method: str, weight: Any) -> tuple[Linear, list[nn.Parameter]]:
    """The linear of a method and what it trains."""
    if method == "none":
        return lambda x: fastlora.lora_linear(x, weight), []
    if method == "lora":
        a, b = parts = [parameter(R, K), parameter(N, R)]
        return lambda x: fastlora.lora_linear(x, weight, None, a, b), parts
    if method == "dora":
        a, b, m = parts = [
            parameter(R, K),
            parameter(N, R),
            nn.Parameter(torch.ones(N, device=DEVICE)),
        ]
        return lambda x: fastlora.dora_linear(x, weight, None, a, b, m), parts
    if method == "loha":
        a, b = parameter(N, R // 2), parameter(R // 2, K)
        c, d = parameter(N, R // 2), parameter(R // 2, K)
        return lambda x: fastlora.hada_linear(x, weight, None, a, b, c, d), [a, b, c, d]
    w1, a, b = parts = [parameter(8, 8), parameter(N // 8, R // 2), parameter(R // 2, K // 8)]
    return lambda x: fastlora.kron_linear(x, weight, None, w1, (a, b)), parts


def timed(benchmark: Any, run: Callable[[], object]) -> None:
    """Benchmark a call, to its end on the device."""

    def whole() -> None:
        run()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(whole, rounds=15, warmup_rounds=3)


@pytest.mark.parametrize("tokens", [1, 16, 256, 1024])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("base", ["dense", "nf4"])
@pytest.mark.parametrize("method", ["none", "lora", "dora", "loha", "lokr"])
@pytest.mark.parametrize("step", ["forward", "forward+backward"])
def test_linear(
    benchmark: Any, step: str, method: str, base: str, dtype: torch.dtype, tokens: int
) -> None:
    torch.manual_seed(0)
    dense = torch.randn(N, K, device=DEVICE, dtype=dtype) * K**-0.5
    run, parameters = linear(method, dense if base == "dense" else fastlora.quantize_4bit(dense))
    x = torch.randn(tokens, K, device=DEVICE, dtype=dtype, requires_grad=True)
    dy = torch.randn(tokens, N, device=DEVICE, dtype=dtype)
    if step == "forward":
        with torch.no_grad():
            timed(benchmark, lambda: run(x))
    else:
        timed(benchmark, lambda: torch.autograd.grad(run(x), [x, *parameters], dy))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("format", ["nf4", "fp4"])
@pytest.mark.parametrize("way", ["quantize", "dequantize"])
def test_format(benchmark: Any, way: str, format: str, dtype: torch.dtype) -> None:
    dense = torch.randn(N, K, device=DEVICE, dtype=dtype)
    packed = fastlora.quantize_4bit(dense, format)
    if way == "quantize":
        timed(benchmark, lambda: fastlora.quantize_4bit(dense, format))
    else:
        timed(benchmark, packed.dequantize)
