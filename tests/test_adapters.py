"""The configs' checks, and the contract of every adapter method."""

from __future__ import annotations

import copy
import inspect
import json
import math
import pickle
import time
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import fastlora
from fastlora import LoHaConfig, LoKrConfig, LoraConfig
from fastlora.adapters import METHODS, AdapterConfig, magnitude, method_of
from fastlora.adapters.targets import check_pattern, matches, pattern_key
from fastlora.config import from_fields
from fastlora.layers import AdapterLinear
from tests.contract import compare
from tests.variants import IN_FEATURES, OUT_FEATURES, VARIANTS

BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"r": 0}, ValueError, "r must be between 1 and 4096, got 0"),
    ({"r": 10**8}, ValueError, "r must be between 1 and 4096"),
    ({"r": "8"}, TypeError, "r must be an int, got '8'"),
    ({"lora_alpha": float("nan")}, ValueError, "lora_alpha must be finite"),
    ({"lora_alpha": 1e308}, ValueError, "at most 10000 in size"),
    ({"lora_alpha": "8"}, TypeError, "lora_alpha must be a number"),
    ({"lora_dropout": 1.0}, ValueError, "lora_dropout must be at least 0 and below 1"),
    ({"lora_dropout": None}, TypeError, "lora_dropout must be a number"),
    ({"target_modules": 3}, TypeError, "target_modules must be a str or a list of str, got int"),
    ({"target_modules": [""]}, TypeError, "target_modules must hold names"),
    ({"target_modules": "("}, ValueError, "target_modules must be a regular expression"),
    ({"exclude_modules": "(a+)+"}, ValueError, "exclude_modules must be a pattern that matches in"),
    ({"modules_to_save": "head"}, TypeError, "modules_to_save must be a list"),
    ({"rank_pattern": ["up"]}, TypeError, "rank_pattern must be a dict"),
    ({"rank_pattern": {"up": 0}}, ValueError, r"rank_pattern\['up'\] must be between 1"),
    ({"rank_pattern": {3: 4}}, TypeError, "the keys of rank_pattern must be str"),
    ({"alpha_pattern": {"(": 4}}, ValueError, "a key of alpha_pattern must be a regular"),
    ({"layers_to_transform": [-1]}, ValueError, "must hold numbers from 0, got -1"),
    ({"layers_pattern": "h"}, ValueError, "layers_pattern needs layers_to_transform"),
    (
        {"target_modules": "a.*", "layers_to_transform": 1},
        ValueError,
        "needs target_modules as a l",
    ),
    ({"bias": "some"}, ValueError, r"bias must be one of \['none', 'all', 'lora_only'\]"),
    ({"use_rslora": 1}, TypeError, "use_rslora must be True or False"),
    ({"use_dora": None}, TypeError, "use_dora must be True or False"),
    ({"init_lora_weights": "pissa"}, ValueError, "init_lora_weights must be one of"),
    ({"task_type": 4}, TypeError, "task_type must be a str or None, got int"),
]


@pytest.mark.parametrize(("values", "kind", "sentence"), BAD, ids=[b[2][:40] for b in BAD])
def test_bad_fields(values: dict[str, Any], kind: type[Exception], sentence: str) -> None:
    with pytest.raises(kind, match=sentence):
        LoraConfig(**values)


PRODUCT_BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"alpha": float("inf")}, ValueError, "alpha must be finite"),
    ({"rank_dropout": 1}, ValueError, "rank_dropout must be at least 0 and below 1, got 1"),
    ({"module_dropout": "0"}, TypeError, "module_dropout must be a number, got '0'"),
    ({"use_effective_conv2d": True}, NotImplementedError, "weight as a matrix"),
    ({"use_effective_conv2d": 1}, TypeError, "use_effective_conv2d must be True or False"),
    ({"init_weights": "pissa"}, ValueError, r"init_weights must be one of \[True, False.*'pissa'"),
]
LOKR_BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"decompose_both": 1}, TypeError, "decompose_both must be True or False, got 1"),
    ({"rank_dropout_scale": None}, TypeError, "rank_dropout_scale must be True or False"),
    ({"decompose_factor": 2.0}, TypeError, "decompose_factor must be an int, got 2.0"),
    ({"decompose_factor": -2}, ValueError, "decompose_factor must be at least 1, or -1 .*got -2"),
]


