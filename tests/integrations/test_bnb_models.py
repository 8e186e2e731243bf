"""`patch_model` on models of bitsandbytes without adapters, repacked, pre-quantised, prompted."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("peft")
import bitsandbytes as bnb
import peft
import transformers
from bitsandbytes.functional import _convert_weight_packed_for_cpu

import fastlora
from fastlora.in_place import Accelerated
from tests import offline

BF16 = torch.bfloat16
TOKENS = torch.randint(4, 20, (2, 9), generator=torch.Generator().manual_seed(0))


def packed(dtype: torch.dtype = torch.float32) -> Any:
    return offline.to_bnb(offline.llama(dtype), dtype)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        y: torch.Tensor = model(TOKENS).logits
    return y


def close(mine: torch.Tensor, theirs: torch.Tensor, tolerance: float = 2e-5) -> None:
    assert (mine - theirs).abs().max() <= tolerance * theirs.abs().max()


def test_results_names_and_state() -> None:
    plain, model = packed(), packed()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    fastlora.patch_model(model)
    assert sum(isinstance(m, Accelerated) for m in model.modules()) == 14
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], value) for key, value in before.items())
    expected = logits(plain.train())
    close(logits(model), expected)
    close(logits(model.eval()), expected)  # in which bitsandbytes would repack and compute coarsely
    again = model.state_dict()
    assert all(torch.equal(again[key], value) for key, value in before.items())
    report = fastlora.report(model)
    assert report["modules"][0]["format"] == "nf4" and report["modules"][0]["backend"] == "native"
    dense = sum(p.numel() for p in offline.llama().parameters())
    assert report["totals"]["all_params"] == dense
    fastlora.unpatch(model)
    assert type(model.model.layers[0].mlp.up_proj) is bnb.nn.Linear4bit
    assert torch.equal(logits(model.train()), expected)


def test_gradients_reach_the_input() -> None:
    models: list[Any] = [packed(), fastlora.patch_model(packed())]
    grads = []
    for each in models:
        inputs = each.get_input_embeddings()(TOKENS).detach().requires_grad_()
        loss = each.train()(inputs_embeds=inputs).logits.square().mean()
        grads.append(torch.autograd.grad(loss, inputs)[0])
    close(grads[1], grads[0])


def test_a_weight_that_was_repacked_for_the_cpu() -> None:
    """An evaluation by bitsandbytes leaves its CPU layout and coarser magnitudes behind."""
    model = packed(BF16).eval()
    logits(model)
    first = model.model.layers[0].mlp.up_proj
    if not getattr(first.weight.quant_state, "packing_format_for_cpu", False):
        pytest.skip("this CPU has no kernel of bitsandbytes that repacks")
    expected = logits(copy.deepcopy(model).train())
    fastlora.patch_model(model)
    assert not getattr(first.weight.quant_state, "packing_format_for_cpu", False)
    close(logits(model), expected, 0.02)
    rows = fastlora.report(model)["modules"]
    assert all("repacked from bitsandbytes' CPU layout" in row["notes"] for row in rows)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("k", [64, 256])
def test_the_layout_of_the_cpu_made_by_hand(k: int, nested: bool) -> None:
    torch.manual_seed(0)
    layer: Any = bnb.nn.Linear4bit(
        k, 64, compute_dtype=BF16, compress_statistics=nested, quant_type="nf4"
    )
    rows = torch.rand(64, 1) + 0.1  # magnitudes that differ from block to block
    layer.weight.data = (layer.weight.data * rows).to(BF16)
    model: Any = torch.nn.Sequential(layer).to("cpu")
    x = torch.randn(5, k).to(BF16)
    expected = model.train()(x)
    weight = layer.weight
    weight.data, weight.quant_state = _convert_weight_packed_for_cpu(
        weight.data, weight.quant_state
    )
    fastlora.patch_model(model)
    assert layer.weight.quant_state.nested == nested
    close(model(x), expected, 0.02)
    fastlora.unpatch(model)
    close(model(x), expected, 0.02)


def test_a_checkpoint_that_bitsandbytes_packed(tmp_path: Path) -> None:
    """As on the hub: packed weights, quant_map, absmax and quant_state beside each other."""
    dense = tmp_path / "dense"
    offline.llama(BF16).save_pretrained(dense)
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=BF16,
    )  # fmt: skip
    made = transformers.AutoModelForCausalLM.from_pretrained(
        dense, quantization_config=config, dtype=BF16
    )
    made.save_pretrained(tmp_path / "packed")
    load = transformers.AutoModelForCausalLM.from_pretrained
    plain, model = (load(tmp_path / "packed") for _ in range(2))
    expected = logits(plain.train())
    close(logits(fastlora.patch_model(model).eval()), expected, 0.02)
    own = fastlora.from_pretrained(tmp_path / "packed")
    close(logits(own), expected, 0.02)


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_prompt_and_prefix_tuning(kind: str) -> None:
    cls = {"prompt": peft.PromptTuningConfig, "prefix": peft.PrefixTuningConfig}[kind]
    config = cls(num_virtual_tokens=3, task_type="CAUSAL_LM")
    losses = []
    for line in (False, True):
        torch.manual_seed(1)
        model = peft.get_peft_model(packed(), config).train()
        if line:
            fastlora.patch_model(model)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
        for _ in range(5):
            loss = model(input_ids=TOKENS, labels=TOKENS).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    assert losses[4] < losses[0]
    assert losses[5:] == pytest.approx(losses[:5], rel=1e-5)


def test_8_bit_layers_are_left_and_said() -> None:
    model = packed()
    model.lm_head = bnb.nn.Linear8bitLt(64, 27, bias=False)
    report = fastlora.report(fastlora.patch_model(model))
    assert report["skipped"] == {"lm_head": "bitsandbytes' Linear8bitLt is left to bitsandbytes"}
    only = torch.nn.Sequential(bnb.nn.Linear8bitLt(64, 64))
    with pytest.raises(ValueError, match=r"can accelerate, but has none .*Linear8bitLt"):
        fastlora.patch_model(only)


def test_a_weight_that_is_not_quantised_yet() -> None:
    model = torch.nn.Sequential(bnb.nn.Linear4bit(64, 64))
    with pytest.raises(ValueError, match="not quantised yet: move the model to its device"):
        fastlora.patch_model(model)
    assert type(model[0]) is bnb.nn.Linear4bit


def test_a_weight_with_tables_of_its_own() -> None:
    model = packed()
    layer = model.model.layers[0].mlp.up_proj
    layer.weight.quant_state.code = layer.weight.quant_state.code * 2
    skipped = fastlora.report(fastlora.patch_model(model))["skipped"]
    assert list(skipped) == ["model.layers.0.mlp.up_proj"]
    assert "the 16 values of nf4 as quant_map" in skipped["model.layers.0.mlp.up_proj"]
