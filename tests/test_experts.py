"""Fused experts of transformers: the same numbers, gradients and files as PEFT's, and 4 bits."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastlora
from fastlora import LoHaConfig, LoraConfig, QuantConfig
from fastlora.experts import AdapterExperts

PARAMETERS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
SAME_LAYOUT = tuple(map(int, version("peft").split(".")[:2])) >= (0, 20)
like_peft = pytest.mark.skipif(not SAME_LAYOUT, reason="PEFT 0.19 exchanges inputs and outputs")
SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
KINDS: dict[str, dict[str, Any]] = {
    "Mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "Qwen3Moe": {"moe_intermediate_size": 24, "num_experts": 6, "num_experts_per_tok": 3},
    "Olmoe": {"num_experts": 5, "num_experts_per_tok": 2},
    "GptOss": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8},
}


def make(name: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """Return a tiny model of a kind, in eval mode; all values random, biases too."""
    import transformers

    config = getattr(transformers, f"{name}Config")(**{**SIZES, **KINDS[name], **changes})
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "experts" in key or "bias" in key:
                parameter.normal_(std=0.2)
    return model.to(dtype).eval()


def words(rows: int = 3, length: int = 11) -> Tensor:
    return torch.randint(1, 64, (rows, length), generator=torch.Generator().manual_seed(5))


def config(**fields: Any) -> LoraConfig:
    settings: dict[str, Any] = {"r": 3, "lora_alpha": 6, "target_parameters": PARAMETERS, **fields}
    return LoraConfig(**settings)


def fill(model: nn.Module) -> None:
    torch.manual_seed(7)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=0.2)


def theirs(base: nn.Module, **fields: Any) -> Any:
    import peft

    settings = {"r": 3, "lora_alpha": 6, "target_parameters": PARAMETERS, "target_modules": []}
    model = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**{**settings, **fields}))
    fill(model)
    return model


@like_peft
@pytest.mark.parametrize("kind", sorted(KINDS))
@pytest.mark.parametrize("case", ["both", "one", "with linears"])
def test_numbers_gradients_and_files_are_those_of_peft(
    kind: str, case: str, tmp_path: Path
) -> None:
    import peft
    from safetensors.torch import load_file, save_file

    cases: dict[str, dict[str, Any]] = {
        "both": {},
        "one": {"target_parameters": ["gate_up_proj"], "use_rslora": True},
        "with linears": {
            "target_modules": ["q_proj", "v_proj"],
            "rank_pattern": {r".*\.gate_up_proj": 5},
            "alpha_pattern": {r"1.mlp.experts.down_proj": 16},
        },
    }
    fields = cases[case]
    base, ids = make(kind), words()
    other = theirs(base, **fields)
    other.save_pretrained(tmp_path / "theirs")
    ours = fastlora.load_adapter(copy.deepcopy(base), tmp_path / "theirs")
    torch.testing.assert_close(ours(ids).logits, other(ids).logits, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(ours(ids).logits, base(ids).logits, atol=1e-2)

    for model in (ours, other):
        model(ids).logits.square().sum().backward()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    assert parameter.grad is not None
                    parameter.copy_(parameter.grad)  # so that a file holds the gradients
    fastlora.save_adapter(ours, tmp_path / "ours")
    other.save_pretrained(tmp_path / "gradients")
    mine = load_file(tmp_path / "ours/adapter_model.safetensors")
    right = load_file(tmp_path / "gradients/adapter_model.safetensors")
    assert {k: v.shape for k, v in mine.items()} == {k: v.shape for k, v in right.items()}
    for key, value in mine.items():
        torch.testing.assert_close(value, right[key], rtol=1e-3, atol=1e-4, msg=key)

    save_file(
        load_file(tmp_path / "theirs/adapter_model.safetensors"),
        tmp_path / "ours/adapter_model.safetensors",
    )
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "ours"))
    first = fastlora.load_adapter(copy.deepcopy(base), tmp_path / "theirs")
    torch.testing.assert_close(first(ids).logits, again(ids).logits, rtol=1e-4, atol=1e-5)


@like_peft
def test_first_values_have_pefts_distribution() -> None:
    for first, bound in ((True, 32**-0.5), ("gaussian", None), (False, 32**-0.5)):
        model = make("Mixtral", hidden_size=32)
        fastlora.patch_model(model, config(r=8, init_lora_weights=first), seed=4)
        experts: Any = model.model.layers[0].mlp.experts
        A, B = experts.gate_up_proj_lora_A, experts.gate_up_proj_lora_B
        assert (A.shape, B.shape) == ((4, 8, 32), (4, 96, 8))
        if bound is None:
            assert A.std().item() == pytest.approx(1 / 8, rel=0.1)
        else:
            assert 0.95 * bound < A.abs().max() <= bound
        assert (0.95 * 32**-0.5 < B.abs().max() <= 32**-0.5) if first is False else not B.any()
        again = make("Mixtral")
        fastlora.patch_model(again, config(r=8, init_lora_weights=first), seed=4)
        assert torch.equal(again.model.layers[0].mlp.experts.gate_up_proj_lora_A, A)


@pytest.mark.parametrize("kind", sorted(KINDS))
@pytest.mark.parametrize("quant", ["nf4", "fp4"])
def test_four_bits_are_the_decoded_weights(kind: str, quant: str) -> None:
    scheme = QuantConfig(quant, 32, quant == "nf4")
    model, ids = make(kind), words()
    dense = fastlora.unpatch(
        fastlora.patch_model(copy.deepcopy(model), quantize=scheme), dequantize=True
    )
    pairs = [(config(target_modules=["q_proj"]), scheme), (config(target_modules=["q_proj"]), None)]
    results = []
    for base, (own, quantize) in zip((model, dense), pairs, strict=True):
        fastlora.patch_model(base, own, quantize=quantize)
        fill(base)
        logits = base(ids).logits
        logits.square().sum().backward()
        results.append([logits, *(p.grad for p in base.parameters() if p.requires_grad)])
    assert len(results[0]) == len(results[1]) > 8
    for mine, right in zip(*results, strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-3, atol=1e-4)
    rows = {row["module"]: row for row in fastlora.report(model)["modules"]}
    assert {row["format"] for row in rows.values()} == {quant}
    row = rows["model.layers.1.mlp.experts.down_proj"]
    experts: Any = model.model.layers[1].mlp.experts
    e, n, k = experts.fastlora_experts.shapes["down_proj"]
    assert (row["shape"], row["method"], row["r"], row["backend"]) == (
        (e, n, k),
        "lora",
        3,
        "native",
    )
    blocks = -(-n * k // 32)
    magnitudes = e * (blocks + 8) if quant == "nf4" else 4 * e * blocks
    assert row["bytes"] == e * n * k // 2 + magnitudes + 4 * 3 * e * (n + k)
    totals = fastlora.report(model)["totals"]
    assert totals["all_params"] == fastlora.report(dense)["totals"]["all_params"]


@pytest.mark.parametrize("kind", ["Qwen3Moe", "GptOss"])
def test_merge_unpatch_copies_and_state(kind: str) -> None:
    base, ids = make(kind), words()
    model = fastlora.patch_model(copy.deepcopy(base), config())
    torch.testing.assert_close(model(ids).logits, base(ids).logits)
    fill(model)
    logits = model(ids).logits
    other: Any
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(ids).logits, logits)
        assert isinstance(other.model.layers[0].mlp.experts, AdapterExperts)
    fresh = fastlora.patch_model(copy.deepcopy(base), config(), seed=1)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(ids).logits, logits)
    merged = fastlora.merge(copy.deepcopy(model))
    torch.testing.assert_close(merged(ids).logits, logits, rtol=1e-4, atol=1e-5)
    fastlora.unpatch(model)
    plain: Any
    for plain in (merged, model):
        assert type(plain.model.layers[0].mlp.experts) is type(base.model.layers[0].mlp.experts)
        assert plain.state_dict().keys() == base.state_dict().keys()
        assert all(p.is_contiguous() and p.requires_grad for p in plain.parameters())
    assert all(torch.equal(v, base.state_dict()[k]) for k, v in model.state_dict().items())

    packed = fastlora.patch_model(copy.deepcopy(base), quantize="nf4")
    with pytest.raises(ValueError, match="can't bring back 10 dense weights"):
        fastlora.unpatch(packed)
    logits = packed(ids).logits
    fastlora.patch_model(packed, config())
    torch.testing.assert_close(packed(ids).logits, logits)
    fill(packed)
    logits = packed(ids).logits
    assert torch.equal(pickle.loads(pickle.dumps(packed))(ids).logits, logits)
    twin = fastlora.patch_model(copy.deepcopy(base), config(), quantize="nf4", seed=2)
    twin.load_state_dict(packed.state_dict())
    assert torch.equal(twin(ids).logits, logits)
    merged = fastlora.merge(packed)
    torch.testing.assert_close(merged(ids).logits, logits, rtol=1e-4, atol=1e-5)


def test_files_on_patched_and_packed_models(tmp_path: Path) -> None:
    base, ids = make("Qwen3Moe"), words()
    model = fastlora.patch_model(copy.deepcopy(base), config(), quantize="nf4")
    fill(model)
    fastlora.save_adapter(model, tmp_path / "a")
    fields = json.loads((tmp_path / "a/adapter_config.json").read_text())
    assert (fields["target_modules"], fields["target_parameters"]) == ([], PARAMETERS)
    other = fastlora.load_adapter(copy.deepcopy(base), tmp_path / "a", quantize="nf4")
    assert torch.equal(other(ids).logits, model(ids).logits)
    patched = fastlora.patch_model(copy.deepcopy(base), config(), quantize="nf4", seed=3)
    fastlora.load_adapter(patched, tmp_path / "a")
    assert torch.equal(patched(ids).logits, model(ids).logits)
    less = fastlora.patch_model(copy.deepcopy(base), config(target_parameters=PARAMETERS[:1]))
    with pytest.raises(ValueError, match=r"their adapted parameters differ in model\.layers\.0"):
        fastlora.load_adapter(less, tmp_path / "a")
    wide = fastlora.patch_model(copy.deepcopy(base), config(r=4))
    with pytest.raises(ValueError, match=r"gate_up_proj has lora with r=4.* and the file lora"):
        fastlora.load_adapter(wide, tmp_path / "a")
    with pytest.raises(ValueError, match=r"4 misshapen .*experts.base_layer.lora_B"):
        fastlora.load_adapter(make("Qwen3Moe", moe_intermediate_size=20), tmp_path / "a")
    (tmp_path / "a/adapter_config.json").write_text(
        json.dumps({**fields, "peft_version": "0.19.1"})
    )
    with pytest.raises(NotImplementedError, match=r"must be written by PEFT 0\.20 or later"):
        fastlora.load_adapter(copy.deepcopy(base), tmp_path / "a")


def test_quantize_alone_packs_experts_and_the_report_says_so() -> None:
    model = make("Mixtral", torch.bfloat16)
    fastlora.patch_model(model, LoraConfig(r=2, target_modules=["q_proj"]), quantize="nf4")
    rows = {row["module"]: row for row in fastlora.report(model)["modules"]}
    assert rows["model.layers.0.mlp.experts.gate_up_proj"]["format"] == "nf4"
    assert rows["model.layers.0.mlp.experts.gate_up_proj"]["method"] is None
    assert model(words()).logits.isfinite().all()
    plain = fastlora.patch_model(make("Mixtral"), LoraConfig(r=2, target_modules=["q_proj"]))
    reason = fastlora.report(plain)["skipped"]["model.layers.0.mlp.experts"]
    assert reason == "fused experts: not in target_parameters"


class OddExperts(nn.Module):
    """Stacked experts that describe nothing of themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.num_experts = 3
        self.weight = nn.Parameter(torch.randn(3, 8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bk,enk->bn", x, self.weight)


def test_unknown_experts_stay_as_they_are() -> None:
    model = nn.Sequential(nn.Linear(8, 8), OddExperts())
    x = torch.randn(2, 8)
    before = model[1](x)
    fastlora.patch_model(model, quantize="nf4")
    assert torch.equal(model[1](x), before)
    skipped = fastlora.report(model)["skipped"]
    assert "does not use transformers' experts interface" in skipped["1"]
    other = nn.Sequential(nn.Linear(8, 8), OddExperts())
    with pytest.raises(TypeError, match=r"but '1\.weight' is not one: a OddExperts does not use"):
        fastlora.patch_model(other, config(target_parameters=["1.weight"]))


REFUSED: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: config(lora_dropout=0.1), ValueError, "lora_dropout must be 0.0 together with"),
    (lambda: config(use_dora=True), ValueError, "use_dora must be False together with"),
    (lambda: config(bias="all"), ValueError, "bias must be 'none' together with"),
    (lambda: config(target_parameters="mlp"), TypeError, "target_parameters must be a list"),
    (lambda: config(target_parameters=["up"]), ValueError, r"\['mlp.experts.down_proj', 'mlp.exp"),
    (lambda: config(target_parameters=["gate.weight"]), TypeError, "name linears in target_mod"),
    (lambda: config(target_modules=["no_such"]), ValueError, "must match an nn.Linear"),
    (lambda: config(r=33), ValueError, "the rank of .*gate_up_proj' must be at most 32"),
]


