"""GPT-2's linears, transformers' Conv1D, whose weight is (K, N)."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
import transformers
from transformers.pytorch_utils import Conv1D

import fastlora
from fastlora import LoHaConfig, LoraConfig, patch_model
from fastlora.layers import AdapterLinear, QuantizedLinear
from tests.models import fill_adapters, peft_model

TOKENS = torch.randint(4, 60, (2, 9), generator=torch.Generator().manual_seed(0))
NAMES = ["c_attn", "c_proj", "c_fc"]


def gpt2(dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=32, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(config).to(dtype).eval()
    for module in model.modules():
        if isinstance(module, Conv1D):  # 0.02 makes logits of nothing
            torch.nn.init.normal_(module.weight, std=0.2)
            torch.nn.init.normal_(module.bias, std=0.2)
    return model


def logits(model: Any) -> torch.Tensor:
    y: torch.Tensor = model(TOKENS).logits
    return y


def gradients(model: Any) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(TOKENS, labels=TOKENS).loss.backward()
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            plain = name.removeprefix("base_model.model.").replace(".default", "")
            found[plain.removesuffix(".weight")] = parameter.grad.clone()
    return found


@pytest.mark.parametrize("targets", [NAMES, "all-linear"])
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_same_as_peft_and_its_files(
    targets: Any, dora: bool, quantize: str | None, tmp_path: Path
) -> None:
    from peft import PeftModel

    config = LoraConfig(r=4, target_modules=targets, use_dora=dora)
    ours: Any = patch_model(gpt2(), config, quantize=quantize)
    assert len(fastlora.report(ours)["modules"]) == 8
    fill_adapters(ours)
    fastlora.save_adapter(ours, tmp_path / "ours")
    assert '"fan_in_fan_out": true' in (tmp_path / "ours" / "adapter_config.json").read_text()
    dense = fastlora.unpatch(copy.deepcopy(ours), dequantize=True)
    theirs = PeftModel.from_pretrained(dense, str(tmp_path / "ours"), is_trainable=True)
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-4, atol=1e-4)
    mine, other = gradients(ours), gradients(theirs)
    assert mine.keys() == other.keys() and len(mine) == 8 * (3 if dora else 2)
    for name in mine:
        torch.testing.assert_close(mine[name], other[name], rtol=1e-3, atol=1e-5)
    theirs.save_pretrained(tmp_path / "theirs")
    again = fastlora.load_adapter(gpt2(), tmp_path / "theirs", quantize=quantize)
    assert torch.equal(logits(again), logits(ours))


@pytest.mark.parametrize("config", [LoraConfig(r=4), LoHaConfig(r=2)], ids=["lora", "loha"])
@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_merge_and_unpatch_give_conv1d_back(config: Any, quantize: str | None) -> None:
    before = gpt2()
    state = {name: value.clone() for name, value in before.state_dict().items()}
    model: Any = patch_model(before, config, quantize=quantize)
    layer = model.transformer.h[0].mlp.c_fc
    assert type(layer) is (QuantizedLinear if quantize else AdapterLinear)
    assert (layer.out_features, layer.in_features) == (128, 32)
    if quantize is None:  # the same names, shapes and values, whatever the layout
        held = model.state_dict()
        assert all(torch.equal(held[name], value) for name, value in state.items())
    fill_adapters(model)
    merged: Any = fastlora.merge(copy.deepcopy(model))
    torch.testing.assert_close(logits(merged), logits(model), rtol=1e-4, atol=1e-4)
    fastlora.unpatch(model, dequantize=True)
    for own in (model, merged):
        back = own.transformer.h[0].mlp.c_fc
        assert type(back) is Conv1D and back.weight.shape == (32, 128)
        assert back.weight.is_contiguous()
        assert vars(back).keys() == vars(gpt2().transformer.h[0].mlp.c_fc).keys()
        assert repr(back) == "Conv1D(nf=128, nx=32)"
    if quantize is None:
        assert all(torch.equal(model.state_dict()[name], value) for name, value in state.items())


def test_what_is_saved_while_patched_is_the_base(tmp_path: Path) -> None:
    model: Any = patch_model(gpt2(), LoraConfig(r=4))
    state = {name: t for name, t in model.state_dict().items() if "lora_" not in name}
    model.save_pretrained(tmp_path, state_dict=state)
    again = transformers.GPT2LMHeadModel.from_pretrained(tmp_path)
    assert torch.equal(logits(again), logits(gpt2()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_checkpoints(tmp_path: Path, dtype: torch.dtype) -> None:
    gpt2(dtype).save_pretrained(tmp_path / "dense")
    loaded: Any = fastlora.from_pretrained(tmp_path / "dense", quantize="nf4")
    patched = patch_model(gpt2(dtype), quantize="nf4")
    assert torch.equal(logits(loaded), logits(patched))
    fastlora.save_quantized(loaded, tmp_path / "packed")
    again = fastlora.from_pretrained(tmp_path / "packed")
    assert torch.equal(logits(again), logits(loaded))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    assert type(theirs.transformer.h[0].mlp.c_fc).__name__ == "Linear4bit"
    torch.testing.assert_close(logits(theirs), logits(loaded), rtol=0.05, atol=0.05)
    trained: Any = patch_model(again, LoraConfig(r=4))
    fill_adapters(trained)
    assert set(gradients(trained)) == {n for n, p in trained.named_parameters() if p.requires_grad}


def test_in_place_on_peft(tmp_path: Path) -> None:
    """A dense Conv1D below PEFT's LoRA runs in place, and is as it was after unpatch."""
    model = peft_model(gpt2(), LoraConfig(r=4, target_modules=NAMES), fan_in_fan_out=True)
    fill_adapters(model)
    expected, grads = logits(model), gradients(model)
    patch_model(model)
    row = fastlora.report(model)["modules"][0]
    assert row["backend"] == "native", row
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    for name, grad in gradients(model).items():
        torch.testing.assert_close(grad, grads[name], rtol=1e-3, atol=1e-5)
    model.save_pretrained(tmp_path)
    fastlora.unpatch(model)
    base = model.base_model.model.transformer.h[0].mlp.c_fc.base_layer
    assert base.weight.is_contiguous() and torch.equal(logits(model), expected)
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-4)
