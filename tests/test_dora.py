"""DoRA: equal to PEFT's, merged exactly, with the norm kept in inference; a magnitude elsewhere."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import fastlora
from fastlora import LoHaConfig, LoKrConfig, LoraConfig, ops, patch_model
from fastlora.adapters import METHODS, AdapterConfig, magnitude
from fastlora.layers import AdapterLinear, to_adapter_linear
from fastlora.quant import QuantConfig
from tests.models import fill_adapters, peft_model, plain
from tests.twins import assert_same, twin

X = torch.randn(3, 32, generator=torch.Generator().manual_seed(3))
REFERENCE: dict[str, Any] = {"backend": "reference"}


def dora(quantize: str | None = None, dtype: torch.dtype = torch.float32, **fields: Any) -> Any:
    config = LoraConfig(**{"r": 4, "lora_alpha": 6, "use_dora": True, **fields})
    return patch_model(plain(dtype=dtype), config, quantize=quantize, **REFERENCE)


def fill(model: nn.Module) -> None:
    """Give the adapters values as after training."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                noise = 0.2 * torch.randn(parameter.shape)
                own = parameter if magnitude.NAME in name else 0 * parameter
                parameter.copy_(own * (1 + noise) + (own == 0) * noise)


@pytest.mark.parametrize("quantize", [None, "nf4"])
@pytest.mark.parametrize("init", [True, False])
def test_first_magnitudes_are_the_norms(quantize: str | None, init: bool) -> None:
    model = dora(quantize, init_lora_weights=init)
    for block in model.blocks:
        layer = block.up
        total = layer.dense_weight() + 1.5 * layer.lora_B @ layer.lora_A
        norm = torch.linalg.vector_norm(total, dim=1)
        torch.testing.assert_close(layer.lora_magnitude_vector.detach(), norm.detach())
    other = peft_model(plain(), LoraConfig(r=4, use_dora=True, target_modules=["up"]))
    if quantize is None and init:
        first = other.base_model.model.blocks[0].up.lora_magnitude_vector["default"].weight
        torch.testing.assert_close(model.blocks[0].up.lora_magnitude_vector, first)


@pytest.mark.parametrize("quantize", [None, "nf4"])
@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 4e-2)], ids=str
)
def test_same_as_peft(
    quantize: str | None, rslora: bool, dtype: torch.dtype, tolerance: float, tmp_path: Path
) -> None:
    ours = dora(quantize, dtype, use_rslora=rslora)
    fill(ours)
    assert_same(ours, twin(ours, tmp_path / "a"), X.to(dtype), tolerance)


class Seeded(nn.Module):
    """A model whose dropout is the same in every call."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.base_model = nn.ModuleDict({"model": model})

    def forward(self, x: Tensor) -> Tensor:
        torch.manual_seed(5)
        y: Tensor = self.base_model["model"](x)
        return y


class OurDropout(nn.Module):
    """Our dropout in the place of PEFT's: the same seeds in the same order."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        return ops.drop(x, ops.dropout_seed(x), self.p)


@pytest.mark.parametrize("quantize", [None, "nf4"])
@pytest.mark.parametrize("use_dora", [False, True])
def test_dropout_is_used_as_in_peft(quantize: str | None, use_dora: bool, tmp_path: Path) -> None:
    ours = dora(quantize, lora_dropout=0.4, use_dora=use_dora)
    fill(ours)
    theirs = twin(ours, tmp_path / "a").base_model.model
    for module in theirs.modules():
        if hasattr(module, "lora_dropout"):
            module.lora_dropout["default"] = OurDropout(0.4)
    ours.train(), theirs.train()
    assert_same(Seeded(ours), Seeded(theirs), X, 1e-5)
    assert not torch.allclose(ours(X), ours(X))


