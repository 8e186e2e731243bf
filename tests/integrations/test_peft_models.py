"""`patch_model` on PEFT's models: the same results, names, files and methods as before."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("peft")
import bitsandbytes as bnb
import peft

import fastlora
from fastlora.in_place import Accelerated
from fastlora.integrations import peft_layers

BF16 = torch.bfloat16
UP = "base_model.model.up"
CASES: dict[str, Any] = {
    "lora": peft.LoraConfig(r=4, lora_alpha=8),
    "rslora": peft.LoraConfig(r=4, lora_alpha=8, use_rslora=True),
    "dora": peft.LoraConfig(r=4, lora_alpha=8, use_dora=True),
    "ranks": peft.LoraConfig(r=4, rank_pattern={"up": 7}, alpha_pattern={"down": 3}),
    "biases": peft.LoraConfig(r=4, bias="all"),
    "own biases": peft.LoraConfig(r=4, bias="lora_only"),
    "head": peft.LoraConfig(r=4, modules_to_save=["head"]),
    "loha": peft.LoHaConfig(r=3, alpha=6),
    "lokr": peft.LoKrConfig(r=3, alpha=6),
    "lokr full": peft.LoKrConfig(r=40, alpha=6, decompose_factor=8),
    "lokr both": peft.LoKrConfig(r=2, alpha=6, decompose_both=True),
}
BASES = ["dense", "nf4", "nf4 single", "fp4"]
X = torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(3))


class Net(nn.Module):
    """Two linears and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(64, 128), nn.Linear(128, 64)
        self.head = nn.Linear(64, 7)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.down(torch.relu(self.up(x))))
        return y


