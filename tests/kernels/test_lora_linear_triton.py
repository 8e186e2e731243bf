from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from fastlora_kernels import formats
from fastlora_kernels.formats import StoredWeight
from torch import Tensor

from fastlora import dispatch
from fastlora.backends import reference
from fastlora.backends import triton as backend
from fastlora.dispatch import Problem
from tests import contract
from tests.kernels.weights import quantized

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
PAIRS = [(BF16, BF16), (BF16, FP32), (FP16, FP16), (FP16, FP32), (FP32, FP32)]  # x, adapter
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
    ) -> None:
        def make(*shape: int, scale: float = 1.0, kind: torch.dtype = dtype) -> Tensor:
            return (torch.randn(shape) * scale).to(kind).to(device)

        dense = torch.randn(n, k) / k**0.5
        if quant is None:
            self.weight = StoredWeight(dense.to(dtype).to(device), None, None, 0.0, "dense", 0)
        else:
            self.weight = quantized(dense, *quant, device)
        exact = formats.dequantize(self.weight, n, k, dtype).double()
        self.exact = StoredWeight(exact, None, None, 0.0, "dense", 0)
        self.x, self.dy, self.bias = make(m, k), make(m, n), make(n)
        self.lora_A = make(r, k, scale=k**-0.5, kind=adapter)
        self.lora_B = make(n, r, scale=r**-0.5, kind=adapter)

    @property
    def inputs(self) -> list[Tensor]:
        return [self.x, self.bias, self.lora_A, self.lora_B, self.dy]


