"""Bottleneck adapters: what they compute, on dense and 4-bit bases, and what they refuse."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

import fastlora
from fastlora import BottleneckConfig


def model_of(dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 48)).to(dtype)


def filled(model: Any) -> Any:
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.2)
    return model


@pytest.mark.parametrize("quantize", [None, "nf4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("act", ["relu", "gelu", "silu", "tanh"])
def test_values_and_gradients_are_those_of_the_formula(
    quantize: str | None, dtype: torch.dtype, act: str
) -> None:
    config = BottleneckConfig(r=5, scaling=0.7, non_linearity=act, target_modules=["2"])
    model = filled(fastlora.patch_model(model_of(dtype), config, quantize=quantize))
    layer: Any = model[2]
    x = torch.randn(7, 96).to(dtype).requires_grad_()
    found = layer(x)
    found.float().square().sum().backward()
    wide = {n: p.detach().double().requires_grad_() for n, p in layer.adapter_params().items()}
    z = x.detach().double().requires_grad_()
    y = functional.linear(z, layer.dense_weight().double(), layer.bias.detach().double())
    down, d, up, u = wide.values()
    made = {"relu": torch.relu, "gelu": functional.gelu, "silu": functional.silu,
            "tanh": torch.tanh}[act](functional.linear(y, down, d))  # fmt: skip
    truth = y + 0.7 * functional.linear(made, up, u)
    truth.square().sum().backward()
    close: dict[str, Any] = (
        {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.3}
    )
    torch.testing.assert_close(found.double(), truth, **close)
    assert z.grad is not None and x.grad is not None
    scale = float(z.grad.abs().max())
    torch.testing.assert_close(x.grad.double(), z.grad, rtol=0.05, atol=close["atol"] * scale)
    for name, parameter in layer.adapter_params().items():
        truth_grad = wide[name].grad
        assert truth_grad is not None
        atol = close["atol"] * float(truth_grad.abs().max())
        torch.testing.assert_close(parameter.grad.double(), truth_grad, rtol=0.05, atol=atol)


def test_it_is_the_identity_at_first_and_goes_away() -> None:
    model = model_of()
    before, x = copy.deepcopy(model), torch.randn(3, 64)
    fastlora.patch_model(model, BottleneckConfig(r=4))
    torch.testing.assert_close(model(x), before(x))
    assert sum(p.requires_grad for p in model.parameters()) == 8
    rows = fastlora.report(model)["modules"]
    assert [row["method"] for row in rows] == ["bottleneck", "bottleneck"]
    fastlora.unpatch(model)
    assert torch.equal(model(x), before(x)) and type(model[0]) is nn.Linear


def test_its_file_brings_it_back(tmp_path: Path) -> None:
    config = BottleneckConfig(r=4, non_linearity="silu", scaling=2.0, target_modules=["0"])
    model = filled(fastlora.patch_model(model_of(), config))
    fastlora.save_adapter(model, tmp_path / "adapter")
    again = fastlora.load_adapter(model_of(), tmp_path / "adapter")
    x = torch.randn(3, 64)
    assert torch.equal(model(x), again(x))


def test_merging_is_refused_before_anything_changes() -> None:
    model = fastlora.patch_model(model_of(), BottleneckConfig(r=4))
    with pytest.raises(ValueError, match=r"'0' has a bottleneck, whose non-linearity"):
        fastlora.merge(model)
    assert type(model[0]).__name__ == "AdapterLinear"  # type: ignore[index]


def test_dropout_is_of_training_alone() -> None:
    model = filled(fastlora.patch_model(model_of(), BottleneckConfig(r=32, dropout=0.5)))
    x = torch.randn(3, 64)
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"non_linearity": "mish"}, "non_linearity must be one of"),
        ({"scaling": float("nan")}, "scaling must be finite"),
        ({"dropout": 1.0}, "dropout must be at least 0 and below 1"),
        ({"r": 0}, "r must be between 1"),
    ],
)
def test_bad_fields(fields: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        BottleneckConfig(**fields)
