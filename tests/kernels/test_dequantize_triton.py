from __future__ import annotations

import pytest
import torch
from fastlora_kernels import formats
from fastlora_kernels.formats import BLOCKSIZES, StoredWeight

from fastlora.backends import triton as backend
from fastlora.quant import QuantizedWeight
from tests import contract
from tests.kernels.weights import quantized

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def stored(
    n: int, k: int, quant_type: str, blocksize: int, double: bool, device: str
) -> StoredWeight:
    weight = torch.randn(n, k) * torch.linspace(0.01, 2, k)
    return quantized(weight, quant_type, blocksize, double, device)


def check_equal(weight: StoredWeight, n: int, k: int, dtype: torch.dtype) -> None:
    with contract.poisoned():
        ours = backend.dequantize(weight, n, k, dtype)
    cpu = weight._replace(
        data=weight.data.cpu(),
        absmax=weight.absmax.cpu() if weight.absmax is not None else None,
        nested_absmax=weight.nested_absmax.cpu() if weight.nested_absmax is not None else None,
    )
    expected = formats.dequantize(cpu, n, k, dtype)
    assert ours.dtype == dtype
    assert torch.equal(ours.cpu(), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("quant_type", sorted(formats.FORMATS))
@pytest.mark.parametrize("shape", [(1, 2), (3, 17), (2, 1), (33, 129), (64, 128), (1000, 3)])
def test_equals_reference(
    shape: tuple[int, int], quant_type: str, double: bool, dtype: torch.dtype, device: str
) -> None:
    n, k = shape
    check_equal(stored(n, k, quant_type, 64, double, device), n, k, dtype)


@pytest.mark.parametrize("blocksize", BLOCKSIZES)
@pytest.mark.parametrize("double", [False, True])
def test_every_blocksize(blocksize: int, double: bool, device: str) -> None:
    check_equal(stored(65, 130, "nf4", blocksize, double, device), 65, 130, torch.bfloat16)


@pytest.mark.parametrize("quant_type", sorted(formats.FORMATS))
def test_every_byte(quant_type: str, device: str) -> None:
    data = torch.arange(256, dtype=torch.uint8).repeat(4).view(32, 32)
    absmax = torch.rand(32) * 3
    weight = StoredWeight(data.to(device), absmax.to(device), None, None, quant_type, 64)
    check_equal(weight, 32, 64, torch.float32)


def test_every_nested_code(device: str) -> None:
    """A nested absmax is a product and then a sum, each rounded: all codes, several scales."""
    blocks, offset = 1024, torch.tensor(0.37).to(device)
    absmax = torch.arange(256, dtype=torch.uint8).repeat(4)
    nested = torch.tensor([0.3, 1.7, 1e-3, 123.4])
    data = torch.randint(0, 256, (blocks, 16), dtype=torch.uint8)
    parts = data.to(device), absmax.to(device), nested.to(device)
    weight = StoredWeight(parts[0], parts[1], parts[2], offset, "nf4", 32)
    check_equal(weight, blocks, 32, torch.float32)


def test_equals_bitsandbytes(device: str) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    packed, state = functional.quantize_4bit(
        torch.randn(40, 128), blocksize=64, quant_type="nf4", compress_statistics=True
    )
    expected = functional.dequantize_4bit(packed, state)
    weight = QuantizedWeight.from_bnb((packed, state)).to(device).stored()
    result = backend.dequantize(weight, 40, 128, torch.float32)
    assert torch.equal(result.cpu(), expected)


def test_no_elements(device: str) -> None:
    data = torch.empty(0, 1, dtype=torch.uint8, device=device)
    weight = StoredWeight(data, torch.empty(0, device=device), None, None, "nf4", 64)
    assert backend.dequantize(weight, 0, 3, torch.bfloat16).shape == (0, 3)


def test_dense_weight_is_cast(device: str) -> None:
    data = torch.randn(3, 5, device=device)
    weight = StoredWeight(data, None, None, None, "dense", 0)
    assert backend.dequantize(weight, 3, 5, torch.float32) is data
    assert torch.equal(backend.dequantize(weight, 3, 5, torch.float16), data.half())