def both(module: Any, weight: StoredWeight) -> Any:
    """Return a function of (x, bias, A, B, dy) that gives y, dx, dA, dB through `module`."""

    def run(x: Tensor, bias: Tensor, a: Tensor, b: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
        y, s = module.lora_linear(x, weight, bias, a, b, SCALING)
        grads = module.lora_linear_backward(dy, x, s, weight, a, b, SCALING, True, True)
        return (y, *grads)

    return run


def check(setup: Setup, name: str) -> None:
    ours, plain = both(backend, setup.weight), both(reference, setup.weight)
    truth = both(reference, setup.exact)
    # For one token torch sums in a matrix-vector routine: in float32 that order shows.
    exact = setup.x.shape[0] == 1 and setup.lora_A.dtype == FP32
    factor = 2.0 if exact else contract.RMS_FACTOR
    contract.check(name, ours, plain, setup.inputs, truth, reps=1, rms_factor=factor)


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize(
    ("shape", "quant"),
    [
        ((1, 64, 64, 64), ("nf4", 64, True)),
        ((3, 17, 129, 3), ("fp4", 64, False)),  # rows share bytes
        ((17, 33, 128, 17), ("fp4", 32, True)),
        ((33, 129, 96, 8), ("nf4", 4096, True)),  # one block covers many rows
        ((65, 70, 30, 1), ("nf4", 64, False)),  # rows share blocks
        ((129, 3, 128, 2), ("nf4", 128, True)),  # above the crossover
    ],
)
def test_contract(
    shape: tuple[int, int, int, int],
    quant: tuple[str, int, bool],
    pair: tuple[torch.dtype, torch.dtype],
    device: str,
) -> None:
    check(Setup(*shape, *pair, quant, device), f"{shape} {pair} {quant}")


@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_long_sum_is_split(dtype: torch.dtype, device: str) -> None:
    check(Setup(3, 48, 512, 32, dtype, dtype, device=device), "split")
    check(Setup(3, 512, 64, 32, dtype, dtype, device=device), "split backward")


@pytest.mark.parametrize("m", [16, 31, 32, 63, 64, 127, 128])
def test_every_tile(m: int, device: str) -> None:
    check(Setup(m, 65, 64, 20, device=device), f"M={m}")


@pytest.mark.parametrize("m", [4, 200])
def test_dense_weight(m: int, device: str) -> None:
    check(Setup(m, 33, 50, 4, quant=None, device=device), "dense")


def test_layouts(device: str) -> None:
    setup = Setup(3, 16, 32, 2, device=device)
    run = both(backend, setup.weight)
    contract.check_layouts("y, dx", lambda *t: run(*t)[:2], setup.inputs, [0, 2, 3, 4])
    contract.check_layouts("dA, dB", lambda *t: run(*t)[2:], setup.inputs, [0, 4], exact=False)


@pytest.mark.parametrize("pair", [(BF16, BF16), (FP32, FP32)])
def test_not_finite(pair: tuple[torch.dtype, torch.dtype], device: str) -> None:
    setup = Setup(3, 16, 32, 2, *pair, device=device)
    ours, plain = both(backend, setup.weight), both(reference, setup.weight)
    contract.check_not_finite("not finite", ours, plain, setup.inputs, range(5))


@pytest.mark.parametrize("adapter", [BF16, FP32])
def test_infinity_stays_infinite(adapter: torch.dtype, device: str) -> None:
    """All terms are positive: an infinite x makes its row infinite, not NaN, and B its column."""
    setup = Setup(3, 32, 64, 4, BF16, adapter, ("nf4", 64, False), device)
    weight = setup.weight._replace(data=torch.full_like(setup.weight.data, 0xFF))
    x = setup.x.abs()
    x[1, 5] = float("inf")
    b = setup.lora_B.abs()
    b[7, 2] = float("inf")
    y, _ = backend.lora_linear(x, weight, None, setup.lora_A.abs(), b, SCALING)
    infinite = torch.zeros_like(y, dtype=torch.bool)
    infinite[1] = infinite[:, 7] = True
    assert torch.equal(torch.isposinf(y), infinite)
    assert torch.equal(torch.isfinite(y), ~infinite)


@pytest.mark.parametrize("m", [3, 130])
def test_writes_stay_inside(m: int, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every `torch.empty` of the launchers lies between guard bytes."""
    setup = Setup(m, 65, 33, 5, device=device)
    canaries: list[contract.Canary] = []

    def empty(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        canaries.append(contract.Canary(shape, dtype, str(device)))
        return canaries[-1].tensor

    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", empty)
        both(backend, setup.weight)(*setup.inputs)
    assert len(canaries) >= 2
    for canary in canaries:
        canary.check()


@pytest.mark.parametrize("m", [0, 3, 130])
def test_without_adapter_and_bias(m: int, device: str) -> None:
    setup = Setup(m, 33, 64, 1, device=device)
    y, s = backend.lora_linear(setup.x, setup.weight, None, None, None, 1.0)
    expected = setup.x.double() @ setup.exact.data.t()
    assert s.shape == (0,)
    assert s.dtype == FP32
    plain, _ = reference.lora_linear(setup.x, setup.weight, None, None, None, 1.0)
    contract.compare("y", y, plain, expected)
    args = (setup.dy, None, None, setup.weight, None, None, 1.0, True, False)
    dx, dA, dB = backend.lora_linear_backward(*args)
    assert dA.numel() == dB.numel() == 0
    wanted = reference.lora_linear_backward(*args)[0]
    contract.compare("dx", dx, wanted, setup.dy.double() @ setup.exact.data)


@pytest.mark.parametrize("m", [0, 3])
def test_s_is_exact_enough_for_float32(m: int, device: str) -> None:
    setup = Setup(m, 33, 640, 4, device=device)
    _, s = backend.lora_linear(setup.x, setup.weight, None, setup.lora_A, setup.lora_B, 1.0)
    expected = setup.x.double() @ setup.lora_A.double().t()
    assert s.shape == (m, 4)
    assert torch.allclose(s.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("m", [3, 130])
def test_only_what_is_needed(m: int, device: str) -> None:
    setup = Setup(m, 33, 64, 4, device=device)
    a, b, weight = setup.lora_A, setup.lora_B, setup.weight
    _, s = backend.lora_linear(setup.x, weight, None, a, b, SCALING)
    full = backend.lora_linear_backward(setup.dy, setup.x, s, weight, a, b, SCALING, True, True)
    dx, *none = backend.lora_linear_backward(
        setup.dy, None, None, weight, a, b, SCALING, True, False
    )
    assert torch.equal(dx, full[0])
    assert [t.numel() for t in none] == [0, 0]
    no_dx, dA, dB = backend.lora_linear_backward(
        setup.dy, setup.x, s, weight, a, b, SCALING, False, True
    )
    assert no_dx.numel() == 0
    assert torch.allclose(dA, full[1], rtol=1e-4, atol=1e-5)
    assert torch.equal(dB, full[2])
    with pytest.raises(ValueError, match="needs x and s, got None"):
        backend.lora_linear_backward(setup.dy, None, s, weight, a, b, SCALING, False, True)


def test_offsets_beyond_int32(tmp_path: Path, device: str) -> None:
    """Rows 2**30 elements apart, over a file with holes: an int32 offset would wrap around."""
    if device != "cpu":
        pytest.skip("maps a file into the memory of the CPU")
    setup = Setup(3, 32, 64, 2, device=device)
    stride, path = 2**30 + 64, tmp_path / "sparse"
    size = 2 * stride + 64
    with path.open("wb") as file:
        file.truncate(2 * size)
    far = torch.from_file(str(path), shared=True, size=size, dtype=BF16)
    rows = far.as_strided((3, 64), (stride, 1))
    rows.copy_(setup.x)
    args = (setup.weight, setup.bias, setup.lora_A, setup.lora_B, SCALING)
    assert torch.equal(backend.lora_linear(rows, *args)[0], backend.lora_linear(setup.x, *args)[0])


def test_split_reduction_covers_the_sum() -> None:
    from fastlora_kernels import _launch

    for tiles in (1, 3, 1000):
        for length in (1, 31, 64, 1000, 14336):
            device = torch.device("cpu")
            parts, span = _launch.split_reduction(tiles, length, 64, device)
            assert span % 64 == 0
            assert (parts - 1) * span < length <= parts * span


PROBLEM = Problem("lora_linear", "cpu", BF16, "nf4", 64, 4, 32, 64, 8, FP32)


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(backend, "_installed", lambda: True)
    assert backend.why_not(replace(PROBLEM, device="cuda")) is None
    assert "TRITON_INTERPRET=1" in str(backend.why_not(PROBLEM))
    assert "float64" in str(backend.why_not(replace(PROBLEM, device="cuda", dtype=torch.float64)))
    assert "got xpu" in str(backend.why_not(replace(PROBLEM, device="xpu")))
    assert "below 2**31" in str(backend.why_not(replace(PROBLEM, device="cuda", n=2**31)))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert backend.why_not(PROBLEM) is None
    assert "unset it" in str(backend.why_not(replace(PROBLEM, device="cuda")))
    monkeypatch.setattr(backend, "_installed", lambda: False)
    assert "pip install triton" in str(backend.why_not(PROBLEM))


def test_cpu_tensors_only_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert dispatch.pick(PROBLEM, "triton") is backend
    assert "cpu" not in backend.AUTO_DEVICES


def test_import_leaves_triton_alone() -> None:
    code = "import sys, fastlora.backends.triton; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
