"""compute="fp8": who takes it, who refuses and why, and what the report says of it."""

from __future__ import annotations

import copy
import functools
import pickle
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fastlora_kernels import fp8
from fastlora_kernels.low_rank import LowRank
from torch import nn

import fastlora
from fastlora import LoHaConfig, LoraConfig, dispatch, ops, patch_model, report
from fastlora.backends import native, reference, triton
from fastlora.dispatch import Problem
from fastlora.layers import QuantizedLinear
from tests.models import Plain, llama
from tests.ops_cases import gradients, make

BF16 = torch.bfloat16
LORA = LoraConfig(r=4, target_modules=["up"])
FP8: Any = {"quantize": "nf4", "compute": "fp8", "backend": "reference"}
PROBLEM = Problem("lora_linear", "cuda", BF16, "nf4", 64, 512, 64, 32, 4, torch.float32, "fp8")
NEEDS = (
    r"fp8 compute needs a GPU with 8-bit floating matrix units \(compute capability 8.9 or newer\)"
)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Make torch tell of a GPU of this name and compute capability."""

    def install(name: str, capability: tuple[int, int]) -> None:
        fp8._why_not_gpu.cache_clear()
        monkeypatch.setattr(triton, "_installed", lambda: True)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: name)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
        monkeypatch.setattr(fp8, "_why_not_torch", lambda device: None)

    yield install
    fp8._why_not_gpu.cache_clear()


def model_16() -> Plain:
    """Return a bfloat16 model with fixed weights, whose linears' sides are multiples of 16."""
    torch.manual_seed(0)
    model = Plain(classes=16).to(BF16)
    return model.eval()


def state(model: nn.Module) -> dict[str, Any]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def test_cpu_refuses_and_the_model_is_as_it_was() -> None:
    model = model_16()
    before, classes = state(model), [type(m) for m in model.modules()]
    with pytest.raises(NotImplementedError, match=NEEDS + ", got cpu") as error:
        patch_model(model, LORA, quantize="nf4", compute="fp8")
    assert "reference: emulates fp8 compute only when asked for by name" in str(error.value)
    assert "triton: runs on cpu only when asked for by name" in str(error.value)
    assert [type(m) for m in model.modules()] == classes
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("value", ["fp16", "", None, 8])
def test_bad_value(value: Any) -> None:
    sentence = r"compute must be one of \['auto', 'fp8'\], got "
    with pytest.raises(ValueError, match=sentence):
        patch_model(model_16(), LORA, quantize="nf4", compute=value)
    weight = fastlora.quantize_4bit(torch.randn(16, 16))
    with pytest.raises(ValueError, match=sentence):
        fastlora.lora_linear(torch.randn(1, 16), weight, compute=value)


def test_dense_models_and_weights_are_refused() -> None:
    with pytest.raises(ValueError, match="takes 4-bit weights, got a model that keeps dense ones"):
        patch_model(model_16(), LORA, compute="fp8")
    with pytest.raises(ValueError, match="takes a 4-bit weight, got a dense one"):
        fastlora.lora_linear(torch.randn(1, 16), torch.randn(16, 16), compute="fp8")


def test_shapes_are_refused() -> None:
    model = nn.Sequential(nn.Linear(32, 64), nn.Linear(64, 24)).to(BF16)
    sentence = "takes weights whose sides are multiples of 16, got 24 x 64"
    with pytest.raises(NotImplementedError, match=sentence):
        patch_model(model, LoraConfig(r=2), **FP8)
    assert type(model[0]) is nn.Linear


def test_which_gpus(gpu: Any) -> None:
    for name, capability in (("NVIDIA A100", (8, 0)), ("NVIDIA GeForce RTX 3090", (8, 6))):
        gpu(name, capability)
        reason = str(triton.why_not(PROBLEM))
        assert reason.startswith("fp8 compute needs a GPU with 8-bit floating matrix units")
        assert reason.endswith(f"got {name} with {capability[0]}.{capability[1]}")
    for capability in ((8, 9), (9, 0), (10, 0), (12, 0)):
        gpu("NVIDIA", capability)
        assert triton.why_not(PROBLEM) is None
        assert dispatch.pick(PROBLEM) is triton


