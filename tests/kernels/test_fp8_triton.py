"""The kernels of fp8 compute: equal to the definition in its bits; the linear that uses them."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from fastlora_kernels import fp8, lora_linear, regimes
from fastlora_kernels.formats import BLOCKSIZES, FORMATS, StoredWeight
from torch import Tensor

import fastlora
from fastlora.backends import reference
from tests import contract
from tests.kernels.linear_setup import BF16, FP16, FP32, Setup, both
from tests.kernels.weights import quantized

pytest.importorskip("triton")
from fastlora_kernels import fp8_linear

MANY = 140  # tokens, above every crossover


@pytest.fixture(autouse=True)
def _units(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip on a GPU without the units; a torch without the product gets its definition."""
    if device == "cuda":
        reason = fp8.why_not_device(torch.device("cuda"))
        if reason is not None:
            pytest.skip(reason)
    elif fp8._why_not_torch(torch.device("cpu")) is not None:
        monkeypatch.setattr(torch, "_scaled_mm", defined_product)


def defined_product(
    q: Tensor, p: Tensor, scale_a: Tensor, scale_b: Tensor, out_dtype: torch.dtype, **_: bool
) -> Tensor:
    return ((q.float() @ p.float()) * scale_a * scale_b).to(out_dtype)


def same_bits(ours: Tensor, wanted: Tensor) -> bool:
    return torch.equal(ours.cpu().view(torch.uint8), wanted.view(torch.uint8))


def on_cpu(weight: StoredWeight) -> StoredWeight:
    parts: list[Any] = [part.cpu() if isinstance(part, Tensor) else part for part in weight]
    return StoredWeight(*parts)


def check_rows(x: Tensor, device: str) -> None:
    with contract.poisoned():
        q, s = fp8_linear.quantize_rows(x.to(device))
    wanted, scale = fp8.quantize_rows(x)
    assert q.dtype == fp8.E4M3 and s.shape == (x.shape[0], 1)
    assert torch.equal(s.cpu().nan_to_num(-1.0), scale.nan_to_num(-1.0))
    assert same_bits(q, wanted)


def check_weight(weight: StoredWeight, n: int, k: int) -> None:
    wanted, scale = fp8.quantize_weight(on_cpu(weight), n, k)
    for transposed in (False, True):
        with contract.poisoned(), fp8_linear.quantized_weight(weight, n, k, transposed) as (p, t):
            assert same_bits(p.t().contiguous() if transposed else p, wanted)
            assert torch.equal(t.cpu(), scale.expand(1, k if transposed else n))


@pytest.fixture(params=["", "sm_90"])
def decoder(request: pytest.FixtureRequest, device: str) -> Iterator[str]:
    """The look-up of each nibble, and the byte permutes of NVIDIA."""
    if request.param and device == "cpu":
        with regimes.assume(request.param):
            yield request.param
    elif request.param:
        pytest.skip("a GPU has its own")
    else:
        yield ""


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize("shape", [(1, 16), (3, 48), (5, 2048), (7, 2064), (2, 5008)])
def test_rows(shape: tuple[int, int], dtype: torch.dtype, device: str) -> None:
    check_rows((torch.randn(shape) * torch.logspace(-6, 3, shape[1])).to(dtype), device)


