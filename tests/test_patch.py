"""patch_model, report, unpatch and merge: what they do, and each error's sentence."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastlora
from fastlora import LoraConfig, QuantConfig, patch_model, report, unpatch
from fastlora.adapters import METHODS
from fastlora.layers import AdapterLinear, QuantizedLinear
from tests.models import fill_adapters, llama, plain

X = torch.randn(3, 32, generator=torch.Generator().manual_seed(3))
IDS = torch.arange(12).view(2, 6)
REFERENCE: dict[str, Any] = {"backend": "reference"}


def patched_names(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, AdapterLinear)]


def test_the_adapter_changes_nothing_at_first() -> None:
    model = plain()
    y = model(X)
    assert patch_model(model, LoraConfig(), **REFERENCE) is model
    assert torch.equal(model(X), y)
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trainable and all("lora_" in name for name in trainable)
    assert len(patched_names(model)) == 5


@pytest.mark.parametrize("method", ["lora", "loha", "lokr", "dora", "bottleneck"])
def test_training_lowers_the_loss(method: str, backend: str) -> None:
    model = plain()
    dora = LoraConfig(r=4, use_dora=True)
    config = dora if method == "dora" else METHODS[method].config_class(r=4)
    patch_model(model, config, quantize="nf4", backend=backend)
    frozen = model.norm.weight.clone()
    target = torch.randn(3, 8)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(30):
        loss = (model(X) - target).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert torch.equal(model.norm.weight, frozen)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"target_modules": ["up"]}, ["blocks.0.up", "blocks.1.up"]),
        ({"target_modules": ["blocks.1.up", "head"]}, ["blocks.1.up", "head"]),
        ({"target_modules": r".*\.(up|down)", "exclude_modules": r".*1\.up"},
         ["blocks.0.up", "blocks.0.down", "blocks.1.down"]),
        ({"target_modules": "all-linear", "exclude_modules": ["down", "head"]},
         ["blocks.0.up", "blocks.1.up"]),
        ({"modules_to_save": ["head"]},
         ["blocks.0.up", "blocks.0.down", "blocks.1.up", "blocks.1.down"]),
        ({"target_modules": ["up"], "layers_to_transform": 1, "layers_pattern": "blocks"},
         ["blocks.1.up"]),
        ({"target_modules": ["up", "down"], "layers_to_transform": [0], "layers_pattern": "blocks"},
         ["blocks.0.up", "blocks.0.down"]),
    ],
)  # fmt: skip
def test_targets(fields: dict[str, Any], expected: list[str]) -> None:
    model = plain()
    patch_model(model, LoraConfig(**fields), **REFERENCE)
    assert patched_names(model) == expected


def test_layers_are_counted_as_peft_counts() -> None:
    model = llama()
    config = LoraConfig(target_modules=["q_proj"], layers_to_transform=[1])
    patch_model(model, config, **REFERENCE)
    assert patched_names(model) == ["model.layers.1.self_attn.q_proj"]


def test_rank_and_alpha_patterns_and_rslora() -> None:
    model = plain()
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        rank_pattern={"blocks.0.up": 2, "up": 3},
        alpha_pattern={r"blocks\.\d+\.down": 16},
        use_rslora=True,
    )
    rows = {
        row["module"]: row for row in report(patch_model(model, config, **REFERENCE))["modules"]
    }
    assert [rows[n]["r"] for n in ("blocks.0.up", "blocks.1.up", "blocks.0.down")] == [2, 3, 4]
    assert rows["blocks.0.up"]["scaling"] == pytest.approx(8 / 2**0.5)
    assert rows["blocks.1.down"]["scaling"] == pytest.approx(16 / 2)


def test_seed_decides_whatever_the_global_generator_holds() -> None:
    def first(seed: int, noise: int) -> torch.Tensor:
        model = plain()
        torch.manual_seed(noise)
        patch_model(model, LoraConfig(), seed=seed, **REFERENCE)
        state = torch.get_rng_state()
        torch.manual_seed(noise)
        assert torch.equal(state, torch.get_rng_state())
        return model.get_parameter("head.lora_A")

    assert torch.equal(first(1, 2), first(1, 3))
    assert not torch.equal(first(1, 2), first(2, 2))


@pytest.mark.parametrize(("init", "std"), [(True, 1 / 32**0.5 / 3**0.5), ("gaussian", 1 / 8)])
def test_first_values(init: bool | str, std: float) -> None:
    model = plain()
    patch_model(model, LoraConfig(init_lora_weights=init), **REFERENCE)
    lora_A = torch.cat([model.get_parameter(f"blocks.{i}.up.lora_A") for i in (0, 1)])
    assert lora_A.std().item() == pytest.approx(std, rel=0.15)
    assert not model.get_parameter("head.lora_B").any()


def test_unpatch_restores_everything() -> None:
    model = plain()
    model.norm.requires_grad_(False)
    before, kept = copy.deepcopy(model), model.head
    config = LoraConfig(r=4, modules_to_save=["head"], bias="all")
    patch_model(model, config, **REFERENCE)
    fill_adapters(model)
    assert not torch.allclose(model(X), before(X))
    assert unpatch(model) is model
    assert torch.equal(model(X), before(X))
    assert model.head is kept
    assert [type(m) for m in model.modules()] == [type(m) for m in before.modules()]
    assert list(model.state_dict()) == list(before.state_dict())
    flags = [(n, p.requires_grad) for n, p in model.named_parameters()]
    assert flags == [(n, p.requires_grad) for n, p in before.named_parameters()]
    assert vars(model).keys() == vars(before).keys()
    assert vars(model.blocks[0].up).keys() == vars(before.blocks[0].up).keys()
    patch_model(model, LoraConfig(), **REFERENCE)


def test_unpatch_of_four_bit_layers_has_to_be_asked_for() -> None:
    model: Any = plain()
    patch_model(model, LoraConfig(), quantize="nf4", **REFERENCE)
    decoded = model.blocks[0].up.dense_weight()
    with pytest.raises(ValueError, match=r"can't bring back 5 dense weights.*dequantize=True"):
        unpatch(model)
    unpatch(model, dequantize=True)
    assert type(model.blocks[0].up) is nn.Linear
    assert torch.equal(model.blocks[0].up.weight, decoded)
    assert model.blocks[0].up.weight.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("quantize", [None, "nf4", "fp4"])
def test_merge_is_exact(quantize: str | None, dtype: torch.dtype) -> None:
    model = plain(dtype=dtype)
    patch_model(model, LoraConfig(r=4, lora_alpha=12), quantize=quantize, **REFERENCE)
    fill_adapters(model)
    layer: Any = model.blocks[0].up
    expected = layer.dense_weight(torch.float32) + 3.0 * 1.0 * (layer.lora_B @ layer.lora_A)
    y = model(X.to(dtype))
    assert fastlora.merge(model) is model
    assert type(model.blocks[0].up) is nn.Linear
    assert model.blocks[0].up.weight.dtype == dtype
    assert torch.equal(model.blocks[0].up.weight, expected.to(dtype))
    assert not [name for name, _ in model.named_parameters() if "lora" in name]
    tolerance = 1e-5 if dtype == torch.float32 else 5e-2
    torch.testing.assert_close(model(X.to(dtype)), y, rtol=tolerance, atol=tolerance)


def test_quantize_alone_freezes_only_what_it_packs() -> None:
    model = plain()
    y = model(X)
    patch_model(model, quantize=QuantConfig("nf4", 32), **REFERENCE)
    assert all(isinstance(model.get_submodule(n), QuantizedLinear) for n in patched_names(model))
    assert model.norm.weight.requires_grad and model.head.bias.requires_grad
    model(X).sum().backward()
    assert model.head.bias.grad is not None
    torch.testing.assert_close(model(X), y, rtol=0.3, atol=0.3)
    totals = report(model)["totals"]
    assert totals["bytes_after"] < 0.3 * totals["bytes_before"]


def test_llama_head_and_tied_embeddings_stay() -> None:
    for tied, reason in ((False, "output head"), (True, "tied to another")):
        model = llama(tied=tied)
        patch_model(model, LoraConfig(r=4), quantize="nf4", **REFERENCE)
        assert type(model.lm_head) is nn.Linear
        assert reason in report(model)["skipped"]["lm_head"]
        assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
        assert len(patched_names(model)) == 14
        assert model(IDS).logits.shape == (2, 6, 64)


def test_quantize_packs_the_whole_base_but_the_head() -> None:
    model = patch_model(
        llama(), LoraConfig(r=4, target_modules=["q_proj"]), quantize="nf4", **REFERENCE
    )
    packed = [name for name, m in model.named_modules() if isinstance(m, QuantizedLinear)]
    adapted = [row["module"] for row in report(model)["modules"] if row["method"] == "lora"]
    assert len(packed) == 14 and len(adapted) == 2
    assert type(model.lm_head) is nn.Linear
    # a model that does not know its head: only what is named
    other = patch_model(
        plain(), LoraConfig(r=4, target_modules=["up"]), quantize="nf4", **REFERENCE
    )
    assert patched_names(other) == ["blocks.0.up", "blocks.1.up"]


def test_tied_head_can_be_adapted_by_name_but_not_quantised() -> None:
    model = llama(tied=True)
    config = LoraConfig(r=4, target_modules=["lm_head", "q_proj"])
    patch_model(model, config, quantize="nf4", **REFERENCE)
    assert not isinstance(model.lm_head, QuantizedLinear)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    rows = {row["module"]: row for row in report(model)["modules"]}
    assert rows["lm_head"]["format"] == "dense"
    assert "kept dense: its weight is tied" in rows["lm_head"]["notes"]


def test_llama_trains_under_checkpointing_and_compile(backend: str) -> None:
    model = llama()
    patch_model(model, LoraConfig(r=4), quantize="nf4", backend=backend)
    fill_adapters(model)

    def step(run: Any) -> list[torch.Tensor]:
        model.zero_grad()
        run(IDS).logits.float().square().mean().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    plainly = step(model)
    assert len(plainly) == 28
    for mode in (True, False):
        model.train()
        model.gradient_checkpointing_enable({"use_reentrant": mode})
        model.enable_input_require_grads()
        for ours, expected in zip(step(model), plainly, strict=True):
            assert torch.equal(ours, expected)
    model.gradient_checkpointing_disable()
    mlp = model.model.layers[0].mlp
    compiled = torch.compile(mlp, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 32)
    assert torch.equal(compiled(x), mlp(x))
    assert torch.equal(checkpoint(mlp, x, use_reentrant=False), mlp(x))


def test_pytorch_transformer_uses_its_adapters_in_inference() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model = nn.TransformerEncoder(layer, 1).eval()
    x, pad = torch.randn(2, 5, 16), torch.zeros(2, 5, dtype=torch.bool)
    pad[1, 3:] = True
    before = copy.deepcopy(model)
    patch_model(model, LoraConfig(r=2), **REFERENCE)
    skipped = report(model)["skipped"]["layers.0.self_attn.out_proj"]
    assert "NonDynamicallyQuantizableLinear" in skipped
    fill_adapters(model)
    with torch.no_grad():
        quiet = model(x, src_key_padding_mask=pad)
    trained = model(x, src_key_padding_mask=pad)
    torch.testing.assert_close(quiet, trained.detach())
    unpatch(model)
    with torch.no_grad():
        again = model(x, src_key_padding_mask=pad)
        torch.testing.assert_close(again, before(x, src_key_padding_mask=pad))
    assert not torch.allclose(again[0], quiet[0])


def test_report_is_a_dict_and_a_table() -> None:
    model = plain(dtype=torch.bfloat16)
    config = LoraConfig(r=4, target_modules=["up"], lora_dropout=0.1)
    patch_model(model, config, quantize="nf4", **REFERENCE)
    result = report(model)
    row = result["modules"][0]
    assert row["module"] == "blocks.0.up" and row["method"] == "lora" and row["r"] == 4
    assert row["format"] == "nf4" and row["backend"] == "reference" and row["shape"] == (64, 32)
    assert row["scaling"] == 2.0 and row["notes"] == ""
    packed = 64 * 32 // 2 + 32 + 4 + 4
    assert row["bytes"] == packed + 64 * 2 + 4 * (4 * 32 + 64 * 4)
    assert result["skipped"]["head"] == "not a target"
    totals = result["totals"]
    assert totals["trainable_params"] == 2 * 4 * (32 + 64)
    assert totals["all_params"] == sum(p.numel() for p in plain().parameters()) + 768
    text = str(result)
    assert text.splitlines()[0].split()[:4] == ["module", "method", "r", "scaling"]
    assert "skipped head: not a target" in text and "trainable 768 of" in text


def test_peft_config_object_is_taken() -> None:
    from peft import LoraConfig as PeftConfig

    config: Any = PeftConfig(r=4, lora_alpha=12, target_modules=["up"], task_type="CAUSAL_LM")
    row = report(patch_model(plain(), config, **REFERENCE))["modules"][0]
    assert row["r"] == 4 and row["scaling"] == 3.0
    with pytest.raises(NotImplementedError, match="'lora_bias' must be unset, got 'True'"):
        patch_model(plain(), PeftConfig(target_modules=["up"], lora_bias=True))


def test_task_type_trains_the_classifier() -> None:
    from transformers import LlamaForSequenceClassification

    model = llama(cls=LlamaForSequenceClassification, num_labels=3)
    patch_model(model, LoraConfig(r=4, task_type="SEQ_CLS"), **REFERENCE)
    assert type(model.score) is nn.Linear and model.score.weight.requires_grad
    assert report(model)["skipped"]["score"] == "trained whole"


def with_nan() -> nn.Module:
    model: Any = plain()
    with torch.no_grad():
        model.blocks[0].down.weight[0, 0] = float("nan")
    result: nn.Module = model
    return result


def with_own_forward() -> nn.Module:
    model: Any = plain()
    model.head.forward = lambda x: x
    result: nn.Module = model
    return result


def with_two_devices() -> nn.Module:
    model = plain()
    model.head.bias = nn.Parameter(torch.empty(8, device="meta"))
    return model


class Sub(nn.Linear):
    """A linear whose forward may be another."""


class Matrix(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8))


HEAD = {"target_modules": ["head"]}
BAD: list[tuple[Any, Any, dict[str, Any], type[Exception], str]] = [
    (lambda: 3, {}, {}, TypeError, "model must be an nn.Module, got int"),
    (lambda: nn.Linear(4, 4), {}, {}, TypeError, "got a bare nn.Linear; wrap it"),
    (plain, None, {}, ValueError, "without config and quantize needs a model with"),
    (plain, "lora", {}, TypeError, "config must be one of .* or PEFT's config, got str"),
    (plain, {"target_modules": ["q_proj"]}, {}, ValueError,
     r"linears are named \['down', 'head', 'up'\]"),
    (plain, {"target_modules": ["norm"]}, {}, TypeError, "'norm' is a LayerNorm"),
    (plain, {"r": 9, **HEAD}, {}, ValueError, "rank of 'head' must be at most 8, .*got 9"),
    (plain, {"modules_to_save": ["classifier"]}, {}, ValueError, "none is called 'classifier'"),
    (plain, {}, {"quantize": "nf3"}, ValueError, "quant_type must be one of .*got 'nf3'"),
    (plain, {}, {"quantize": 4}, TypeError, "quantize must be None, a format name or a QuantCon"),
    (plain, {}, {"backend": "fast"}, ValueError, "backend must be one of"),
    (plain, {}, {"seed": 0.5}, TypeError, "seed must be an int, got 0.5"),
    (plain, {}, {"backend": "triton"}, NotImplementedError, "triton: "),
    (with_nan, {}, {}, ValueError, "'blocks.0.down' must be finite"),
    (with_own_forward, HEAD, {}, TypeError, "'head' has one of its own"),
    (with_two_devices, {}, {}, ValueError, "weight and bias of 'head' must be on one device"),
    (lambda: plain().to("meta"), {}, {}, ValueError, "'blocks.0.up' .* is on the meta device"),
    (lambda: plain().double(), {}, {"quantize": "nf4"}, TypeError, "is float64; convert"),
    (lambda: nn.Sequential(nn.Linear(1, 3)), {"r": 1}, {"quantize": "nf4"}, ValueError,
     "one column must have an even number of rows"),
    (lambda: nn.Sequential(nn.ReLU()), {}, {}, ValueError, r"its linears are named \[\]"),
    (lambda: nn.Sequential(Matrix()), {}, {}, ValueError, "nothing does; modules of type Matrix"),
    (lambda: nn.Sequential(Sub(8, 8)), {"target_modules": "all-linear"}, {}, ValueError,
     "but none of 1 can; 0: a target module must be exactly an nn.Linear, but '0' is a Sub"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("make", "fields", "arguments", "kind", "sentence"), BAD, ids=[b[4][:40] for b in BAD]
)
def test_bad_arguments_leave_the_model_alone(
    make: Any, fields: Any, arguments: dict[str, Any], kind: type[Exception], sentence: str
) -> None:
    model = make()
    config = LoraConfig(**fields) if isinstance(fields, dict) else fields
    kinds = [type(m) for m in model.modules()] if isinstance(model, nn.Module) else []
    with pytest.raises(kind, match=sentence):
        patch_model(model, config, **{**REFERENCE, **arguments})
    if isinstance(model, nn.Module):
        assert [type(m) for m in model.modules()] == kinds
        assert all(p.requires_grad for p in model.parameters())
        assert not hasattr(model, "_fastlora")


def test_patching_twice_and_half_patched_models() -> None:
    model = patch_model(plain(), LoraConfig(), **REFERENCE)
    with pytest.raises(ValueError, match="a model that is not patched yet"):
        patch_model(model, LoraConfig(), **REFERENCE)
    whole = nn.Sequential(model, nn.Linear(8, 8))
    with pytest.raises(ValueError, match="only its part '0' is patched"):
        patch_model(whole, LoraConfig(), **REFERENCE)
    with pytest.raises(ValueError, match="only its part '0' is patched"):
        report(whole)


@pytest.mark.parametrize("function", [report, unpatch, fastlora.merge])
def test_functions_that_need_a_patched_model(function: Any) -> None:
    with pytest.raises(ValueError, match="the model must be patched, but it is not"):
        function(plain())


def test_all_linear_leaves_out_what_is_narrower_than_the_rank() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 3))
    fastlora.patch_model(model, LoraConfig(r=4, target_modules="all-linear"))
    assert fastlora.report(model)["skipped"] == {
        "1": "its rank 4 is more than the smaller side of its weight"
    }