def test_amd_is_refused(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu("AMD Instinct MI300X", (9, 4))
    monkeypatch.setattr(torch.version, "hip", "6.3")
    reason = str(triton.why_not(PROBLEM))
    assert "take e4m3fnuz" in reason and reason.endswith("got AMD Instinct MI300X")


def test_a_torch_without_the_product_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("CUBLAS_STATUS_NOT_SUPPORTED\nand more")

    monkeypatch.setattr(torch, "_scaled_mm", fail)
    reason = str(fp8._why_not_torch(torch.device("cpu")))
    assert reason.endswith("has no fp8 product with row scales here: CUBLAS_STATUS_NOT_SUPPORTED")


def test_other_refusals(gpu: Any) -> None:
    gpu("NVIDIA H100", (9, 0))
    assert "got torch.float32" in str(triton.why_not(replace(PROBLEM, dtype=torch.float32)))
    assert "got a dense one" in str(triton.why_not(replace(PROBLEM, format="dense")))
    assert "got 64 x 40" in str(triton.why_not(replace(PROBLEM, k=40)))
    assert str(native.why_not(replace(PROBLEM, device="cpu"))).endswith("newer), got cpu")
    assert native.why_not(PROBLEM) == "runs on cpu only, not on cuda"
    assert reference.why_not(PROBLEM) is None


@pytest.mark.parametrize("config", [LORA, LoraConfig(r=4, target_modules=["up"], use_dora=True)])
def test_report_measures_the_error(config: LoraConfig) -> None:
    model = patch_model(model_16(), config, **FP8)
    result = report(model)
    errors = [row["fp8_error"] for row in result["modules"]]
    assert len(errors) == 2 and all(0.03 < error < 0.045 for error in errors)
    assert result["totals"]["fp8_error"] == max(errors)
    row = result["modules"][0]
    assert row["backend"] == "reference"
    assert f"fp8 compute, relative error {errors[0]:.2%}" in row["notes"]
    assert f"fp8 compute: relative error at most {max(errors):.2%}" in str(result)
    assert report(model) == result
    exact = report(patch_model(model_16(), config, quantize="nf4"))
    assert exact["totals"]["fp8_error"] is None and "fp8" not in str(exact)


def test_report_names_dense_layers() -> None:
    config = LoraConfig(r=4, target_modules=["up_proj", "lm_head"])
    rows = {
        row["module"]: row
        for row in report(patch_model(llama().bfloat16(), config, **FP8))["modules"]
    }
    assert rows["lm_head"]["fp8_error"] is None
    assert rows["lm_head"]["notes"] == "kept dense: output head; not in fp8: its weight is dense"
    assert rows["model.layers.0.mlp.up_proj"]["fp8_error"] > 0


@pytest.mark.parametrize(
    "config",
    [
        LORA,
        LoraConfig(r=4, target_modules=["up"], use_dora=True, lora_dropout=0.1),
        LoHaConfig(r=2, target_modules=["up"]),
        None,
    ],
)
def test_output_and_gradients_are_near_the_exact_ones(config: Any) -> None:
    x = torch.randn(64, 32).to(BF16)

    def grads(**how: Any) -> list[torch.Tensor]:
        torch.manual_seed(1)
        model = patch_model(model_16(), config, quantize="nf4", backend="reference", **how)
        leaf = x.clone().requires_grad_()
        y = model(leaf)
        y.square().sum().backward()
        assert leaf.grad is not None
        return [y.detach().float(), leaf.grad.float()]

    for ours, exact in zip(grads(compute="fp8"), grads(), strict=True):
        assert 0.001 < float((ours - exact).norm() / exact.norm()) < 0.1  # of five layers


def test_the_layer_keeps_it_and_gives_it_up() -> None:
    model = patch_model(model_16(), LORA, **FP8)
    layer: Any = model.get_submodule("blocks.0.up")
    assert "compute=fp8" in repr(layer)
    others: list[Any] = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    for other in others:
        assert other.get_submodule("blocks.0.up").stored_weight().compute == "fp8"
    exact = patch_model(model_16(), LORA, quantize="nf4", backend="reference")
    assert list(model.state_dict()) == list(exact.state_dict())
    merged, wanted = (fastlora.merge(m).get_submodule("blocks.0.up") for m in (model, exact))
    assert type(merged) is nn.Linear and "compute" not in vars(merged)
    assert torch.equal(merged.weight, wanted.weight)  # type: ignore[arg-type]


def test_unpatch() -> None:
    models = [
        fastlora.unpatch(patch_model(model_16(), LORA, **how), dequantize=True)
        for how in (FP8, {"quantize": "nf4"})
    ]
    ours, wanted = (state(model) for model in models)
    assert all(torch.equal(ours[key], wanted[key]) for key in wanted)


@pytest.mark.parametrize("later", [False, True])
def test_adapters_on_a_quantized_model(later: bool) -> None:
    how = {**FP8, "compute": "auto"} if later else FP8
    model = patch_model(model_16(), None, **{**how, "quantize": "nf4"})
    if later:
        with pytest.raises(NotImplementedError, match=NEEDS):
            patch_model(model, LORA, compute="fp8")
    extra: Any = {"compute": "fp8"} if later else {}
    layers = [m for m in model.modules() if isinstance(m, QuantizedLinear)]
    assert {layer.compute for layer in layers} == {"auto" if later else "fp8"}
    patch_model(model, LORA, backend="reference", **extra)
    assert {layer.compute for layer in layers} == {"fp8"}
    assert report(model)["totals"]["fp8_error"] > 0.03


@pytest.mark.parametrize("config", [None, LoraConfig(r=4, target_modules=["up_proj"])])
def test_from_a_checkpoint(config: Any, tmp_path: Path) -> None:
    from tests import offline

    offline.llama(BF16).save_pretrained(tmp_path)
    model = fastlora.from_pretrained(tmp_path, config, backend="reference", compute="fp8")
    layers = [m for m in model.modules() if isinstance(m, QuantizedLinear)]
    assert layers and {layer.compute for layer in layers} == {"fp8"}
    assert report(model)["totals"]["fp8_error"] > 0.03
    with pytest.raises(NotImplementedError, match=NEEDS):
        fastlora.from_pretrained(tmp_path, config, compute="fp8")


def test_functions() -> None:
    x, a, b = torch.randn(64, 32).to(BF16), torch.randn(4, 32), torch.randn(48, 4)
    weight = fastlora.quantize_4bit(torch.randn(48, 32).to(BF16))
    how: Any = {"backend": "reference", "compute": "fp8"}
    s = x.float() @ a.t() @ b.t()
    wanted = fp8.product(x, weight.stored(), 48, 32, transposed=False)
    y = fastlora.lora_linear(x, weight, None, a, b, 2.0, **how)
    assert torch.equal(y, (wanted + 2.0 * s).to(BF16))
    ids = torch.zeros(64, dtype=torch.int64)
    many = fastlora.multi_lora_linear(x, weight, None, [a], [b], [2.0], ids, **how)
    assert torch.equal(many, y)
    kron = fastlora.kron_linear(x, weight, None, torch.randn(6, 4), torch.randn(8, 8), **how)
    hada = fastlora.hada_linear(x, weight, None, b, a, b, a, **how)
    dora = fastlora.dora_linear(x, weight, None, a, b, torch.ones(48), **how)
    assert all(other.shape == y.shape and other.isfinite().all() for other in (kron, hada, dora))
    for function in (
        fastlora.lora_linear,
        functools.partial(fastlora.dora_linear, magnitude=b[:, 0]),
    ):
        with pytest.raises(NotImplementedError, match=NEEDS):
            function(x, weight, None, a, b, compute="fp8")


def test_opcheck_and_compile() -> None:
    case = make(6, 48, 32, 3, BF16, "nf4")
    weight = case.weight._replace(compute="fp8")
    a, b = case.lora_A.clone().requires_grad_(), case.lora_B.clone().requires_grad_()
    x = case.x.clone().requires_grad_()
    low = (a, b, 0.5, 0.0, None, None)
    torch.library.opcheck(
        torch.ops.fastlora.lora_linear.default, (x, *weight, case.bias, *low, "reference")
    )

    def run(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return ops.linear(x, weight, case.bias, LowRank(a, b, 0.5), "reference")

    torch._dynamo.reset()
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    operands = (case.x, case.lora_A, case.lora_B)
    for ours, eager in zip(gradients(compiled, *operands), gradients(run, *operands), strict=True):
        assert torch.equal(ours, eager)
    torch._dynamo.reset()


def test_float32_under_autocast_is_multiplied_in_8_bits() -> None:
    case = make(6, 48, 32, 3, torch.float32, "nf4")
    weight = case.weight._replace(compute="fp8")
    with torch.autocast("cpu", BF16):
        y = ops.linear(case.x, weight, None, None, "reference")
    assert torch.equal(y, fp8.product(case.x.to(BF16), weight, 48, 32, transposed=False))


def packed() -> Any:
    """Return a model of bitsandbytes whose linears' sides are multiples of 16."""
    pytest.importorskip("bitsandbytes")
    from tests import offline

    return offline.to_bnb(offline.llama(BF16), BF16)


def test_layers_of_bitsandbytes() -> None:
    model = packed()
    with pytest.raises(NotImplementedError, match=NEEDS):
        patch_model(model, compute="fp8")
    assert not hasattr(model, "_fastlora")
    patch_model(model, compute="fp8", backend="reference")
    rows = report(model)["modules"]
    assert all(0.03 < row["fp8_error"] < 0.045 for row in rows)
    assert model(torch.randint(4, 20, (2, 9))).logits.isfinite().all()


def test_layers_of_peft() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj"])
    model = peft.get_peft_model(packed(), config)
    patch_model(model, compute="fp8", backend="reference")
    result = report(model)
    assert all(row["fp8_error"] is not None for row in result["modules"])
    assert "relative error at most" in str(result)