@pytest.mark.parametrize(
    ("cls", "values", "kind", "sentence"),
    [
        *((cls, *bad) for cls in (LoHaConfig, LoKrConfig) for bad in PRODUCT_BAD),
        (LoHaConfig, {"init_weights": "lycoris"}, ValueError, "got 'lycoris'"),
        *((LoKrConfig, *bad) for bad in LOKR_BAD),
    ],
)
def test_bad_fields_of_products(
    cls: Any, values: dict[str, Any], kind: type[Exception], sentence: str
) -> None:
    with pytest.raises(kind, match=sentence):
        cls(**values)


@pytest.mark.parametrize("name", sorted(set(METHODS) - {"bottleneck"}))  # PEFT has none
def test_defaults_and_names_are_those_of_peft(name: str) -> None:
    import peft

    ours = METHODS[name].config_class()
    theirs = getattr(peft, type(ours).__name__)().to_dict()
    for field in fields(ours):
        assert theirs[field.name] == getattr(ours, field.name), field.name
    assert from_fields(theirs) == ours


@pytest.mark.parametrize(
    "pattern",
    [
        "(([a-z0-9_.])+)+X",
        "(a|aa)+X",
        "(a?)*X",
        "(?:x*){2,}X",
        "((a{1,9}){1,9}){1,9}X",
        r"(a+)\1+X",
        ".*.*.*.*.*X",
        "a" * 3000,
    ],
)
def test_dangerous_patterns_are_refused_at_once(pattern: str) -> None:
    start = time.perf_counter()
    with pytest.raises(ValueError, match="target_modules must be a pattern"):
        check_pattern(pattern, "target_modules")
    assert time.perf_counter() - start < 1


@pytest.mark.parametrize(
    "pattern",
    [
        r".*\.(q_proj|v_proj)$",
        r"model\.layers\.\d+\.mlp\.(up|down)_proj",
        r"(?:.*?(?:language|text).*?(?:self_attn|mlp).*?(?:q_proj|up_proj).*?)|(?:\bmodel\.x)",
        r"(?!.*visual)(?=.*proj).*",
        r"[a-z]{1,20}\.\d{2}",
    ],
)
def test_usual_patterns_are_taken(pattern: str) -> None:
    check_pattern(pattern, "target_modules")


def test_matching() -> None:
    assert matches(["q_proj", "a.b"], "x.q_proj") and matches(["a.b"], "a.b")
    assert not matches(["q_proj"], "xq_proj") and not matches("q", "x.q")
    assert pattern_key(["up", "layers.0.up"], "m.layers.0.up") == "up"
    assert pattern_key(["own"], "m.down") is None


def test_unknown_peft_fields() -> None:
    base = {"peft_type": "LORA", "target_modules": ["a"], "r": 4}
    harmless = {"megatron_core": "megatron.core", "eva_config": None, "new_flag": False}
    assert from_fields({**base, **harmless}).r == 4
    with pytest.raises(NotImplementedError, match="'layer_replication' must be unset"):
        from_fields({**base, "layer_replication": [[0, 4]]})
    with pytest.raises(NotImplementedError, match=r"peft_type must be one of .*got 'IA3'"):
        from_fields({**base, "peft_type": "IA3"})


