"""torch.compile on layers of PEFT and bitsandbytes that are patched in place."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("peft")
import bitsandbytes as bnb
import peft
from peft.utils.hotswap import prepare_model_for_compiled_hotswap

import fastlora
from tests.integrations.test_peft_models import (
    BF16,
    UP,
    X,
    assert_close,
    filled,
    net,
    results,
    wrapped,
)


@pytest.fixture(autouse=True)
def _afresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(layer: Any) -> Any:
    return torch.compile(layer, backend="aot_eager", fullgraph=True)


def graph_results(layer: Any) -> dict[str, torch.Tensor]:
    found = results(compiled(layer))
    return {name.removeprefix("_orig_mod."): value for name, value in found.items()}


@pytest.mark.parametrize("base", ["nf4", "nf4 single", "fp4"])
@pytest.mark.parametrize("warm", [False, True])
def test_a_layer_of_bitsandbytes(base: str, warm: bool) -> None:
    layer = fastlora.patch_model(net(base)).get_submodule("up")
    if warm:
        layer(X)
    assert_close(graph_results(layer), results(layer), 1e-6)


def test_bytes_stored_as_another_dtype() -> None:
    layer: Any = bnb.nn.Linear4bit(64, 64, compute_dtype=torch.float32, quant_storage=BF16)
    model = fastlora.patch_model(nn.Sequential(layer).to("cpu"))
    assert_close(graph_results(model), results(model), 1e-6)


@pytest.mark.parametrize("name", ["lora", "dora", "biases"])
@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_a_layer_of_peft(name: str, base: str) -> None:
    layer = fastlora.patch_model(wrapped(name, base)).get_submodule(UP)
    assert_close(graph_results(layer), results(layer), 1e-5)


def test_a_graph_reads_the_weight_of_the_moment() -> None:
    model: Any = fastlora.patch_model(net("nf4"))
    run = compiled(model.up)
    first = run(X)
    other: Any = net("nf4").up
    other.weight = bnb.nn.Params4bit(torch.randn(128, 64), quant_type="nf4").to("cpu")
    model.up.weight = other.weight
    model.up.quant_state = other.weight.quant_state
    assert not torch.equal(run(X), first)
    assert_close({"y": run(X)}, {"y": model.up(X)}, 1e-6)


@pytest.mark.parametrize("base", ["dense", "nf4"])
@pytest.mark.parametrize("dora", [False, True])
def test_a_scaling_that_is_a_tensor(dora: bool, base: str) -> None:
    found = []
    for line in (False, True):
        config = peft.LoraConfig(r=4, lora_alpha=8, use_dora=dora, target_modules=["up", "down"])
        model = filled(peft.get_peft_model(net(base), config))
        prepare_model_for_compiled_hotswap(model, target_rank=8)
        layer: Any = model.get_submodule(UP)
        assert isinstance(layer.scaling["default"], torch.Tensor)
        if line:
            fastlora.patch_model(model)
            found.append(graph_results(layer))
        found.append(results(layer))
    assert_close(found[1], found[2], 1e-5)
    assert_close(found[2], found[0], 2e-5)