@pytest.mark.parametrize(("bad", "kind", "sentence"), REFUSED)
def test_what_is_refused(bad: Callable[[], Any], kind: type[Exception], sentence: str) -> None:
    model = make("Mixtral")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(kind, match=sentence):
        fastlora.patch_model(model, bad(), quantize="nf4")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert type(model.model.layers[0].mlp.experts).__name__ == "MixtralExperts"
    assert all(p.requires_grad for p in model.parameters())


def test_weights_that_are_refused() -> None:
    model = make("Mixtral")
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj[2, 0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"layers.1.mlp.experts.down_proj' must be finite"):
        fastlora.patch_model(model, quantize="nf4")
    with pytest.raises(TypeError, match="must be float32, bfloat16 or float16 to be stored"):
        fastlora.patch_model(make("Mixtral", torch.float64), quantize="nf4")
    with pytest.raises(NotImplementedError, match=r"'lora_bias' must be unset|lora_bias"):
        import peft

        fastlora.patch_model(
            make("Mixtral"), peft.LoraConfig(target_parameters=PARAMETERS, lora_bias=True)
        )
    with pytest.raises(TypeError, match="target_parameters"):
        LoHaConfig(target_parameters=PARAMETERS)  # type: ignore[call-arg]


@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_training_with_activation_checkpointing(quantize: str | None) -> None:
    losses = []
    for checkpointing in (False, True):
        model, ids = make("Qwen3Moe", torch.bfloat16).train(), words()
        fastlora.patch_model(model, config(), quantize=quantize)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        trained = [p for p in model.parameters() if p.requires_grad]
        assert all("lora" in n for n, p in model.named_parameters() if p.requires_grad)
        optimizer = torch.optim.AdamW(trained, lr=2e-2)
        values = []
        for _ in range(6):
            loss = model(ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            values.append(loss.item())
        losses.append(values)
    assert losses[0] == losses[1]
    assert losses[0][-1] < 0.95 * losses[0][0]


def test_no_dense_weight_and_no_delta_is_made() -> None:
    """No tensor of the size of all experts' weights, nor of one expert's in float32."""
    from torch.utils._python_dispatch import TorchDispatchMode

    sizes: list[int] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            out = func(*args, **(kwargs or {}))
            sizes.extend(
                t.nbytes
                for t in (out if isinstance(out, (tuple, list)) else [out])
                if isinstance(t, Tensor) and not t._is_view()
            )
            return out

    model = make(
        "Qwen3Moe",
        torch.bfloat16,
        hidden_size=256,
        moe_intermediate_size=256,
        vocab_size=32,
        head_dim=8,
    )
    fastlora.patch_model(model, config(), quantize="nf4")
    experts = model.model.layers[0].mlp.experts
    x = torch.randn(4, 256).bfloat16().requires_grad_()
    ids, weights = torch.randint(0, 6, (4, 2)), torch.rand(4, 2)
    with Watch():
        experts(x, ids, weights).float().sum().backward()
    assert 0 < max(sizes) <= 6 * 3 * 512 * 4  # lora_B's gradient is the largest
    assert max(sizes) < 512 * 256 * 2


def test_the_experts_compile() -> None:
    model = make("Qwen3Moe")
    fastlora.patch_model(model, config(), quantize="nf4")
    fill(model)
    experts: Any = model.model.layers[0].mlp.experts
    x, weights = torch.randn(7, 32, requires_grad=True), torch.rand(7, 3)
    ids = torch.randint(0, 6, (7, 3))
    compiled = torch.compile(experts, fullgraph=True)
    torch.testing.assert_close(compiled(x, ids, weights), experts(x, ids, weights))
    compiled(x, ids, weights).sum().backward()
    assert experts.down_proj_lora_B.grad is not None


def test_peft_models_in_place_keep_their_experts() -> None:
    import peft

    model = peft.get_peft_model(
        make("Mixtral"),
        peft.LoraConfig(r=2, target_parameters=PARAMETERS, target_modules=["q_proj"]),
    )
    before = model(words()).logits
    fastlora.patch_model(model)
    skipped = fastlora.report(model)["skipped"]
    assert any("ParamWrapper is left to PEFT" in reason for reason in skipped.values())
    torch.testing.assert_close(model(words()).logits, before)


@pytest.mark.parametrize("kind", ["Mixtral", "GptOss"])
def test_checkpoints_are_packed_as_they_come(kind: str, tmp_path: Path) -> None:
    base, ids = make(kind), words()
    base.save_pretrained(tmp_path / "base")
    model = fastlora.from_pretrained(tmp_path / "base", config(), quantize="nf4").eval()
    right = fastlora.patch_model(base, config(), quantize="nf4")
    assert torch.equal(model(ids).logits, right(ids).logits)
    assert fastlora.report(model)["modules"] == fastlora.report(right)["modules"]
    with pytest.raises(ValueError, match="for which bitsandbytes has no format"):
        fastlora.save_quantized(model, tmp_path / "packed")
    model.save_pretrained(tmp_path / "bytes")
    with pytest.raises(ValueError, match="must hold fused experts as floats"):
        fastlora.from_pretrained(tmp_path / "bytes")
    kept = fastlora.from_pretrained(tmp_path / "base", skip_modules=["experts", "lm_head"])
    assert fastlora.report(kept)["skipped"]["model.layers.0.mlp.experts"] == "kept dense"
    fastlora.unpatch(model, dequantize=True)
    assert model.state_dict().keys() == make(kind).state_dict().keys()
