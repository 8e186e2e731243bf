"""What a model patched in place leaves to PEFT and bitsandbytes, and how the report says so."""

from __future__ import annotations

import copy
import importlib
import sys
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

pytest.importorskip("peft")
import accelerate
import bitsandbytes as bnb
import peft

import fastlora
from fastlora.integrations import versions
from tests import offline
from tests.integrations.test_peft_models import (
    UP,
    X,
    accelerated,
    assert_close,
    filled,
    net,
    wrapped,
)

DORA = peft.LoraConfig(r=2, use_dora=True, target_modules=["up"])
TOKENS = torch.randint(4, 20, (2, 9), generator=torch.Generator().manual_seed(0))


def two(second: Any, **fields: Any) -> Any:
    """A model with two active adapters."""
    first = type(second)(r=2, target_modules=["up"], **fields)
    model: Any = peft.get_peft_model(net("dense"), first)
    model.add_adapter("other", copy.deepcopy(second))
    model.base_model.set_adapter(["default", "other"])
    return filled(model)


def with_config(config: Any) -> Any:
    config.target_modules = ["up"]
    return filled(peft.get_peft_model(net("dense"), config))


def row(model: Any, name: str = UP) -> dict[str, Any]:
    rows = {row["module"]: row for row in fastlora.report(model)["modules"]}
    found: dict[str, Any] = rows[name]
    return found


# ---- hooks ----


@pytest.mark.parametrize("base", ["dense", "nf4"])
@pytest.mark.parametrize(
    "part", ["base_layer", "lora_A.default", "lora_B.default", "lora_dropout.default"]
)
def test_hooks_on_parts_of_a_layer_run(part: str, base: str) -> None:
    model = fastlora.patch_model(wrapped("lora", base))
    found = []
    for each in (wrapped("lora", base), model):
        module: nn.Module = each.get_submodule(f"{UP}.{part}")
        hook = module.register_forward_hook(lambda module, x, y: y * 2)
        with torch.no_grad():
            found.append({"y": each(X)})
        if each is model:
            assert row(each)["notes"].startswith("left to PEFT: parts of it have hooks")
        hook.remove()
    assert_close(found[1], found[0], 2e-5)
    assert row(model)["backend"] == "native" and row(model)["notes"] == ""


@pytest.mark.parametrize(
    "register", ["register_forward_pre_hook", "register_full_backward_hook", "forward"]
)
def test_other_ways_to_watch_a_part(register: str) -> None:
    model: Any = fastlora.patch_model(wrapped("lora"))
    base, seen = model.get_submodule(f"{UP}.base_layer"), []
    plain = base.forward

    def see(*args: Any) -> None:
        seen.append(1)

    def forward(x: Tensor) -> Any:
        see()
        return plain(x)

    if register == "forward":
        base.forward = forward
    else:
        getattr(base, register)(see)
    model(X.clone().requires_grad_()).sum().backward()
    assert seen == [1]


def test_offloaded_weights() -> None:
    plain = wrapped("lora").eval()
    with torch.no_grad():
        expected = plain(X)
    cpu = torch.device("cpu")
    model: Any = fastlora.patch_model(wrapped("lora").eval())
    accelerate.cpu_offload(model, execution_device=cpu)
    with torch.no_grad():
        assert_close({"y": model(X)}, {"y": expected}, 1e-6)
    assert row(model)["backend"] == "none"
    first: Any = wrapped("lora").eval()
    accelerate.cpu_offload(first.base_model.model.up, execution_device=cpu)
    fastlora.patch_model(first)
    skipped = fastlora.report(first)["skipped"]
    assert list(skipped) == [UP] and "its weight is on the meta device" in skipped[UP]
    with torch.no_grad():
        assert_close({"y": first(X)}, {"y": expected}, 2e-5)


# ---- transforms ----


