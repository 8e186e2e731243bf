from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fastlora_kernels import regimes
from torch import Tensor

from fastlora import dispatch
from fastlora.backends import reference
from fastlora.backends import triton as backend
from fastlora.dispatch import Problem
from tests import contract
from tests.kernels.linear_setup import BF16, FP16, FP32, Setup, both, check

PAIRS = [(BF16, BF16), (BF16, FP32), (FP16, FP16), (FP16, FP32), (FP32, FP32)]  # x, adapter


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


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "gfx942"])
@pytest.mark.parametrize(("dtype", "nested"), [(BF16, True), (FP16, False)])
def test_every_way_to_decode(arch: str, dtype: torch.dtype, nested: bool, device: str) -> None:
    """Each architecture's own tiles, orders of columns and instructions."""
    if device != "cpu":
        pytest.skip("compiles for the GPU at hand only")
    with regimes.assume(arch):
        for m, k, r in ((1, 512, 64), (7, 256, 5), (30, 192, 5)):  # few ranks: errors are luck
            setup = Setup(m, 70, k, r, dtype, FP32, ("nf4", 64, nested), device)
            check(setup, f"{arch} {dtype} M={m} K={k}")


@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_long_sum_is_split(
    dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastlora_kernels import _launch

    monkeypatch.setattr(_launch, "_multiprocessors", lambda device: 4)
    check(Setup(3, 48, 1024, 32, dtype, dtype, device=device), "split")
    check(Setup(3, 1024, 64, 32, dtype, dtype, device=device), "split backward")
    check(Setup(200, 48, 640, 18, dtype, dtype, device=device), "split above the crossover")


@pytest.mark.parametrize("m", [8, 16, 31, 32, 63, 64, 127, 128])
def test_every_tile(m: int, device: str) -> None:
    check(Setup(m, 65, 64, 20, device=device), f"M={m}")


@pytest.mark.parametrize("m", [4, 200])
@pytest.mark.parametrize("r", [4, 40])
def test_dense_weight(m: int, r: int, device: str) -> None:
    check(Setup(m, 33, 50, r, quant=None, device=device), "dense")


@pytest.mark.parametrize("m", [3, 140])
def test_layouts(m: int, device: str) -> None:
    setup = Setup(m, 16, 32, 2, device=device)
    run = both(backend, setup)
    contract.check_layouts("y, dx", lambda *t: run(*t)[:2], setup.inputs, [0, 2, 3, 4], m == 3)
    contract.check_layouts("dA, dB", lambda *t: run(*t)[2:], setup.inputs, [0, 4])


@pytest.mark.parametrize("m", [1, 3, 140])
@pytest.mark.parametrize("pair", [(BF16, BF16), (BF16, FP32), (FP16, FP32), (FP32, FP32)])
def test_not_finite(m: int, pair: tuple[torch.dtype, torch.dtype], device: str) -> None:
    setup = Setup(m, 16, 32, 2, *pair, device=device)
    ours, plain = both(backend, setup), both(reference, setup)
    contract.check_not_finite("not finite", ours, plain, setup.inputs, range(5))


@pytest.mark.parametrize("m", [3, 140])
@pytest.mark.parametrize("adapter", [BF16, FP32])
def test_infinity_stays_infinite(m: int, adapter: torch.dtype, device: str) -> None:
    """All terms are positive: an infinite x makes its row infinite, not NaN, and B its column."""
    setup = Setup(m, 32, 64, 4, BF16, adapter, ("nf4", 64, False), device)
    weight = setup.weight._replace(data=torch.full_like(setup.weight.data, 0xFF))
    x = setup.x.abs()
    x[1, 5] = float("inf")
    b = setup.lora_B.abs()
    b[7, 2] = float("inf")
    y, _ = backend.lora_linear(x, weight, None, setup.update(setup.lora_A.abs(), b))
    infinite = torch.zeros_like(y, dtype=torch.bool)
    infinite[1] = infinite[:, 7] = True
    assert torch.equal(torch.isposinf(y), infinite)
    assert torch.equal(torch.isfinite(y), ~infinite)


@pytest.mark.parametrize("m", [1, 3, 130])
@pytest.mark.parametrize("r", [5, 33])
def test_writes_stay_inside(m: int, r: int, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every `torch.empty` of the launchers lies between guard bytes."""
    setup = Setup(m, 65, 33, r, device=device, dropout=0.3, spans=[(1, r - 1)] * m)
    canaries: list[contract.Canary] = []

    def empty(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        canaries.append(contract.Canary(shape, dtype, str(device)))
        return canaries[-1].tensor

    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", empty)
        both(backend, setup)(*setup.inputs)
    assert len(canaries) >= 6
    for canary in canaries:
        canary.check()


@pytest.mark.parametrize("m", [0, 3, 130])
def test_without_adapter_and_bias(m: int, device: str) -> None:
    setup = Setup(m, 33, 64, 1, device=device)
    y, s = backend.lora_linear(setup.x, setup.weight, None, None)
    expected = setup.x.double() @ setup.exact.data.t()
    assert s.shape == (0,)
    assert s.dtype == FP32
    plain, _ = reference.lora_linear(setup.x, setup.weight, None, None)
    contract.compare("y", y, plain, expected)
    dx, dA, dB = backend.lora_linear_backward(setup.dy, None, None, setup.weight, None, True, False)
    assert dA.numel() == dB.numel() == 0
    wanted = reference.lora_linear_backward(setup.dy, None, None, setup.weight, None, True, False)
    contract.compare("dx", dx, wanted[0], setup.dy.double() @ setup.exact.data)


@pytest.mark.parametrize("m", [0, 3, 140])
def test_s_is_exact_enough_for_float32(m: int, device: str) -> None:
    setup = Setup(m, 33, 640, 4, device=device)
    _, s = backend.lora_linear(setup.x, setup.weight, None, setup.update())
    expected = setup.x.double() @ setup.lora_A.double().t()
    assert s.shape == (m, 4)
    assert torch.allclose(s.double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("m", [3, 130])
@pytest.mark.parametrize("r", [4, 40])
def test_only_what_is_needed(m: int, r: int, device: str) -> None:
    setup = Setup(m, 33, 64, r, device=device)
    update, weight = setup.update(), setup.weight
    _, s = backend.lora_linear(setup.x, weight, None, update)
    full = backend.lora_linear_backward(setup.dy, setup.x, s, weight, update, True, True)
    dx, *none = backend.lora_linear_backward(setup.dy, None, None, weight, update, True, False)
    assert torch.allclose(dx, full[0], rtol=1e-2, atol=1e-2)
    assert [t.numel() for t in none] == [0, 0]
    no_dx, dA, dB = backend.lora_linear_backward(setup.dy, setup.x, s, weight, update, False, True)
    assert no_dx.numel() == 0
    assert torch.allclose(dA, full[1], rtol=1e-4, atol=1e-5)
    assert torch.allclose(dB, full[2], rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="needs x and s, got None"):
        backend.lora_linear_backward(setup.dy, None, s, weight, update, False, True)


@pytest.mark.parametrize("m", [3, 140])
def test_offsets_beyond_int32(m: int, tmp_path: Path, device: str) -> None:
    """Rows 2**30 elements apart, over a file with holes: an int32 offset would wrap around."""
    if device != "cpu":
        pytest.skip("maps a file into the memory of the CPU")
    setup = Setup(m, 32, 64, 2, device=device)
    stride, path = 2**30 + 64, tmp_path / "sparse"
    size = 2 * stride + 64
    with path.open("wb") as file:
        file.truncate(2 * size)
    far = torch.from_file(str(path), shared=True, size=size, dtype=BF16)
    rows = far.as_strided((3, 64), (stride, 1))
    rows.copy_(setup.x[:3])
    args = (setup.weight, setup.bias, setup.update())
    near = backend.lora_linear(setup.x[:3], *args)
    for ours, right in zip(backend.lora_linear(rows, *args), near, strict=True):
        assert torch.equal(ours, right)
    dy, s = setup.dy[:3], near[1]
    far_grads = backend.lora_linear_backward(dy, rows, s, setup.weight, setup.update(), False, True)
    grads = backend.lora_linear_backward(
        dy, setup.x[:3], s, setup.weight, setup.update(), False, True
    )
    assert all(map(torch.equal, far_grads, grads))


PROBLEM = Problem("lora_linear", "cpu", BF16, "nf4", 64, 4, 32, 64, 8, FP32)


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(backend, "_installed", lambda: True)
    assert backend.why_not(replace(PROBLEM, device="cuda")) is None
    assert "TRITON_INTERPRET=1" in str(backend.why_not(PROBLEM))
    assert "float64" in str(backend.why_not(replace(PROBLEM, device="cuda", dtype=torch.float64)))
    adapter = replace(PROBLEM, device="cuda", adapter_dtype=FP16)
    assert "adapters of float32 or torch.bfloat16, got" in str(backend.why_not(adapter))
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