def test_rows_of_every_bfloat16(device: str) -> None:
    """Every finite pattern: steps, ties, and what vanishes in a row."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    values = bits.view(BF16).float()
    finite = values[values.isfinite()].to(BF16)
    check_rows(finite.view(-1, 2040), device)
    check_rows(finite.view(2040, -1).t(), device)


def test_special_rows(device: str) -> None:
    x = torch.randn(8, 4112).to(BF16)
    x[0] = 0
    x[1, 4100], x[2, 5], x[3, 7] = float("nan"), float("inf"), -float("inf")
    x[4] *= 2.0**120
    x[5] *= 2.0**-126
    x[6] = -0.0
    check_rows(x, device)
    q, s = fp8.quantize_rows(x)
    assert s.isnan().flatten().tolist() == [False, True, True, True, *[False] * 4]
    assert not q[0].float().any() and not q[1:4].float().any()
    assert q[4].float().abs().max() > 224 and q[7].float().abs().max() > 224


@pytest.mark.parametrize("layout", [name for name, _ in contract.layouts(torch.zeros(2, 2))])
def test_layouts_of_rows(layout: str, device: str) -> None:
    check_rows(dict(contract.layouts(torch.randn(9, 64).to(BF16)))[layout], device)


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("quant_type", sorted(FORMATS))
@pytest.mark.parametrize("shape", [(16, 16), (48, 80), (160, 272), (32, 1024)])
def test_weight(
    shape: tuple[int, int], quant_type: str, double: bool, decoder: str, device: str
) -> None:
    dense = torch.randn(shape) * torch.linspace(0.001, 2, shape[1])
    check_weight(quantized(dense, quant_type, 64, double, device), *shape)


@pytest.mark.parametrize("blocksize", BLOCKSIZES)
@pytest.mark.parametrize("double", [False, True])
def test_every_blocksize(blocksize: int, double: bool, decoder: str, device: str) -> None:
    dense = torch.randn(48, 144) * torch.logspace(-5, 1, 48)[:, None]
    check_weight(quantized(dense, "nf4", blocksize, double, device), 48, 144)


def test_every_byte(decoder: str, device: str) -> None:
    data = torch.arange(256, dtype=torch.uint8).repeat(4).view(32, 32).to(device)
    weight = StoredWeight(data, (torch.rand(32) * 3).to(device), None, None, "fp4", 64)
    check_weight(weight, 32, 64)


def test_unaligned_and_zero_weights(decoder: str, device: str) -> None:
    weight = quantized(torch.randn(32, 64), "nf4", 64, True, device)
    moved = torch.cat([weight.data.flatten()[:1], weight.data.flatten()])[1:].view(32, 32)
    check_weight(weight._replace(data=moved), 32, 64)
    check_weight(quantized(torch.zeros(32, 64), "nf4", 64, False, device), 32, 64)


class _Recorder:
    """Takes the kernel's place and keeps the constants of its launch."""

    def __getitem__(self, grid: object) -> _Recorder:
        return self

    def __call__(self, *args: object, **constants: object) -> None:
        self.constants = constants


