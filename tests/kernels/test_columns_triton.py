from __future__ import annotations

import pytest
import torch
from fastlora_kernels import _launch, regimes
from fastlora_kernels.formats import StoredWeight
from torch import Tensor

from fastlora.backends import reference
from fastlora.backends import triton as backend
from tests import contract, interpreter
from tests.kernels.linear_setup import BF16, FP16, FP32, stored
from tests.kernels.weights import quantized

QUANTS = [None, ("nf4", 64, True), ("fp4", 32, False)]
SHAPES = [(33, 128), (17, 129), (20, 96)]  # rows that share bytes; blocks over several rows


def make(
    n: int, k: int, dtype: torch.dtype, quant: tuple[str, int, bool] | None, device: str
) -> tuple[StoredWeight, StoredWeight]:
    """Return a weight, and its values in float64."""
    dense = torch.randn(n, k)
    weight = stored(dense.to(dtype).to(device))
    if quant is not None:
        weight = quantized(dense, *quant, device)
    return weight, stored(reference.dequantize(weight, n, k, dtype).double())


@pytest.mark.parametrize("quant", QUANTS)
@pytest.mark.parametrize(
    ("dtype", "kind"), [(BF16, FP32), (BF16, BF16), (FP16, FP32), (FP32, FP32)]
)
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_weight_dots(
    n: int,
    k: int,
    dtype: torch.dtype,
    kind: torch.dtype,
    quant: tuple[str, int, bool] | None,
    device: str,
) -> None:
    weight, exact = make(n, k, dtype, quant, device)
    for r in (3, 20):
        a = torch.randn(r, k).to(kind).to(device)
        ours = backend.weight_dots(a, weight, n, dtype)
        plain = reference.weight_dots(a, weight, n, dtype)
        contract.compare("dots", ours, plain, a.double() @ exact.data.t())
        assert torch.equal(ours, backend.weight_dots(a, weight, n, dtype))


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_weight_dots_by_permutes(arch: str, device: str) -> None:
    if device != "cpu":
        pytest.skip("compiles for the GPU at hand only")
    weight, exact = make(33, 256, BF16, ("nf4", 64, True), device)
    a = torch.randn(5, 256)
    with regimes.assume(arch):
        ours = backend.weight_dots(a, weight, 33, BF16)
        squares = backend.weight_squares(weight, 33, 256, BF16)
    plain = reference.weight_dots(a, weight, 33, BF16)
    contract.compare("dots", ours, plain, a.double() @ exact.data.t())
    assert torch.allclose(squares.double(), exact.data.square().sum(1), rtol=1e-6)


@pytest.mark.parametrize("quant", QUANTS)
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize(("n", "k"), [*SHAPES, (70, 640)])
def test_weight_squares(
    n: int,
    k: int,
    dtype: torch.dtype,
    quant: tuple[str, int, bool] | None,
    device: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_launch, "_multiprocessors", lambda device: 3)
    weight, exact = make(n, k, dtype, quant, device)
    ours = backend.weight_squares(weight, n, k, dtype)
    plain = reference.weight_squares(weight, n, k, dtype)
    contract.compare("squares", ours, plain, exact.data.square().sum(1))


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize("m", [0, 1, 70])
def test_scale_columns(
    m: int, dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_launch, "_multiprocessors", lambda device: 2)
    z, dy = (torch.randn(m, 300).to(dtype).to(device) for _ in range(2))
    scale, bias = torch.randn(300).to(device), torch.randn(300).to(dtype).to(device)

    def run(module: object) -> object:
        def both(z: Tensor, dy: Tensor, scale: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
            y = module.scale_columns(z, scale, bias)  # type: ignore[attr-defined]
            plain = module.scale_columns(z, scale, None)  # type: ignore[attr-defined]
            back = module.scale_columns_backward  # type: ignore[attr-defined]
            return (y, plain, *back(dy, z, scale, True, True))

        return both

    inputs = [z, dy, scale, bias]
    contract.check("columns", run(backend), run(reference), inputs, reps=interpreter.REPS)  # type: ignore[arg-type]
    contract.check_layouts("columns", run(backend), [z, dy, scale, bias], [0, 1] if m else [])  # type: ignore[arg-type]


def test_only_what_is_needed(device: str) -> None:
    z, dy, scale = torch.randn(5, 7), torch.randn(5, 7), torch.randn(7)
    dz, none = backend.scale_columns_backward(dy, None, scale, True, False)
    assert torch.equal(dz, dy * scale)
    assert none.numel() == 0
    none, dscale = backend.scale_columns_backward(dy, z, scale, False, True)
    assert none.numel() == 0
    assert torch.allclose(dscale, (dy * z).sum(0), atol=1e-5)
    with pytest.raises(ValueError, match="needs z, got None"):
        backend.scale_columns_backward(dy, None, scale, True, True)