def jvp(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    found: Any = torch.func.jvp(f, (x,), (torch.ones_like(x),))
    return cast(Tensor, found[1])


def dual(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(f(forward_ad.make_dual(x, torch.ones_like(x)))).tangent
    return cast(Tensor, tangent)


def trace(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    found: Tensor = torch.jit.trace(f, x, check_trace=False)(2 * x)
    return found


WAYS: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]] = {
    "jvp": jvp,
    "jacrev": lambda f, x: torch.func.jacrev(f)(x),
    "jacfwd": lambda f, x: torch.func.jacfwd(f)(x),
    "vmap": lambda f, x: torch.func.vmap(f)(x),
    "dual": dual,
    "trace": trace,
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("base", ["dense", "nf4", "nf4 alone"])
def test_transforms(way: str, base: str) -> None:
    """The same as of dense layers with the same weights."""
    if base == "nf4 alone":
        model = fastlora.patch_model(net("nf4")).get_submodule("up")
        plain = net("dense").up
        four = model
    else:
        model = fastlora.patch_model(wrapped("lora", base)).get_submodule(UP)
        plain = wrapped("lora").get_submodule(UP)
        four = model.get_submodule("base_layer")
    if base != "dense":
        weight = fastlora.QuantizedWeight.from_bnb(four.weight).dequantize(torch.float32)
        dense: Any = plain if base == "nf4 alone" else plain.get_submodule("base_layer")
        dense.weight.data.copy_(weight)
    x = X[0]
    found, expected = WAYS[way](model, x), WAYS[way](plain, x)
    assert expected.abs().max() > 0
    assert_close({"y": found}, {"y": expected}, 1e-5)


def test_gradients_per_sample() -> None:
    grads = []
    for model in (wrapped("lora"), fastlora.patch_model(wrapped("lora"))):
        layer = model.get_submodule(UP)
        params = {k: v for k, v in layer.named_parameters() if "lora" in k}

        def loss(params: dict[str, Tensor], x: Tensor, layer: nn.Module = layer) -> Tensor:
            y: Tensor = torch.func.functional_call(layer, params, (x,))
            return y.square().mean()

        grads.append(torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(params, X))
    assert_close(grads[1], grads[0], 1e-6)


# ---- what the report says ----


@pytest.mark.parametrize(
    ("make", "method", "reason"),
    [
        (lambda: with_config(peft.LoraConfig(r=2, lora_bias=True)), "lora", "lora_bias"),
        (
            lambda: with_config(peft.LoraConfig(r=2, alora_invocation_tokens=[1])),
            "alora",
            "alora",
        ),
        (lambda: with_config(peft.LoraConfig(r=2, init_lora_weights="mica")), "mica", "mica"),
        (
            lambda: two(peft.LoraConfig(r=2, target_modules=["up"]), lora_dropout=0.1),
            "lora",
            "several active adapters with dropout",
        ),
        (lambda: two(DORA), "dora + lora", "several active adapters with dora"),
        (
            lambda: two(peft.LoHaConfig(r=2, target_modules=["up"])),
            "loha",
            "several active adapters",
        ),
        (
            lambda: with_config(peft.LoHaConfig(r=2, module_dropout=0.2)),
            "loha",
            "module_dropout in training",
        ),
    ],
)
def test_what_is_left_to_peft_is_said(make: Any, method: str, reason: str) -> None:
    try:
        model = make()
    except ValueError as error:
        assert method == "mica", error
        pytest.skip("this PEFT has no mica")
    x = X.clone()
    plain, model = copy.deepcopy(model).eval(), fastlora.patch_model(model).eval()
    found = row(model)
    assert found["method"] == method and found["backend"] == "none"
    assert found["notes"] == f"left to PEFT: {reason}"
    assert found["notes"] in str(fastlora.report(model))
    with torch.no_grad():
        assert_close({"y": model(x)}, {"y": plain(x)}, 2e-5)


def test_the_report_follows_the_switches() -> None:
    model: Any = fastlora.patch_model(wrapped("lora"))
    assert row(model)["backend"] == "native"
    with model.disable_adapter():
        assert row(model)["notes"] == "left to PEFT: its adapters are disabled"
    model.merge_adapter()
    assert row(model)["notes"] == "left to PEFT: its adapters are merged"
    model.unmerge_adapter()
    model.get_submodule(UP).base_layer.weight.requires_grad_(True)
    assert row(model)["notes"] == "left to PEFT: its base is trained"


def test_layers_that_came_later() -> None:
    model: Any = fastlora.patch_model(with_config(peft.LoraConfig(r=2)))
    model.add_adapter("two", peft.LoraConfig(r=3, target_modules=["down"]))
    model.set_adapter("two")
    report = fastlora.report(model)
    assert report["skipped"] == {
        "base_model.model.down": "added after patch_model; call unpatch and patch_model again"
    }
    assert row(model)["notes"] == "left to PEFT: no active adapter"
    fastlora.patch_model(fastlora.unpatch(model))
    assert fastlora.report(model)["skipped"] == {}


@pytest.mark.parametrize("kind", [peft.LoraConfig, peft.LoHaConfig])
def test_the_last_adapter_deleted(kind: Any) -> None:
    model: Any = fastlora.patch_model(with_config(kind(r=2)))
    model.delete_adapter("default")
    found = row(model)
    assert found["method"] is None and found["r"] is None
    assert found["notes"] == "left to PEFT: no active adapter"


def test_adapters_over_adapters() -> None:
    first = peft.LoraConfig(r=2, target_modules=["up"])
    model: Any = peft.get_peft_model(net("dense"), first, mixed=True)
    model.add_adapter("h", peft.LoHaConfig(r=3, target_modules=["up"]))
    model.set_adapter(["default", "h"])
    plain = copy.deepcopy(filled(model))
    fastlora.patch_model(model)
    assert fastlora.report(model)["skipped"] == {UP: "a base of LoraLinear is left to PEFT"}
    with torch.no_grad():
        assert_close({"y": model(X)}, {"y": plain(X)}, 2e-5)


# ---- parts taken out of a patched model ----


@pytest.mark.parametrize("way", ["unload", "merge_and_unload"])
def test_the_base_of_bitsandbytes_after_unloading(way: str) -> None:
    model: Any = fastlora.patch_model(wrapped("lora", "nf4"))
    base = getattr(model, way)()
    with torch.no_grad():
        expected = base(X)
    assert accelerated(base) == ["up", "down"]
    assert [row["module"] for row in fastlora.report(base)["modules"]] == ["up", "down"]
    fastlora.patch_model(base)
    with pytest.raises(ValueError, match="is not patched yet, but this one is"):
        fastlora.patch_model(base)
    fastlora.unpatch(base)
    assert type(base.up) is bnb.nn.Linear4bit and not accelerated(base)
    with torch.no_grad():
        assert_close({"y": base.train()(X)}, {"y": expected}, 2e-5)
    with pytest.raises(ValueError, match="must be patched, but it is not"):
        fastlora.unpatch(base)


def test_a_backend_is_chosen_anew_after_unloading() -> None:
    model: Any = fastlora.patch_model(wrapped("lora", "nf4"))
    base = model.unload()
    fastlora.patch_model(base, backend="reference")
    assert {row["backend"] for row in fastlora.report(base)["modules"]} == {"reference"}
    fastlora.unpatch(base)
    again = filled(peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["up"])))
    assert len(accelerated(fastlora.patch_model(again))) == 3


