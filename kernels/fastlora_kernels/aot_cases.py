"""The kernel variants that `fastlora_kernels.aot` compiles: what the launchers launch.

Each launcher runs on CPU tensors with its kernels replaced by recorders, so that a case has the
very arguments and options of a launch.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastlora_kernels import dequantize as dequantize_module
from fastlora_kernels import lora_linear as linear_module
from fastlora_kernels.formats import StoredWeight

N, K, RANK = 1024, 2048, 16


@dataclass(frozen=True)
class Case:
    """One kernel with the arguments of one launch."""

    kernel: Any
    variant: str
    arguments: tuple[Any, ...]
    options: dict[str, Any]
    wants_matrix: bool
    no_fma: bool


class _Recorder:
    """Takes a kernel's place in a launcher and keeps its arguments instead of running it."""

    def __init__(self, kernel: Any, launches: list[tuple[Any, tuple[Any, ...], dict[str, Any]]]):
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: Any) -> Any:
        def record(*arguments: Any, **options: Any) -> None:
            self.launches.append((self.kernel, arguments, options))

        return record


@contextmanager
def _recording() -> Iterator[list[tuple[Any, tuple[Any, ...], dict[str, Any]]]]:
    launches: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []
    saved = [
        (module, name, value)
        for module in (linear_module, dequantize_module)
        for name, value in vars(module).items()
        if name.endswith("_kernel")
    ]
    for module, name, kernel in saved:
        setattr(module, name, _Recorder(kernel, launches))
    try:
        yield launches
    finally:
        for module, name, kernel in saved:
            setattr(module, name, kernel)


def _stored(n: int, k: int, nested: bool, blocksize: int = 64) -> StoredWeight:
    blocks = -(-n * k // blocksize)
    absmax = torch.zeros(blocks, dtype=torch.uint8 if nested else torch.float32)
    outer = torch.zeros(-(-blocks // 256)) if nested else None
    shape = (n, k // 2) if k % 2 == 0 else ((n * k + 1) // 2, 1)
    data = torch.zeros(shape, dtype=torch.uint8)
    return StoredWeight(data, absmax, outer, 0.25 if nested else 0.0, "nf4", blocksize)


def _linear_launches(
    m: int, dtype: torch.dtype, adapter: torch.dtype, weight: StoredWeight, n: int, k: int
) -> list[tuple[Any, tuple[Any, ...], dict[str, Any]]]:
    def zeros(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(shape, dtype=dtype)

    a, b = zeros(RANK, k, dtype=adapter), zeros(n, RANK, dtype=adapter)
    x, dy = zeros(m, k, dtype=dtype), zeros(m, n, dtype=dtype)
    bias = zeros(n, dtype=dtype)
    with _recording() as launches:
        linear_module.lora_linear(x, weight, bias, a, b, 0.5)
        linear_module.lora_linear_backward(dy, x, None, weight, a, b, 0.5, True, False)
    return launches


def _linear_cases(
    m: int, dtype: torch.dtype, adapter: torch.dtype, nested: bool, ragged: bool
) -> Iterator[Case]:
    n, k = (N + 1, K + 1) if ragged else (N, K)
    weight = _stored(n, k, nested)
    for kernel, arguments, options in _linear_launches(m, dtype, adapter, weight, n, k):
        kinds = [str(kind)[6:].replace("float", "f") for kind in (dtype, adapter)]
        name = f"M<={m} {kinds[0]} adapter {kinds[1]}"
        name += (" nested" if nested else "") + (" ragged" if ragged else "")
        yield Case(kernel, name, arguments, options, dtype != torch.float32, False)


def _dequantize_cases(quick: bool) -> Iterator[Case]:
    kinds = ((torch.bfloat16, 64),) if quick else ((torch.bfloat16, 64), (torch.float32, 4096))
    for dtype, blocksize in kinds:
        weight = _stored(N, K, True, blocksize)
        with _recording() as launches:
            dequantize_module.dequantize(weight, N, K, dtype)
        kernel, arguments, options = launches[0]
        name = f"{str(dtype)[6:].replace('float', 'f')} nested blocks of {blocksize}"
        yield Case(kernel, name, arguments, options, False, True)


def _all_linear_cases() -> Iterator[Case]:
    """Yield every tile with every combination of dtypes, absmax and alignment."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for m in linear_module.TILES_16BIT if dtype != torch.float32 else (16,):
            for adapter in {dtype, torch.float32}:
                for nested in (False, True):
                    yield from _linear_cases(m, dtype, adapter, nested, False)
                    if m == 16:
                        yield from _linear_cases(m, dtype, adapter, nested, True)


def _some_linear_cases() -> Iterator[Case]:
    """Yield every tile once, and every other property at least once."""
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    for m in (16, 32, 64):
        yield from _linear_cases(m, bf16, bf16, True, False)
    yield from _linear_cases(64, fp16, fp32, False, False)
    yield from _linear_cases(128, fp16, fp16, False, False)
    yield from _linear_cases(16, bf16, bf16, True, True)
    yield from _linear_cases(16, fp32, fp32, True, False)


def _distinct(found: Iterator[Case]) -> Iterator[Case]:
    """Drop the finishing kernels that differ in nothing but the number of tokens."""
    seen: set[tuple[str, str]] = set()
    for case in found:
        key = (case.kernel.__name__, re.sub(r"M<=\d+ | nested", "", case.variant))
        if "finish" not in key[0] or key not in seen:
            yield case
        seen.add(key)


def cases(scope: str = "default") -> Iterator[Case]:
    """Yield the variants of a scope: "quick" (the most demanding), "default" or "full"."""
    yield from _dequantize_cases(scope == "quick")
    if scope == "full":
        yield from _distinct(_all_linear_cases())
        return
    yield from _distinct(_linear_cases(128, torch.bfloat16, torch.float32, True, False))
    if scope == "default":
        yield from _distinct(_some_linear_cases())