def net(base: str, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    model = Net().to(dtype)
    if base == "dense":
        return model
    kind = {"quant_type": base.split()[0], "compress_statistics": base == "nf4"}
    for name in ("up", "down"):
        linear: Any = getattr(model, name)
        n, k = linear.weight.shape
        four = bnb.nn.Linear4bit(k, n, compute_dtype=dtype, **kind)
        four.weight = bnb.nn.Params4bit(linear.weight.detach(), requires_grad=False, **kind)
        four.bias = linear.bias
        setattr(model, name, four.to("cpu"))
    model.is_loaded_in_4bit = True  # type: ignore[assignment]
    return model


def wrapped(name: str, base: str = "dense", dtype: torch.dtype = torch.float32) -> Any:
    config = copy.deepcopy(CASES[name])
    config.target_modules = {"up", "down"}
    model = peft.get_peft_model(net(base, dtype), config)
    return filled(model)


def line(name: str, base: str = "dense", dtype: torch.dtype = torch.float32) -> Any:
    """The model after the one line."""
    return fastlora.patch_model(wrapped(name, base, dtype))


def filled(model: Any) -> Any:
    """Give the adapters values, so that they do something."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if ("lora_" in key or "hada" in key or "lokr" in key) and "magnitude" not in key:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


def results(model: Any, x: Tensor = X) -> dict[str, Tensor]:
    """The output, and the gradients of x and of every parameter."""
    x = x.clone().requires_grad_()
    model.zero_grad()
    y = model(x)
    y.float().square().mean().backward()
    assert x.grad is not None
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"y": y.detach(), "dx": x.grad, **grads}


def assert_close(mine: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float) -> None:
    assert mine.keys() == theirs.keys()
    for name, value in theirs.items():
        assert mine[name].dtype == value.dtype
        gap = (mine[name] - value).abs().max()
        assert gap <= tolerance * value.abs().max(), (name, gap)


def accelerated(model: Any) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, Accelerated)]


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=["f32", "bf16"])
def test_results_names_and_state(name: str, base: str, dtype: torch.dtype) -> None:
    if base != "dense" and name.startswith(("loha", "lokr")):
        pytest.skip("PEFT has none on 4-bit weights")
    plain, model = wrapped(name, base, dtype), wrapped(name, base, dtype)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    assert fastlora.patch_model(model) is model
    assert len(accelerated(model)) == (2 if base == "dense" else 4)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], value) for key, value in before.items())
    x, tolerance = X.to(dtype), 2e-5 if dtype != BF16 else 0.04
    expected = results(plain, x)
    assert_close(results(model, x), expected, tolerance)
    with torch.no_grad():  # PEFT's in training mode: bitsandbytes computes coarsely in inference
        assert_close({"y": model.eval()(x)}, {"y": expected["y"]}, tolerance)


@pytest.mark.parametrize("name", ["lora", "loha", "lokr"])
def test_4_bit_is_nearly_free_of_peft_where_peft_has_none(name: str) -> None:
    """PEFT makes LoHa and LoKr layers on 4-bit weights only by their dense type."""
    model = wrapped(name)
    rows = {row["module"]: row for row in fastlora.report(fastlora.patch_model(model))["modules"]}
    assert set(rows) == {"base_model.model.up", "base_model.model.down"}
    assert {row["method"] for row in rows.values()} == {name}
    assert {row["backend"] for row in rows.values()} == {"native"}


@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_switching_adapters(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several adapters, one active, both, none; the same as in PEFT at every turn."""
    mixed: list[Any] = []
    spans = peft_layers._spans

    def counted(*args: Any) -> Tensor:
        found = spans(*args)
        mixed.append(found)
        return found

    monkeypatch.setattr(peft_layers, "_spans", counted)
    models = [wrapped("lora", base) for _ in range(2)]
    for model in models:
        torch.manual_seed(4)
        model.add_adapter("other", peft.LoraConfig(r=3, target_modules=["up", "down"]))
        filled(model)
    plain, model = models
    fastlora.patch_model(model)
    for active in ("other", "default"):
        for each in models:
            each.set_adapter(active)
        assert_close(results(model), results(plain), 2e-5)
    for each in models:
        each.base_model.set_adapter(["default", "other"])
    assert_close(results(model), results(plain), 2e-5)
    with model.disable_adapter(), plain.disable_adapter(), torch.no_grad():
        assert_close({"y": model(X)}, {"y": plain(X)}, 2e-6)
    for each in models:
        each.add_weighted_adapter(["default", "other"], [0.5, 0.25], "sum", combination_type="cat")
        each.set_adapter("sum")
    with torch.no_grad():
        assert_close({"y": model(X)}, {"y": plain(X)}, 2e-5)
    for each in models:
        each.delete_adapter("sum")
        each.set_adapter("default")
    assert_close(results(model), results(plain), 2e-5)
    names = ["default", "other", "__base__"]
    model.eval(), plain.eval()  # in which bitsandbytes computes coarsely
    with torch.no_grad():
        mine, theirs = (each(X, adapter_names=names) for each in models)
    assert [m.tolist() for m in mixed] == [[[0, 4]] * 5 + [[4, 7]] * 5 + [[0, 0]] * 5] * 2
    assert_close({"y": mine}, {"y": theirs}, 2e-5 if base == "dense" else 3e-3)


@pytest.mark.parametrize("name", ["lora", "dora", "loha", "lokr"])
def test_merging_and_unmerging(name: str) -> None:
    plain, model = wrapped(name), line(name)
    with torch.no_grad():
        expected = plain(X)
        model.merge_adapter(), plain.merge_adapter()
        assert_close({"y": model(X)}, {"y": plain(X)}, 1e-6)
        model.unmerge_adapter()
        assert_close({"y": model(X)}, {"y": expected}, 2e-5)
        plain.unmerge_adapter()
        mine, theirs = model.merge_and_unload(), plain.merge_and_unload()
    assert type(mine.up) is nn.Linear
    assert_close(dict(mine.named_parameters()), dict(theirs.named_parameters()), 1e-6)


@pytest.mark.parametrize("name", ["lora", "dora", "loha", "lokr", "head"])
def test_files_are_the_same(name: str, tmp_path: Path) -> None:
    plain, model = wrapped(name), line(name)
    plain.save_pretrained(tmp_path / "plain"), model.save_pretrained(tmp_path / "ours")
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        ours = (tmp_path / "ours" / file).read_bytes()
        assert ours == (tmp_path / "plain" / file).read_bytes()
    loaded = peft.PeftModel.from_pretrained(net("dense"), str(tmp_path / "ours"))
    with torch.no_grad():
        assert_close({"y": fastlora.patch_model(loaded)(X)}, {"y": plain(X)}, 2e-5)


def test_loading_another_adapter_later(tmp_path: Path) -> None:
    first, second = wrapped("lora"), wrapped("rslora")
    second.save_pretrained(tmp_path)
    model: Any = fastlora.patch_model(first)
    model.load_adapter(str(tmp_path), "later")
    model.set_adapter("later")
    with torch.no_grad():
        assert_close({"y": model(X)}, {"y": second(X)}, 2e-5)


@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_dropout_in_training_alone(base: str) -> None:
    config = peft.LoraConfig(r=4, lora_dropout=0.5, target_modules=["up"])
    model: Any = fastlora.patch_model(filled(peft.get_peft_model(net(base), config)))
    torch.manual_seed(0)
    first, second = model(X), model(X)
    torch.manual_seed(0)
    assert not torch.equal(first, second)
    assert torch.equal(model(X), first)
    torch.manual_seed(0)
    mean = torch.stack([model(X) for _ in range(400)]).mean(0)
    assert (mean - model.eval()(X)).abs().max() < 0.2
    rows = fastlora.report(model)["modules"]
    assert "masks come from a seed" in rows[0]["notes"]


@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_copies_pickles_and_unpatch(base: str) -> None:
    plain = wrapped("dora", base)
    expected, types = results(plain), [type(m) for m in plain.modules()]
    model: Any = fastlora.patch_model(plain)
    mine = results(model)
    assert_close(results(copy.deepcopy(model)), mine, 0.0)
    if base == "dense":  # Params4bit comes back from a pickle without its quant_state's class
        assert_close(results(pickle.loads(pickle.dumps(model))), mine, 0.0)
    fastlora.unpatch(model)
    assert [type(m) for m in model.modules()] == types
    assert not any("fastlora" in key for m in model.modules() for key in vars(m))
    assert_close(results(model), expected, 0.0)
    fastlora.patch_model(model)


@pytest.mark.parametrize("autocast", [False, True])
def test_float32_inputs_of_a_16_bit_base(autocast: bool) -> None:
    """As after `prepare_model_for_kbit_training`: norms give float32, the base computes in 16."""
    plain, model = wrapped("lora", "nf4", BF16), line("lora", "nf4", BF16)
    x = X if not autocast else X.to(BF16)
    with torch.autocast("cpu", BF16, enabled=autocast):
        mine, theirs = model.base_model.model.up(x), plain.base_model.model.up(x)
    assert_close({"y": mine}, {"y": theirs}, 0.02)


@pytest.mark.parametrize("x", [torch.float32, BF16, torch.float16], ids=str)
@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_dtypes_under_autocast(base: str, x: torch.dtype) -> None:
    """A 4-bit layer gives x's dtype, a dense one autocast's; as in PEFT."""
    plain, model = wrapped("lora", base), line("lora", base)
    with torch.autocast("cpu", BF16):
        mine, theirs = (each.base_model.model.up(X.to(x)) for each in (model, plain))
    assert_close({"y": mine}, {"y": theirs}, 0.02)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("bias", [BF16, torch.float16], ids=str)
def test_a_bias_in_another_dtype_than_the_layer_computes_in(
    bias: torch.dtype, adapter: bool, autocast: bool
) -> None:
    config = peft.LoraConfig(r=4, bias="all", target_modules=["up", "down"])
    models = [net("nf4") for _ in range(2)]
    for each in models:
        each.up.bias.data = each.up.bias.to(bias)
    if adapter:
        models = [filled(peft.get_peft_model(each, copy.deepcopy(config))) for each in models]
    plain, model = models
    fastlora.patch_model(model)
    with torch.autocast("cpu", BF16, enabled=autocast):
        mine, theirs = results(model), results(plain)
    assert sum(key.endswith("bias") for key in mine) >= 2
    theirs = {key: value.to(mine[key].dtype) for key, value in theirs.items()}
    assert_close(mine, theirs, 0.1 if autocast else 0.005)


def test_a_trained_base_is_left_to_peft() -> None:
    plain, model = wrapped("lora"), line("lora")
    for each in (plain, model):
        each.base_model.model.up.base_layer.weight.requires_grad_(True)
    assert_close(results(model), results(plain), 2e-5)


@pytest.mark.slow
def test_compiled_without_graph_breaks() -> None:
    model: Any = fastlora.patch_model(wrapped("lora"))
    layer = model.base_model.model.up
    expected = layer(X)
    compiled = torch.compile(layer, fullgraph=True)
    torch.testing.assert_close(compiled(X), expected)


# ---- what is refused ----


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (peft.IA3Config(feedforward_modules=["up"]), "PEFT's ia3.Linear is left to PEFT"),
        (peft.OFTConfig(r=0, oft_block_size=4), "is left to PEFT"),
    ],
)
def test_other_methods(config: Any, words: str) -> None:
    config.target_modules = ["up"]
    model = peft.get_peft_model(net("dense"), config)
    types = [type(m) for m in model.modules()]
    with pytest.raises(ValueError, match=f"it can accelerate, but has none .*{words}"):
        fastlora.patch_model(model)
    assert [type(m) for m in model.modules()] == types