@pytest.mark.parametrize("name", sorted(set(METHODS) - {"bottleneck"}))
def test_configs_take_what_scripts_of_peft_pass(name: str, tmp_path: Path) -> None:
    cls: Any = METHODS[name].config_class
    passed: dict[str, Any] = {
        "r": 4, "target_modules": ["0"], "task_type": "CAUSAL_LM", "inference_mode": False,
        "base_model_name_or_path": "some/model", "revision": None, "auto_mapping": None,
        "peft_type": cls.peft_type, "fan_in_fan_out": True,
    }  # fmt: skip
    config = cls(**passed)
    assert config == cls(r=4, target_modules=["0"], task_type="CAUSAL_LM")
    assert pickle.loads(pickle.dumps(config)) == config == replace(config, r=4)
    model = nn.Sequential(nn.Linear(16, 16))
    fastlora.save_adapter(fastlora.patch_model(model, config), tmp_path / "a")
    written = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    alpha = {cls.alpha_field: 8}
    assert written == {
        "r": 4, "target_modules": ["0"], "task_type": "CAUSAL_LM", "peft_type": cls.peft_type,
        "inference_mode": True, "base_model_name_or_path": None, **alpha,
    }  # fmt: skip
    for field, value in (("layer_replication", [[0, 4]]), ("lora_r", 0)):
        with pytest.raises(TypeError, match=rf"{cls.__name__} takes the .*, got '{field}' too; "):
            cls(r=4, **{field: value})
    assert list(inspect.signature(cls).parameters) == [f.name for f in fields(cls)]


def test_every_method_is_registered_under_its_own_name() -> None:
    assert {"lora", "loha", "lokr"} <= set(METHODS)
    for name, method in METHODS.items():
        config = method.config_class(r=2)
        spec = method.spec(config, "layer", 8, 8)
        assert method.name == name == spec.method and method_of(method.config_class()) is method
        assert set(spec.shapes) <= set(method.file_keys)
        values = method.init(config, spec, torch.Generator())
        assert {key: tuple(value.shape) for key, value in values.items()} == spec.shapes


def layer_of(
    config: AdapterConfig,
    quantize: str | None = None,
    dtype: torch.dtype = torch.float32,
    backend: str = "reference",
) -> AdapterLinear:
    """Return a patched linear of the shape that the variants suit."""
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(IN_FEATURES, OUT_FEATURES)).to(dtype)
    fastlora.patch_model(model, config, quantize=quantize, backend=backend)
    layer: AdapterLinear = model[0]
    return layer


def fill(layer: AdapterLinear) -> None:
    """Give the adapter values as after training; its magnitude stays near the norms."""
    with torch.no_grad():
        for name, parameter in layer.adapter_params().items():
            noise = 0.3 * torch.randn(parameter.shape)
            parameter.copy_(parameter * (1 + noise) if name == magnitude.NAME else noise)


def rows(dtype: torch.dtype, columns: int = IN_FEATURES) -> Tensor:
    return torch.randn(2, 16, columns, generator=torch.Generator().manual_seed(4)).to(dtype)


