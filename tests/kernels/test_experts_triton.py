from __future__ import annotations

from typing import Any

import pytest
import torch
from fastlora_kernels import experts, experts_linear, formats, regimes
from fastlora_kernels.experts import ExpertsUpdate
from fastlora_kernels.formats import StoredWeight
from torch import Tensor

from fastlora.backends import reference
from fastlora.backends import triton as backend
from tests import contract, interpreter
from tests.kernels.linear_setup import BF16, FP16, FP32
from tests.kernels.weights import quantized

Quant = tuple[str, int, bool] | None


def stacked(
    count: int, n: int, k: int, dtype: torch.dtype, quant: Quant, device: str
) -> tuple[StoredWeight, StoredWeight]:
    """Return stacked weights, and the same ones dense in float64."""
    dense = torch.randn(count, n, k) / k**0.5
    if quant is None:
        data = dense.to(dtype).to(device)
        exact = StoredWeight(data.double(), None, None, None, "dense", 0)
        return StoredWeight(data, None, None, None, "dense", 0), exact
    parts = [quantized(matrix, *quant, device) for matrix in dense]
    decoded = torch.stack([formats.dequantize(part, n, k, dtype).double() for part in parts])
    nested = [part.nested_absmax for part in parts if part.nested_absmax is not None]
    offset = [p.nested_offset.reshape(()) for p in parts if p.nested_offset is not None]
    weight = StoredWeight(
        torch.stack([part.data.reshape(-1) for part in parts]),
        torch.stack([part.absmax for part in parts if part.absmax is not None]),
        torch.stack(nested) if nested else None,
        torch.stack(offset) if offset else None,
        *quant[:2],
    )
    return weight, StoredWeight(decoded, None, None, None, "dense", 0)


def both(module: Any, weight: StoredWeight, ends: Tensor, n: int) -> contract.Op:
    def run(x: Tensor, bias: Tensor, a: Tensor, b: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
        update = ExpertsUpdate(a, b, 0.7)
        y, s = module.experts_linear(x, weight, n, bias, update, ends)
        rest = (weight, x.shape[1], update, ends, True, True)
        return (y, *module.experts_linear_backward(dy, x, s, *rest))

    return run


def check(
    ends: list[int],
    sizes: tuple[int, int, int],
    pair: tuple[torch.dtype, torch.dtype],
    quant: Quant,
    device: str,
    rows: int = 0,
) -> None:
    torch.manual_seed(0)
    (n, k, r), (dtype, adapter) = sizes, pair
    count, m = len(ends), rows or ends[-1]
    weight, exact = stacked(count, n, k, dtype, quant, device)
    inputs = [
        torch.randn(m, k).to(dtype),
        torch.randn(count, n).to(dtype),
        (torch.randn(count, r, k) * k**-0.5).to(adapter),
        (torch.randn(count, n, r) * r**-0.5).to(adapter),
        torch.randn(m, n).to(dtype),
    ]
    inputs = [t.to(device) for t in inputs]
    at = torch.tensor(ends, device=device)
    ours, plain = both(backend, weight, at, n), both(reference, weight, at, n)
    name = f"{ends} {sizes} {pair} {quant}"
    truth = both(reference, exact, at, n)
    contract.check(name, ours, plain, inputs, truth, reps=interpreter.REPS)


NF4: Quant = ("nf4", 64, True)


@pytest.mark.parametrize("pair", [(BF16, BF16), (BF16, FP32), (FP16, FP32), (FP32, FP32)])
def test_contract(pair: tuple[torch.dtype, torch.dtype], device: str) -> None:
    check([0, 19, 19, 37], (40, 64, 16), pair, NF4, device)


@pytest.mark.parametrize(
    ("ends", "sizes", "quant"),
    [
        ([33, 33, 33], (33, 64, 5), ("fp4", 32, False)),
        ([9, 20], (17, 65, 3), NF4),  # rows share bytes
        ([10, 21], (38, 30, 20), ("fp4", 64, False)),  # rows share blocks
        ([5, 5, 27], (48, 50, 4), None),
    ],
)
def test_formats(ends: list[int], sizes: tuple[int, int, int], quant: Quant, device: str) -> None:
    check(ends, sizes, (BF16, FP32), quant, device)


@pytest.mark.parametrize("each", [1, 30, 97, 257])
def test_every_number_of_rows(each: int, device: str) -> None:
    """Each tile, and one expert after the other above the limit; rows of none at the end."""
    check([each, 2 * each], (24, 64, 4), (BF16, FP32), NF4, device, 2 * each + 7)


def test_many_experts_and_no_rows(device: str) -> None:
    ends = torch.arange(64).div(9, rounding_mode="floor").tolist()
    check(ends, (32, 64, 2), (BF16, FP32), NF4, device)
    weight, _ = stacked(64, 32, 64, BF16, NF4, device)
    x = torch.empty(0, 64, dtype=BF16, device=device)
    at = torch.zeros(64, dtype=torch.int64, device=device)
    a, b = torch.randn(64, 2, 64, device=device), torch.randn(64, 32, 2, device=device)
    y, dx, dA, dB = both(backend, weight, at, 32)(x, torch.zeros(64, 32).to(x), a, b, x[:, :32])
    assert y.shape == (0, 32) and dx.shape == (0, 64)
    assert not dA.any() and not dB.any()
    y, s = backend.experts_linear(x, weight, 32, None, None, at)
    assert y.shape == (0, 32) and s.shape == (0,)


@pytest.mark.parametrize("arch", ["sm_90", "gfx942"])
def test_every_way_to_decode(arch: str, device: str) -> None:
    """Each architecture's own instructions."""
    if device != "cpu":
        pytest.skip("compiles for the GPU at hand only")
    with regimes.assume(arch):
        check([20, 37], (40, 128, 5), (BF16, FP32), NF4, device)


def test_the_limit_is_by_rows_per_expert(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    loop = experts.one_by_one

    def counted(*args: Any) -> Any:
        calls.append(args[1].shape[0])
        return loop(*args)

    monkeypatch.setattr(experts_linear, "one_by_one", counted)
    weight, _ = stacked(2, 16, 32, BF16, NF4, device)
    for rows in (512, 513):
        x = torch.randn(rows, 32, dtype=BF16, device=device)
        ends = torch.tensor([0, rows], device=device)
        backend.experts_linear(x, weight, 16, None, None, ends)
    assert calls == [513]
