"""The swapped modules: 4-bit state dict, copies, dtype changes, dropout."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from fastlora_kernels.low_rank import keep_mask
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import fastlora
from fastlora import LoHaConfig, LoraConfig, QuantConfig, ops
from fastlora.layers import AdapterLinear, QuantizedLinear

X = torch.randn(5, 33, generator=torch.Generator().manual_seed(3))
FORMATS = [None, "nf4", QuantConfig("fp4", 32, double_quant=False)]


def model_of(
    quantize: str | QuantConfig | None, dtype: torch.dtype = torch.float32, **fields: object
) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(33, 24), nn.ReLU(), nn.Linear(24, 10, bias=False)).to(dtype)
    config = LoraConfig(r=3, init_lora_weights=False, **fields)  # type: ignore[arg-type]
    fastlora.patch_model(model, config, quantize=quantize, backend="reference")
    return model


def first(model: nn.Sequential) -> AdapterLinear:
    layer = model[0]
    assert isinstance(layer, AdapterLinear)
    return layer


@pytest.mark.parametrize("quantize", FORMATS, ids=str)
def test_forward_is_the_formula(quantize: str | QuantConfig | None, backend: str) -> None:
    layer = first(model_of(quantize))
    layer.backend = backend
    params = layer.adapter_params()
    assert layer.adapter is not None
    scaling = layer.adapter.scaling
    update = scaling * (X @ params["lora_A"].t()) @ params["lora_B"].t()
    expected = functional.linear(X, layer.dense_weight(), layer.bias) + update
    torch.testing.assert_close(layer(X), expected)
    torch.testing.assert_close(layer(X), functional.linear(X, layer.merged_weight(), layer.bias))


@pytest.mark.parametrize("quantize", FORMATS, ids=str)
def test_copies(quantize: str | QuantConfig | None) -> None:
    model = model_of(quantize)
    y = model(X)
    copied, pickled = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    assert torch.equal(copied(X), y) and torch.equal(pickled(X), y)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.zero_()
    assert torch.equal(model(X), y)


@pytest.mark.parametrize("quantize", FORMATS, ids=str)
def test_state_dict_round_trip(quantize: str | QuantConfig | None) -> None:
    model = model_of(quantize)
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    other = model_of(quantize)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    keys = other.load_state_dict(torch.load(buffer, weights_only=True))
    assert not keys.missing_keys and not keys.unexpected_keys
    assert torch.equal(other(X), model(X))


def test_state_dict_is_that_of_bitsandbytes() -> None:
    model = model_of("nf4")
    state = model.state_dict()
    names = [name for name in state if name.startswith("0.weight")]
    assert names == [
        "0.weight",
        "0.weight.absmax",
        "0.weight.quant_map",
        "0.weight.nested_absmax",
        "0.weight.nested_quant_map",
        "0.weight.quant_state.bitsandbytes__nf4",
    ]
    assert state["0.weight"].shape == ((33 * 24 + 1) // 2, 1)
    assert state["0.weight.nested_absmax"].dtype == torch.float32
    own = {name: tensor for name, tensor in state.items() if name in names}
    weight = fastlora.QuantizedWeight.from_state_dict(own, "0.weight")
    assert torch.equal(weight.dequantize(), first(model).dense_weight())


def test_loading_is_strict() -> None:
    state = model_of("nf4").state_dict()
    model = model_of("nf4")
    for name in ("0.weight.absmax", "0.weight.quant_map"):
        rest = {key: value for key, value in state.items() if key != name}
        with pytest.raises(RuntimeError, match=name.replace(".", r"\.")):
            model.load_state_dict(rest)
    rest = {key: value for key, value in state.items() if not key.startswith("0.weight")}
    with pytest.raises(RuntimeError, match=r'Missing key.*"0\.weight"'):
        model.load_state_dict(rest)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*0\.extra"):
        model.load_state_dict({**state, "0.extra": torch.zeros(1)})
    swapped = {k.replace("0.weight", "2.weight"): v for k, v in state.items() if "0.weight" in k}
    with pytest.raises(RuntimeError, match=r"must have shape \(10, 24\), got \(24, 33\)"):
        model.load_state_dict({**state, **swapped})


@pytest.mark.parametrize("quantize", ["nf4", QuantConfig("nf4", 64, double_quant=False)], ids=str)
def test_no_dtype_change_alters_the_weight(quantize: str | QuantConfig) -> None:
    model = model_of(quantize, torch.bfloat16)
    before = first(model).dense_weight(torch.float32)
    for change in (torch.float16, torch.float32, torch.bfloat16):
        model.to(change)
        assert torch.equal(first(model).dense_weight(torch.float32), before)
        assert model(X.to(change)).dtype == change
    assert first(model).original_dtype() == torch.bfloat16


def test_adapter_dtype_follows_peft() -> None:
    assert first(model_of(None, torch.bfloat16)).lora_A.dtype == torch.float32
    assert first(model_of("nf4", torch.float16)).lora_A.dtype == torch.float32
    assert first(model_of(None, torch.float64)).lora_A.dtype == torch.float64


@pytest.mark.parametrize("quantize", FORMATS, ids=str)
def test_every_adapter_parameter_gets_its_gradient(quantize: str | QuantConfig | None) -> None:
    model = model_of(quantize)
    model(X).square().sum().backward()
    got = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert got == {"0.lora_A", "0.lora_B", "2.lora_A", "2.lora_B"}


def dropout_reference(layer: AdapterLinear, x: Tensor) -> Tensor:
    params = layer.adapter_params()
    assert layer.adapter is not None
    p = layer.adapter.dropout
    dropped = x * keep_mask(ops.dropout_seed(x), x.shape[0], x.shape[1], p) / (1 - p)
    update = dropped @ params["lora_A"].t() @ params["lora_B"].t() * layer.adapter.scaling
    return functional.linear(x, layer.dense_weight(), layer.bias) + update


@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_dropout_only_in_training(quantize: str | None) -> None:
    layer = first(model_of(quantize, lora_dropout=0.5))
    layer.train()
    torch.manual_seed(5)
    y = layer(X)
    torch.manual_seed(5)
    torch.testing.assert_close(y, dropout_reference(layer, X))
    assert not torch.equal(layer(X), y)
    layer.eval()
    assert torch.equal(layer(X), layer(X))


@pytest.mark.parametrize("use_dora", [False, True])
def test_dropout_is_reproduced_by_the_seed_and_under_checkpointing(use_dora: bool) -> None:
    model = model_of("nf4", lora_dropout=0.5, use_dora=use_dora).train()
    x = X.clone().requires_grad_()

    def grads(run: Callable[[], Tensor]) -> list[Tensor]:
        torch.manual_seed(7)
        model.zero_grad()
        x.grad = None
        run().square().sum().backward()
        return [t.grad for t in (x, *model.parameters()) if t.grad is not None]

    plain = grads(lambda: model(x))
    for reentrant in (False, True):
        again = grads(partial(checkpoint, model, x, use_reentrant=reentrant))
        assert len(again) == len(plain) and all(map(torch.equal, again, plain))
    assert all(map(torch.equal, grads(lambda: model(x)), plain))


def test_repr_names_the_format_and_the_adapter() -> None:
    text = repr(first(model_of("nf4")))
    assert "QuantizedLinear" in text and "nf4, blocksize=64, double_quant=True" in text
    assert "lora(r=3, scaling=2.66667)" in text
    assert isinstance(first(model_of("nf4")), QuantizedLinear)


@pytest.mark.parametrize(
    "config", [LoraConfig(r=2), LoraConfig(r=2, use_dora=True), LoHaConfig(r=2)]
)
@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_autocast_takes_inputs_of_either_dtype(config: Any, quantize: str | None) -> None:
    """A layer after an autocast one is fed bfloat16, and its float32 weight is cast too."""
    torch.manual_seed(0)
    model = fastlora.patch_model(nn.Sequential(nn.Linear(64, 64)), config, quantize=quantize)
    layer, x = model[0], torch.randn(4, 64)  # type: ignore[index]
    with torch.autocast("cpu", torch.bfloat16):
        wide, narrow = layer(x), layer(x.bfloat16().requires_grad_())
        narrow.sum().backward()
    assert wide.dtype == narrow.dtype == torch.bfloat16 and torch.equal(wide, narrow)


@pytest.mark.parametrize("quantize", [None, "nf4"])
@pytest.mark.parametrize("shape", [(2, 5, 16), (5, 16), (16,)], ids=str)
@pytest.mark.parametrize(
    "config",
    [
        None,
        LoraConfig(r=2, target_modules="all-linear"),
        LoraConfig(r=2, target_modules="all-linear", use_dora=True),
        LoHaConfig(r=2, target_modules="all-linear"),
        fastlora.LoKrConfig(r=2, target_modules="all-linear"),
    ],
    ids=["none", "lora", "dora", "loha", "lokr"],
)
def test_outputs_may_be_changed_in_place(
    config: Any, shape: tuple[int, ...], quantize: str | None
) -> None:
    if config is None and quantize is None:
        pytest.skip("nothing is patched")
    torch.manual_seed(0)
    act = nn.ReLU(inplace=True)
    model = nn.Sequential(nn.Linear(16, 24), act, nn.Linear(24, 16))
    fastlora.patch_model(model, config, quantize=quantize)
    x = torch.randn(*shape, requires_grad=True)
    y = model(x)
    y += 1
    grads = torch.autograd.grad(y.square().sum(), x)
    act.inplace = False
    want = model(x) + 1
    assert torch.equal(y, want)
    assert torch.equal(grads[0], torch.autograd.grad(want.square().sum(), x)[0])


def test_outputs_of_a_group_may_be_changed_in_place() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(16, 8), nn.Linear(16, 8)

        def forward(self, x: Tensor) -> Tensor:
            a, b = self.a(x), self.b(x)
            a += b
            b *= 2
            y: Tensor = a + b
            return y

    torch.manual_seed(0)
    model, x = Pair(), torch.randn(2, 3, 16)
    fastlora.patch_model(model, LoraConfig(r=2, target_modules=["a", "b"]))
    want = model(x)
    fastlora.fuse_groups(model)
    for _ in range(2):
        y = model(x)
        y.sum().backward()
        assert torch.equal(y, want)