def unfused(layer: AdapterLinear, config: AdapterConfig, wide: bool) -> list[Tensor]:
    """Return y, dx and the parameters' gradients in plain torch, in float64 or step by step."""
    spec = layer.adapter
    assert spec is not None
    dtype = layer.original_dtype()
    kind = torch.float64 if wide else dtype
    method = METHODS[spec.method]
    params = {
        n: (p.detach().double() if wide else p.detach().clone()).requires_grad_()
        for n, p in layer.adapter_params().items()
    }
    x = rows(dtype).to(kind).requires_grad_()
    weight, bias = layer.dense_weight(dtype).to(kind), layer.bias.detach().to(kind)
    delta = method.delta(params, spec)
    has_magnitude = magnitude.NAME in params
    base = functional.linear(x, weight, None if has_magnitude else bias)
    y = (base + functional.linear(x.to(delta.dtype), delta)).to(kind)
    if has_magnitude:
        norm = torch.linalg.vector_norm(weight + delta, dim=1).detach()
        y = (y * (params[magnitude.NAME] / norm) + bias).to(kind)
    y.backward(rows(dtype, OUT_FEATURES).to(kind))
    return [y.detach(), *(g for t in (x, *params.values()) if (g := t.grad) is not None)]


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("quantize", [None, "nf4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_contract_of_a_method(
    name: str, quantize: str | None, dtype: torch.dtype, backend: str
) -> None:
    config = VARIANTS[name]
    layer = layer_of(config, quantize, dtype, backend)
    x = rows(dtype).requires_grad_()
    base = functional.linear(x, layer.dense_weight(dtype), layer.bias)
    ulp = torch.finfo(dtype).eps * base.abs().max()
    assert (layer(x) - base).abs().max() <= 2 * ulp, "the update must be zero at first"
    fill(layer)
    y = layer(x)
    y.backward(rows(dtype, OUT_FEATURES))
    grads = [parameter.grad for parameter in layer.adapter_params().values()]
    assert x.grad is not None and all(grad is not None for grad in grads)
    ours = [y.detach(), x.grad, *(grad for grad in grads if grad is not None)]
    names = ["y", "dx", *layer.adapter_params()]
    plain, truth = unfused(layer, config, wide=False), unfused(layer, config, wide=True)
    for what, mine, theirs, exact in zip(names, ours, plain, truth, strict=True):
        error = (mine.double() - exact).abs().max() / exact.abs().max()
        if what in ("y", "dx") or error > 32 * torch.finfo(torch.float32).eps:
            compare(f"{name}: {what}", mine, theirs, exact)
    merged = functional.linear(x, layer.merged_weight().to(dtype), layer.bias)
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(y, merged, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", VARIANTS)
def test_inference_remembers_and_notices(name: str) -> None:
    layer = layer_of(VARIANTS[name], "nf4").eval()
    x = rows(torch.float32)
    fill(layer)
    expected = layer(x).detach()
    with torch.no_grad():
        first, second = layer(x), layer(x)
    with torch.inference_mode():
        third = layer(x)
    for y in (first, second, third):
        assert torch.equal(y, expected)
    fill(layer)
    changed = layer(x).detach()
    assert not torch.allclose(changed, expected)
    with torch.no_grad():
        assert torch.equal(layer(x), changed)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_method_compiles(name: str) -> None:
    layer = layer_of(VARIANTS[name])
    fill(layer)
    x = rows(torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), layer(x))


DROPS = [
    LoraConfig(r=2, lora_dropout=0.5),
    LoraConfig(r=2, lora_dropout=0.5, use_dora=True),
    LoHaConfig(r=2, rank_dropout=0.5, module_dropout=0.1),
    LoKrConfig(r=40, rank_dropout=0.5, module_dropout=0.1),
]


@pytest.mark.parametrize("config", DROPS, ids=lambda c: type(c).__name__)
def test_dropout_compiles(config: AdapterConfig) -> None:
    layer = layer_of(config, "nf4")
    fill(layer)
    x = rows(torch.float32).requires_grad_()
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    one, other = compiled(x), compiled(x)
    assert not torch.equal(one, other)
    one.sum().backward()
    assert all(p.grad is not None for p in layer.adapter_params().values())


@pytest.mark.parametrize("name", VARIANTS)
def test_a_method_holds_no_n_by_k(name: str) -> None:
    """Nothing of N x K numbers is made or saved, but what the weight itself needs."""
    layer = layer_of(VARIANTS[name])
    own = {p.data_ptr() for p in layer.parameters()}
    made: list[tuple[int, ...]] = []

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in own:
            made.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        layer(rows(torch.float32))
    assert made and not [s for s in made if math.prod(s) >= IN_FEATURES * OUT_FEATURES]


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("undo", [fastlora.unpatch, fastlora.merge])
def test_a_method_leaves_nothing_behind(name: str, undo: Any) -> None:
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(IN_FEATURES, OUT_FEATURES))
    before = copy.deepcopy(model)
    fastlora.patch_model(model, VARIANTS[name], backend="reference")
    fill(model[0])
    y = model(rows(torch.float32)).detach()
    undo(model)
    assert type(model[0]) is nn.Linear and vars(model[0]).keys() == vars(before[0]).keys()
    assert list(model.state_dict()) == list(before.state_dict())
    expected = before(rows(torch.float32)) if undo is fastlora.unpatch else y
    torch.testing.assert_close(model(rows(torch.float32)), expected, rtol=1e-4, atol=1e-5)


def test_factors_of_many_ranks_are_bounded() -> None:
    config = LoraConfig(r=9)
    with pytest.raises(ValueError, match="the rank of '0' must be at most 8"):
        fastlora.patch_model(nn.Sequential(nn.Linear(8, 16)), config, backend="reference")
    wide = nn.Sequential(nn.Linear(8, 16))
    fastlora.patch_model(wide, LoKrConfig(r=9), backend="reference")