# ---- prefix tuning and versions ----


def test_prefix_tuning_with_gradient_checkpointing() -> None:
    config = peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    model = peft.get_peft_model(offline.to_bnb(offline.llama(), torch.float32), config).train()
    fastlora.patch_model(model)
    reason = fastlora.report(model)["skipped"]["prompt_encoder.default"]
    assert "can't train with gradient checkpointing" in reason
    loss = model(input_ids=TOKENS, labels=TOKENS).loss.item()
    model.gradient_checkpointing_enable()
    for each in (model, copy.deepcopy(model)):
        with pytest.raises(ValueError, match="prefix tuning must train without gradient checkpoin"):
            each(input_ids=TOKENS, labels=TOKENS)
    model.eval()
    with torch.no_grad():
        assert model(input_ids=TOKENS, labels=TOKENS).loss.item() == loss
    fastlora.unpatch(model)
    assert not model._forward_pre_hooks


@pytest.mark.parametrize("kind", [peft.LoraConfig, peft.LoHaConfig, peft.LoKrConfig])
def test_the_models_own_dropout_stays_the_same(kind: Any) -> None:
    net = nn.Sequential(nn.Linear(16, 16), nn.Dropout(0.5), nn.Linear(16, 16), nn.Dropout(0.5))
    model: Any = filled(peft.get_peft_model(net, kind(r=2, target_modules=["0", "2"])))
    x, found = torch.randn(4, 16), []
    for each in (copy.deepcopy(model), fastlora.patch_model(model)):
        torch.manual_seed(3)
        found.append({"y": each.train()(x)})
    assert_close(found[1], found[0], 1e-5)


@pytest.mark.parametrize("package", ["transformers", "trl"])
def test_versions_of_other_libraries(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    versions.check_version.cache_clear()
    real = importlib.import_module("importlib.metadata").version
    monkeypatch.setattr(versions, "version", lambda p: "99.1" if p == package else real(p))
    monkeypatch.setitem(sys.modules, "trl", sys)
    with pytest.raises(ImportError, match=rf"works with {package}>=.* found 99.1"):
        fastlora.patch_model(wrapped("lora"))
    versions.check_version.cache_clear()
    monkeypatch.delitem(sys.modules, "trl")
    if package == "trl":
        fastlora.patch_model(wrapped("lora"))
    versions.check_version.cache_clear()