def test_words_are_read_only_where_they_are_aligned(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = _Recorder()
    monkeypatch.setattr(fp8_linear, "fp8_dequantize_fwd_kernel", recorder)
    weight = quantized(torch.randn(32, 64), "nf4", 64, True, "cpu")
    moved = torch.cat([weight.data.flatten()[:1], weight.data.flatten()])[1:].view(32, 32)
    with regimes.assume("sm_90"):
        for data, how in ((weight.data, "prmt"), (moved, "gather")):
            with fp8_linear.quantized_weight(weight._replace(data=data), 32, 64, True):
                assert recorder.constants["DECODE"] == how


def test_weight_that_is_not_finite(device: str) -> None:
    weight = quantized(torch.randn(32, 64), "nf4", 64, False, device)
    assert weight.absmax is not None
    for value in (float("inf"), float("nan")):
        weight.absmax[3] = value
        with fp8_linear.quantized_weight(weight, 32, 64, False) as (_, t):
            assert t.isnan().all()
        assert fp8.weight_scale(on_cpu(weight)).isnan()


def test_writes_stay_inside(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    canaries: list[contract.Canary] = []

    def empty(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        canaries.append(contract.Canary(shape, dtype, str(device)))
        return canaries[-1].tensor

    weight, x = quantized(torch.randn(48, 80), "nf4", 64, True, device), torch.randn(5, 80)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", empty)
        fp8_linear.quantize_rows(x.to(device))
        for transposed in (False, True):
            with fp8_linear.quantized_weight(weight, 48, 80, transposed):
                pass
    assert len(canaries) >= 4
    for canary in canaries:
        canary.check()


def eight(setup: Setup) -> Setup:
    setup.weight = setup.weight._replace(compute="fp8")
    return setup


@pytest.mark.parametrize(
    ("shape", "pair"),
    [((MANY + 1, 32, 64, 4), (BF16, FP32)), ((MANY, 48, 80, 33), (FP16, FP16))],
)
def test_both_directions(
    shape: tuple[int, int, int, int], pair: tuple[torch.dtype, torch.dtype], device: str
) -> None:
    """y and dx are those of the definition but for roundings to 16 bits; dA and dB are exact."""
    spans = [(0, 3)] * shape[0]
    setup = eight(Setup(*shape, *pair, device=device, dropout=0.3, spans=spans))
    ours, wanted = both(lora_linear, setup)(*setup.inputs), both(reference, setup)(*setup.inputs)
    for mine, theirs in zip(ours[:2], wanted[:2], strict=True):
        error = (mine.double() - theirs.double()).norm() / theirs.double().norm()
        assert mine.dtype == pair[0] and error < 2.0**-8
    exact = both(lora_linear, exactly(setup))(*setup.inputs)
    assert all(torch.equal(a, b) for a, b in zip(ours[2:], exact[2:], strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(ours[:2], exact[:2], strict=True))


def exactly(setup: Setup) -> Setup:
    """Return the same operands, to be multiplied in 16 bits."""
    other = object.__new__(Setup)
    vars(other).update(vars(setup), weight=setup.weight._replace(compute="auto"))
    return other


@pytest.mark.parametrize("m", [1, 16, 100])
def test_few_tokens_are_exact(m: int, device: str) -> None:
    setup = eight(Setup(m, 64, 128, 4, device=device))
    ours, exact = (both(lora_linear, s)(*setup.inputs) for s in (setup, exactly(setup)))
    assert all(torch.equal(a, b) for a, b in zip(ours, exact, strict=True))


def test_without_adapter_and_bias(device: str) -> None:
    setup = eight(Setup(MANY, 64, 128, 1, device=device))
    for bias in (None, setup.bias):
        y, _ = lora_linear.lora_linear(setup.x, setup.weight, bias, None)
        wanted, _ = reference.lora_linear(setup.x, setup.weight, bias, None)
        assert (y.float() - wanted.float()).norm() < 2.0**-8 * wanted.float().norm()
    args = (None, None, setup.weight, None, True, False)
    dx, dA, dB = lora_linear.lora_linear_backward(setup.dy, *args)
    wanted, *_ = reference.lora_linear_backward(setup.dy, *args)
    assert (dx.float() - wanted.float()).norm() < 2.0**-8 * wanted.float().norm()
    assert dA.numel() == dB.numel() == 0


def test_a_patched_model_takes_this_way(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """From `patch_model` to the kernels and back, and the report."""
    if device == "cpu":
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    before = torch.nn.Sequential(torch.nn.Linear(64, 32)).to(BF16).to(device)
    x = torch.randn(2, MANY // 2, 64).to(BF16).to(device)
    found = []
    for kind in ("triton", "reference"):
        model = copy.deepcopy(before)
        config = fastlora.LoraConfig(r=2, target_modules=["0"])
        fastlora.patch_model(model, config, quantize="nf4", backend=kind, compute="fp8")
        row = fastlora.report(model)["modules"][0]
        assert row["backend"] == kind and 0.03 < row["fp8_error"] < 0.045
        leaf = x.clone().requires_grad_()
        y = model(leaf)
        y.float().square().sum().backward()
        assert leaf.grad is not None
        found.append((y.detach().float(), leaf.grad.float()))
    for ours, wanted in zip(*found, strict=True):
        assert (
            ours - wanted
        ).norm() < 0.01 * wanted.norm()  # dy of the other is a little different


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_rows_that_are_not_finite(value: float, device: str) -> None:
    setup = eight(Setup(MANY, 64, 128, 4, device=device))
    setup.x[3, 100], setup.dy[7, 5] = value, value
    y, dx, _, _ = both(lora_linear, setup)(*setup.inputs)
    for result, row in ((y, 3), (dx, 7)):
        bad = ~result.isfinite().all(1)
        assert bad.nonzero().flatten().tolist() == [row] and result[row].isnan().all()


def test_zero_rows_and_no_rows_of_gradient(device: str) -> None:
    setup = eight(Setup(MANY, 64, 128, 4, device=device))
    setup.x[5] = 0
    y, _ = lora_linear.lora_linear(setup.x, setup.weight, None, setup.update())
    assert not y[5].any() and y.isfinite().all()


@pytest.mark.parametrize("quant_type", sorted(FORMATS))
def test_measured_error(quant_type: str) -> None:
    """Of normal values: about 2.6 % for the rounding of one operand, 3.7 % for the product."""
    weight = quantized(torch.randn(256, 512), quant_type, 64, True, "cpu")
    error = fp8.relative_error(weight, 256, 512, BF16, 8)
    assert 0.030 < error < 0.045
    assert error == fp8.relative_error(weight, 256, 512, BF16, 8)
    large = quantized(torch.randn(1100, 48), quant_type, 4096, True, "cpu")
    assert 0.030 < fp8.relative_error(large, 1100, 48, BF16, 8) < 0.045
    rows = torch.randn(64, 512)
    q, s = fp8.quantize_rows(rows)
    assert 0.02 < float((q.float() * s - rows).norm() / rows.norm()) < 0.03


def test_scales_are_the_least_powers_of_two() -> None:
    peaks = torch.cat([torch.rand(1000) * 1000, torch.tensor([448.0, 448.1, 1.75, 7.0, 3e38])])
    scale = fp8.power_of_two(peaks)
    assert torch.equal(torch.frexp(scale).mantissa, torch.full_like(scale, 0.5))
    assert (peaks / scale <= 448).all() and (peaks / scale > 224).all()