def test_the_norm_counts_as_constant() -> None:
    model: Any = nn.Sequential(nn.Linear(32, 8))
    patch_model(model, LoraConfig(r=4, use_dora=True), **REFERENCE)
    fill(model)
    layer = model[0]
    y = layer(X)
    y.sum().backward()
    g = layer.lora_magnitude_vector / torch.linalg.vector_norm(
        layer.dense_weight() + 2 * layer.lora_B @ layer.lora_A, dim=1
    )
    expected = 2 * g.unsqueeze(1) * (X @ layer.lora_A.t()).sum(0)
    torch.testing.assert_close(layer.lora_B.grad, expected.detach(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_merge_of_magnitudes(quantize: str | None) -> None:
    model = dora(quantize)
    fill(model)
    y = model(X)
    layer = model.blocks[0].up
    expected = layer.lora_magnitude_vector.detach().abs()
    fastlora.merge(model)
    assert type(model.blocks[0].up) is nn.Linear
    norm = torch.linalg.vector_norm(model.blocks[0].up.weight, dim=1)
    torch.testing.assert_close(norm, expected)
    torch.testing.assert_close(model(X), y.detach(), rtol=1e-4, atol=1e-5)
    assert not [name for name, _ in model.named_parameters() if magnitude.NAME in name]


def test_a_row_of_zeros_stays_one() -> None:
    model: Any = nn.Sequential(nn.Linear(32, 8))
    with torch.no_grad():
        model[0].weight[3] = 0
    patch_model(model, LoraConfig(r=4, use_dora=True), **REFERENCE)
    y = model(X)
    assert torch.equal(y[:, 3], model[0].bias[3].expand(3))
    y.sum().backward()
    assert all(bool(torch.isfinite(p.grad).all()) for p in model.parameters() if p.requires_grad)
    fastlora.merge(model)
    assert bool(torch.isfinite(model[0].weight).all())


def counted(real: Callable[..., Any], name: str, calls: list[str]) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        calls.append(name)
        return real(*args)

    return call


def test_sums_over_the_weight_are_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    for name in ("weight_dots", "weight_squares"):
        real = getattr(ops, name)
        monkeypatch.setattr(ops, name, counted(real, name, calls))
    model: Any = nn.Sequential(nn.Linear(32, 8))
    patch_model(model, LoraConfig(r=4, use_dora=True), quantize="nf4", **REFERENCE)
    fill(model)
    calls.clear()
    for _ in range(3):
        model(X).sum().backward()
    assert calls == ["weight_dots"] * 3  # training: the squares are those of the first values
    calls.clear()
    model.eval().zero_grad()
    with torch.no_grad():
        y = [model(X) for _ in range(3)]
        assert calls == ["weight_squares", "weight_dots"]
        model[0].lora_A.add_(1)
        changed = model(X)
        assert calls[2:] == ["weight_dots"] and not torch.allclose(changed, y[0])
        calls.clear()
        model[0].lora_magnitude_vector.mul_(2)
        louder = model(X)
        assert calls == ["weight_dots"]
        calls.clear()
        model(X.bfloat16()), model(X.bfloat16())
        assert calls == ["weight_squares", "weight_dots"]  # decoded to another dtype
    bias = model[0].bias
    torch.testing.assert_close(louder - bias, 2 * (changed - bias))


def test_a_weight_that_changes_is_noticed() -> None:
    model: Any = nn.Sequential(nn.Linear(32, 8))
    patch_model(model, LoraConfig(r=4, use_dora=True), **REFERENCE).eval()
    fill(model)
    with torch.no_grad():
        model(X)
        model[0].weight.add_(0.1)
        kept = model(X)
    fresh = copy.deepcopy(model)
    assert torch.equal(kept, fresh(X))


def test_the_device_and_the_dtype_may_change() -> None:
    model = dora("nf4").eval()
    fill(model)
    with torch.no_grad():
        y = model(X)
        model.to(torch.bfloat16)
        assert torch.allclose(model(X.bfloat16()).float(), y, rtol=0.1, atol=0.1)
        assert torch.allclose(model.float()(X), y, rtol=0.05, atol=0.05)


def test_autocast_and_copies() -> None:
    model = dora("nf4").eval()
    fill(model)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        y = model(X)
        assert y.dtype == torch.bfloat16
        assert torch.equal(copy.deepcopy(model)(X), y)
    torch.testing.assert_close(y.float(), model(X), rtol=0.05, atol=0.05)


def with_magnitude(config: AdapterConfig) -> AdapterLinear:
    """Return a linear (24, 40) whose adapter has a magnitude that its config can't ask for."""
    torch.manual_seed(0)
    method, linear = METHODS[config.peft_type.lower()], nn.Linear(40, 24)
    spec = method.spec(config, "layer", 24, 40)
    spec = replace(spec, shapes={**spec.shapes, magnitude.NAME: (24,)})
    values = method.init(config, spec, torch.Generator().manual_seed(0))
    to_adapter_linear(linear, spec, values, QuantConfig("nf4"), "reference")
    layer: Any = linear
    result: AdapterLinear = layer
    return result


@pytest.mark.parametrize("drop", [0.0, 0.3])
def test_any_update_of_low_rank_may_have_a_magnitude(drop: float) -> None:
    layer = with_magnitude(LoHaConfig(r=2, rank_dropout=drop))
    x = torch.randn(5, 40)
    base = functional.linear(x, layer.dense_weight(), layer.bias)
    torch.testing.assert_close(layer(x), base)
    assert "loha with magnitude" in repr(layer)
    layer.eval()
    fill_adapters(layer)
    merged = functional.linear(x, layer.merged_weight(), layer.bias)
    torch.testing.assert_close(layer(x), merged, rtol=1e-4, atol=1e-5)
    layer(x).square().sum().backward()
    assert all(p.grad is not None for p in layer.adapter_params().values())


def test_an_update_that_is_not_of_low_rank_may_not() -> None:
    with pytest.raises(NotImplementedError, match="a magnitude needs an update of low rank, which"):
        with_magnitude(LoKrConfig(r=40))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("adapter", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_of_no_rows_are_zero(
    dtype: torch.dtype, adapter: torch.dtype, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is not written shows: new memory is full of NaN."""
    if adapter == torch.bfloat16 and dtype == torch.float32:
        pytest.skip("an adapter is in float32 or in the activations' dtype")
    weight, B = torch.randn(40, 32, dtype=dtype), torch.zeros(40, 3, dtype=adapter)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    try:
        x = torch.zeros(0, 32, dtype=dtype, requires_grad=True)
        A, magnitude = torch.ones(3, 32, dtype=adapter, requires_grad=True), torch.ones(40)
        B.requires_grad_(), magnitude.requires_grad_()
        y = fastlora.dora_linear(x, weight, None, A, B, magnitude, backend=backend)
        y.sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)
    for leaf in (A, B, magnitude):
        assert leaf.grad is not None and not leaf.grad.any()


def test_a_row_of_zeros_with_a_magnitude_is_zero(backend: str) -> None:
    """Its norm is 0, whatever its magnitude is: the factor is 0, and no gradient is infinite."""
    weight, A, B = torch.randn(5, 32), torch.randn(2, 32), torch.randn(5, 2)
    weight[3], B[3] = 0, 0
    leaves = [t.requires_grad_() for t in (torch.randn(4, 32), A, B, torch.ones(5))]
    x, A, B, magnitude = leaves
    y = fastlora.dora_linear(x, weight, None, A, B, magnitude, backend=backend)
    assert not y[:, 3].any()
    for grad in torch.autograd.grad(y, leaves, 100 * torch.ones_like(y)):
        assert torch.isfinite(grad).all()


def test_dropout_on_every_backend(backend: str) -> None:
    """With dropout there are products with x as it is and with x dropped out."""
    model = patch_model(plain(), LoraConfig(r=2, use_dora=True, lora_dropout=0.3), backend=backend)
    model(X).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
