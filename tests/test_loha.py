"""LoHa: equal to PEFT's on dense and decoded bases, with its first values and its dropout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fastlora
from fastlora import LoHaConfig, patch_model
from fastlora.config import from_fields
from tests.models import fill_adapters, peft_model, plain
from tests.twins import assert_same, twin

X = torch.randn(3, 32, generator=torch.Generator().manual_seed(3))
REFERENCE: dict[str, Any] = {"backend": "reference"}


@pytest.mark.parametrize("quantize", [None, "nf4", "fp4"])
@pytest.mark.parametrize("r", [1, 3, 8])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)], ids=str
)
def test_same_as_peft(
    quantize: str | None, r: int, dtype: torch.dtype, tolerance: float, tmp_path: Path
) -> None:
    ours = patch_model(
        plain(dtype=dtype), LoHaConfig(r=r, alpha=24), quantize=quantize, **REFERENCE
    )
    fill_adapters(ours)
    assert_same(ours, twin(ours, tmp_path / "a"), X.to(dtype), tolerance)


@pytest.mark.parametrize("init", [True, False])
def test_first_values_are_distributed_as_those_of_peft(init: bool) -> None:
    config = LoHaConfig(r=4, init_weights=init, target_modules=["up"])
    ours = patch_model(plain(), config, **REFERENCE)
    layer: Any = ours.get_submodule("blocks.0.up")
    theirs = peft_model(plain(), config).base_model.model.blocks[0].up
    for name, parameter in layer.adapter_params().items():
        other = getattr(theirs, name)["default"]
        assert parameter.shape == other.shape
        bound = 1 / parameter.shape[1] ** 0.5
        if other.any():
            for values in (parameter, other):
                assert 0.9 * bound < values.abs().max() <= bound
                assert values.std().item() == pytest.approx(bound / 3**0.5, rel=0.15)
        else:
            assert name == "hada_w2_b" and init and not parameter.any()


def test_seeds_decide_the_first_values() -> None:
    one, same, other = (
        patch_model(plain(), LoHaConfig(), seed=seed, **REFERENCE).get_parameter("head.hada_w1_a")
        for seed in (1, 1, 2)
    )
    assert torch.equal(one, same) and not torch.equal(one, other)


def test_config_objects_of_peft_are_taken() -> None:
    from peft import LoHaConfig as PeftConfig

    theirs = PeftConfig(r=3, alpha=6, rank_dropout=0.1, target_modules=["up"])
    model = patch_model(plain(), theirs, **REFERENCE)
    row = fastlora.report(model)["modules"][0]
    assert (row["method"], row["r"], row["scaling"]) == ("loha", 3, 2.0)
    assert from_fields(theirs.to_dict()).changed_fields()["rank_dropout"] == 0.1
    effective = PeftConfig(use_effective_conv2d=True, target_modules=["up"])
    with pytest.raises(NotImplementedError, match="weight as a matrix"):
        patch_model(plain(), effective, **REFERENCE)


def dropped(**fields: Any) -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 400, bias=False))
    config = LoHaConfig(r=2, init_weights=False, **fields)
    patch_model(model, config, quantize="nf4", **REFERENCE)
    return model.train()


def update_of(model: Any, x: torch.Tensor) -> torch.Tensor:
    layer = model[0]
    result: torch.Tensor = (layer(x) - x @ layer.dense_weight().t()).detach()
    return result


def test_rank_dropout_drops_rows_and_keeps_the_mean() -> None:
    model, x = dropped(rank_dropout=0.25), torch.randn(16, 8)
    torch.manual_seed(5)
    one = update_of(model, x)
    again, whole = update_of(model, x), update_of(model.eval(), x)
    gone = (one.abs() < 1e-5).all(0)
    assert 0.15 < gone.float().mean() < 0.35
    factor = one[:, ~gone] / whole[:, ~gone]
    expected = torch.full_like(factor, 1 / (~gone).float().mean().item())
    torch.testing.assert_close(factor, expected, rtol=1e-2, atol=1e-2)
    assert not torch.equal(one, again)
    torch.manual_seed(5)
    assert torch.equal(update_of(model.train(), x), one)


def test_module_dropout_drops_whole_calls() -> None:
    model, x = dropped(module_dropout=0.5), torch.randn(2, 8)
    whole = update_of(model.eval(), x)
    model.train()
    calls = [update_of(model, x) for _ in range(20)]
    gone = [bool((y.abs() < 1e-5).all()) for y in calls]
    assert 3 < sum(gone) < 17
    for y, is_gone in zip(calls, gone, strict=True):
        assert is_gone or torch.allclose(y, whole)


def test_every_row_may_be_dropped() -> None:
    model: Any = nn.Sequential(nn.Linear(8, 4, bias=False))
    config = LoHaConfig(r=1, init_weights=False, rank_dropout=0.999)
    patch_model(model, config, **REFERENCE)
    model(torch.randn(2, 8)).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.requires_grad)
