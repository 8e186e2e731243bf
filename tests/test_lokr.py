"""LoKr: equal to PEFT's for every factorisation, on dense and decoded bases."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from fastlora_kernels import native_kron, native_library, native_products
from fastlora_kernels.formats import StoredWeight
from torch import nn

import fastlora
from fastlora import LoHaConfig, LoKrConfig, patch_model
from fastlora.adapters import METHODS, AdapterConfig
from fastlora.adapters.lokr import divide
from fastlora.kron import kron_linear
from tests.models import fill_adapters, peft_model, plain
from tests.twins import assert_same, twin

X = torch.randn(3, 32, generator=torch.Generator().manual_seed(3))
REFERENCE: dict[str, Any] = {"backend": "reference"}
# The linears are 64 x 32, 32 x 64 and 8 x 32.
CONFIGS = {
    "both full": LoKrConfig(r=20, alpha=30),
    "w2 low": LoKrConfig(r=2, alpha=5),
    "both low": LoKrConfig(r=1, alpha=3, decompose_both=True),
    "only w1 low": LoKrConfig(r=4, decompose_factor=16, decompose_both=True),
    "factor 2": LoKrConfig(r=5, decompose_factor=2),
    "factor 1": LoKrConfig(r=3, decompose_factor=1),
    "factor that divides nothing": LoKrConfig(r=2, decompose_factor=7),
    "factor of all": LoKrConfig(r=2, decompose_factor=64, decompose_both=True),
}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("quantize", [None, "nf4"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)], ids=str
)
def test_same_as_peft(
    name: str, quantize: str | None, dtype: torch.dtype, tolerance: float, tmp_path: Path
) -> None:
    ours = patch_model(plain(dtype=dtype), CONFIGS[name], quantize=quantize, **REFERENCE)
    fill_adapters(ours)
    assert_same(ours, twin(ours, tmp_path / "a"), X.to(dtype), tolerance)


def test_division_is_that_of_peft() -> None:
    from peft.tuners.lokr.layer import factorization

    for dimension in (1, 2, 7, 12, 36, 48, 97, 128, 360, 1000, 4096, 11008):
        for factor in (-1, 0, 1, 2, 3, 5, 7, 8, 12, 16, 35, 36, 64, 127, 5000, 11008):
            assert divide(dimension, factor) == factorization(dimension, factor)


@pytest.mark.parametrize("n", [1, 8, 30, 97])
@pytest.mark.parametrize("k", [1, 6, 48, 64])
def test_shapes_are_those_of_peft(n: int, k: int) -> None:
    for r in (1, 2, 4, 40):
        for factor in (-1, 1, 3, 8):
            for both in (False, True):
                config = LoKrConfig(
                    r=r, decompose_factor=factor, decompose_both=both, target_modules=["0"]
                )
                spec = METHODS["lokr"].spec(config, "0", n, k)
                model = peft_model(nn.Sequential(nn.Linear(k, n)), config)
                theirs = {
                    name.split(".")[-2]: tuple(p.shape)
                    for name, p in model.named_parameters()
                    if "lokr" in name
                }
                assert dict(spec.shapes) == theirs


@pytest.mark.parametrize("init", [True, False, "lycoris"])
@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("r", [1, 40])
def test_first_values_are_distributed_as_those_of_peft(
    init: bool | str, both: bool, r: int
) -> None:
    config = LoKrConfig(r=r, init_weights=init, decompose_both=both, target_modules=["up"])
    ours = patch_model(plain(), config, **REFERENCE)
    layer: Any = ours.get_submodule("blocks.0.up")
    theirs = peft_model(plain(), config).base_model.model.blocks[0].up
    for name, parameter in layer.adapter_params().items():
        other = getattr(theirs, name)["default"]
        assert parameter.shape == other.shape and bool(parameter.any()) == bool(other.any())
        bound = 1 / parameter.shape[1] ** 0.5
        assert parameter.abs().max() <= bound and other.abs().max() <= bound
        assert not parameter.any() or parameter.numel() < 16 or parameter.abs().max() > 0.6 * bound
    zeros = [name for name, p in layer.adapter_params().items() if not p.any()]
    assert len(zeros) == (0 if init is False else 1)


def test_report_and_peft_config() -> None:
    from peft import LoKrConfig as PeftConfig

    theirs = PeftConfig(r=3, alpha=6, decompose_factor=4, target_modules=["up"])
    row = fastlora.report(patch_model(plain(), theirs, **REFERENCE))["modules"][0]
    assert (row["method"], row["r"], row["scaling"]) == ("lokr", 3, 2.0)
    assert row["backend"] == "reference" and row["notes"] == ""
    full = fastlora.report(patch_model(plain(), CONFIGS["both full"], **REFERENCE))["modules"][0]
    assert full["notes"] == "update computed beside the fused linear"


@pytest.mark.parametrize("r", [1, 40])
@pytest.mark.parametrize("scale", [False, True])
def test_rank_dropout_drops_rows(r: int, scale: bool) -> None:
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(8, 400, bias=False))
    config = LoKrConfig(r=r, init_weights=False, rank_dropout=0.25, rank_dropout_scale=scale)
    patch_model(model, config, **REFERENCE)
    layer, x = model[0], torch.randn(16, 8)

    def update() -> torch.Tensor:
        y: torch.Tensor = (layer(x) - x @ layer.dense_weight().t()).detach()
        return y

    dropped = update()
    model.eval()
    whole = update()
    gone = (dropped.abs() < 1e-6).all(0)
    assert 0.15 < gone.float().mean() < 0.35
    factor = (dropped[:, ~gone] * whole[:, ~gone]).sum() / whole[:, ~gone].square().sum()
    expected = 1 / (~gone).float().mean() if scale else torch.tensor(1.0)
    torch.testing.assert_close(factor, expected, rtol=1e-3, atol=1e-3)


def test_module_dropout_drops_whole_calls() -> None:
    model: Any = nn.Sequential(nn.Linear(8, 40))
    config = LoKrConfig(r=20, init_weights=False, module_dropout=0.5)
    patch_model(model, config, **REFERENCE)
    x = torch.randn(2, 8)
    base = nn.functional.linear(x, model[0].dense_weight(), model[0].bias)
    alone = [torch.equal(model(x), base) for _ in range(20)]
    assert 3 < sum(alone) < 17


@pytest.mark.parametrize("config", [LoHaConfig(r=2), *CONFIGS.values()], ids=["loha", *CONFIGS])
def test_reference_uses_no_kernel(config: AdapterConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """backend="reference" is PyTorch alone: it needs no library."""
    model = patch_model(plain(), config, **REFERENCE)
    fill_adapters(model)

    def refuse(*arguments: object, **more: object) -> None:
        raise AssertionError("the library was called")

    monkeypatch.setattr(native_library, "library", refuse)
    for module in (native_kron, native_products):
        monkeypatch.setattr(module, "library", refuse)
    model(X).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_large_factors_are_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel's sums for the gradients grow with the factors, in every thread."""
    w1, w2 = torch.randn(2, 2), torch.randn(200, 200, requires_grad=True)
    x, dense = torch.randn(3, 400), torch.randn(400, 400)
    monkeypatch.setattr(native_kron, "add_kron", None)

    def run(size: int) -> torch.Tensor:
        weight = StoredWeight(dense[:size, :size].contiguous(), None, None, None, "dense", 0)
        return kron_linear(x[:, :size], weight, None, w1, w2[: size // 2, : size // 2])

    expected = x @ (dense + torch.kron(w1, w2)).t()
    torch.testing.assert_close(run(400), expected, rtol=1e-4, atol=1e-3)
    with pytest.raises(TypeError):
        run(40)


def test_report_tells_the_form_that_is_computed() -> None:
    """Rank 64 where products of low rank are cheap; on most CPUs the kernel costs less."""
    for backend in ("reference", "native"):
        model: Any = nn.Sequential(nn.Linear(512, 512))
        config = LoKrConfig(r=8, decompose_factor=8)
        row = fastlora.report(patch_model(model, config, backend=backend))["modules"][0]
        kron = not METHODS["lokr"].rank(model[0].adapter, "cpu", backend)
        assert (row["notes"] == "update computed beside the fused linear") == kron
        model(torch.randn(2, 512)).sum().backward()
        assert (METHODS["lokr"].factors(model[0].adapter_params(), backend) is None) == kron
        assert kron == (backend == "native" and native_library.isa() != "amx")
