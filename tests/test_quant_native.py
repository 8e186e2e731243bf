"""The C++ quantise and dequantise kernels equal the reference, on every instruction set."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from fastlora_kernels import native
from fastlora_kernels.formats import (
    BLOCKSIZES,
    FORMATS,
    StoredWeight,
    dequantize,
    quantize_absmax,
    quantize_blocks,
    rounding_tables,
)
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SIZES = (1, 2, 3, 31, 33, 64, 127, 2193, 4096, 40001)


@pytest.fixture(params=native.ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before, name = native.isa(), str(request.param)
    try:
        native.set_isa(name)
    except ValueError:
        pytest.skip(f"this CPU has no {name}")
    yield name
    native.set_isa(before)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def bits(tensor: Tensor) -> Tensor:
    return tensor.view({4: torch.int32, 2: torch.int16, 1: torch.uint8}[tensor.element_size()])


def tensors(n: int, book_name: str) -> Iterator[Tensor]:
    """Ordinary, subnormal, large, sparse and tied values, (n,) float32."""
    normal = torch.randn(n)
    yield normal
    yield normal * 1e-39
    yield normal.clamp(-3, 3) * 2e4
    yield torch.where(torch.rand(n) < 0.95, -0.0, normal)
    limits, _ = rounding_tables(FORMATS[book_name], torch.device("cpu"))
    above, below = torch.nextafter(limits, limits + 1), torch.nextafter(limits, limits - 1)
    ties = torch.cat([torch.tensor([1.0, -1.0]), limits, above, below])
    yield ties.repeat(n // ties.numel() + 1)[:n]


@pytest.mark.parametrize("blocksize", BLOCKSIZES)
@pytest.mark.parametrize("name", FORMATS)
def test_equal_the_reference(isa: str, name: str, blocksize: int) -> None:
    for i, n in enumerate(SIZES):
        for x in tensors(n, name):
            x = x.to(DTYPES[i % 3])
            packed, absmax = quantize_blocks(x, FORMATS[name], blocksize)
            ours, ours_absmax = native.quantize_4bit(x, name, blocksize)
            assert torch.equal(ours, packed), (n, x.dtype)
            assert torch.equal(bits(ours_absmax), bits(absmax)), (n, x.dtype)
            single = StoredWeight(packed, absmax, None, None, name, blocksize)
            double = StoredWeight(packed, *quantize_absmax(absmax), name, blocksize)
            for stored in (single, double):
                for dtype in DTYPES:
                    out = native.dequantize_4bit(stored, 1, n, dtype)
                    assert torch.equal(bits(out), bits(dequantize(stored, 1, n, dtype))), (n, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_shows_in_the_magnitude(isa: str, dtype: torch.dtype) -> None:
    x = torch.randn(300).to(dtype)
    x[5], x[100], x[299] = float("nan"), float("inf"), -float("inf")
    _, absmax = native.quantize_4bit(x, "nf4", 64)
    assert absmax[0].isnan()
    assert absmax.isfinite().tolist() == [False, False, True, True, False]
    assert absmax[1] == absmax[4] == float("inf")


@pytest.mark.parametrize("dtype", DTYPES)
def test_all_halves_convert(isa: str, dtype: torch.dtype) -> None:
    every = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.float16)
    every = every[every.isfinite()]
    _, absmax = native.quantize_4bit(every.repeat_interleave(32), "nf4", 32)
    assert torch.equal(bits(absmax), bits(every.float().abs()))
    packed = torch.full((16 * absmax.numel(), 1), 0xF0, dtype=torch.uint8)  # 1, -1, 1, -1, ...
    offsets = torch.nextafter(absmax, absmax + 1)
    for magnitudes in (absmax, offsets, (absmax[:-1] + absmax[1:]) / 2):
        stored = StoredWeight(packed, magnitudes, None, None, "nf4", 32)
        out = native.dequantize_4bit(stored, magnitudes.numel(), 32, dtype)
        assert torch.equal(bits(out[:, 0].contiguous()), bits(magnitudes.to(dtype)))
        assert torch.equal(bits(out[:, 31].contiguous()), bits((-magnitudes).to(dtype)))


def test_threads_do_not_change_the_result(isa: str) -> None:
    x = torch.randn(100_003)
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        packed, absmax = native.quantize_4bit(x, "fp4", 128)
        stored = StoredWeight(packed, absmax, None, None, "fp4", 128)
        results.append((packed, absmax, native.dequantize_4bit(stored, 1, 100_003, torch.bfloat16)))
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))
