"""The configs' checks, and the contract of every adapter method."""

from __future__ import annotations

import time
from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

import fastlora
from fastlora import LoraConfig
from fastlora.adapters import METHODS, method_of
from fastlora.adapters.targets import check_pattern, matches, pattern_key
from fastlora.config import from_fields

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
    ({"use_dora": True}, NotImplementedError, "use_dora must be False, got True"),
    ({"init_lora_weights": "pissa"}, ValueError, "init_lora_weights must be one of"),
    ({"task_type": 4}, TypeError, "task_type must be a str or None, got int"),
]


@pytest.mark.parametrize(("values", "kind", "sentence"), BAD, ids=[b[2][:40] for b in BAD])
def test_bad_fields(values: dict[str, Any], kind: type[Exception], sentence: str) -> None:
    with pytest.raises(kind, match=sentence):
        LoraConfig(**values)


def test_defaults_and_names_are_those_of_peft() -> None:
    from peft import LoraConfig as PeftConfig

    theirs, ours = PeftConfig().to_dict(), LoraConfig()
    for field in fields(LoraConfig):
        assert theirs[field.name] == getattr(ours, field.name), field.name


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


def test_every_method_is_registered_under_its_own_name() -> None:
    assert "lora" in METHODS
    for name, method in METHODS.items():
        assert method.name == name and method_of(method.config_class()) is method
        assert set(method.file_keys) == set(method.shapes(_spec(name), 8, 8))


def _spec(name: str) -> Any:
    return METHODS[name].spec(METHODS[name].config_class(r=2), "layer")


@pytest.mark.parametrize("name", sorted(METHODS))
@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_contract_of_a_method(name: str, quantize: str | None) -> None:
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(24, 16))
    x = torch.randn(5, 24)
    config = METHODS[name].config_class(r=2)
    fastlora.patch_model(model, config, quantize=quantize, backend="reference")
    layer = model[0]
    base = functional.linear(x, layer.dense_weight(), layer.bias)
    assert torch.allclose(model(x), base, atol=1e-6), "the update must be zero at first"
    for parameter in layer.adapter_params().values():
        torch.nn.init.normal_(parameter, std=0.3)
    y = model(x)
    torch.testing.assert_close(y, functional.linear(x, layer.merged_weight(), layer.bias))
    y.square().sum().backward()
    params = {n: p.detach().clone().requires_grad_() for n, p in layer.adapter_params().items()}
    weight = layer.dense_weight() + METHODS[name].delta(params, layer.adapter)
    functional.linear(x, weight, layer.bias).square().sum().backward()
    for key, parameter in layer.adapter_params().items():
        torch.testing.assert_close(parameter.grad, params[key].grad, rtol=1e-4, atol=1e-4)