def test_what_is_skipped_is_in_the_report() -> None:
    config = peft.LoraConfig(r=2, target_modules=["up"], lora_bias=False)
    model = net("dense")
    model.conv = nn.Conv1d(4, 4, 1)
    config.target_modules = ["up", "conv"]
    report = fastlora.report(fastlora.patch_model(peft.get_peft_model(model, config)))
    assert report["skipped"] == {"base_model.model.conv": "PEFT's lora.Conv1d is left to PEFT"}
    assert "skipped base_model.model.conv" in str(report)
    assert report["totals"]["trainable_params"] == 2 * (64 + 128) + 2 * 8


def test_a_model_of_peft_takes_no_other_calls(tmp_path: Path) -> None:
    model: Any = fastlora.patch_model(wrapped("lora"))
    with pytest.raises(ValueError, match="is not patched yet, but this one is"):
        fastlora.patch_model(model)
    for call in (fastlora.merge, lambda m: fastlora.save_adapter(m, tmp_path / "a")):
        with pytest.raises(ValueError, match=r"use PEFT's methods: save_pretrained"):
            call(model)


def test_tensors_on_two_devices() -> None:
    model = wrapped("lora")
    model.base_model.model.up.lora_A.to("meta")
    with pytest.raises(ValueError, match=r"'base_model.model.up' must be on one device, got cpu"):
        fastlora.patch_model(model)
    assert not accelerated(model)


def test_an_unsupported_version(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastlora.integrations import versions

    versions.check_version.cache_clear()
    monkeypatch.setattr(versions, "version", lambda package: "0.99.1")
    with pytest.raises(ImportError, match=r"works with peft>=0.19,<0.22, found 0.99.1"):
        fastlora.patch_model(wrapped("lora"))
    versions.check_version.cache_clear()
