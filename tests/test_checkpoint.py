"""Adapter files: PEFT loads ours, we load PEFT's, strictly, all or nothing."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import fastlora
from fastlora import (
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    load_adapter,
    patch_model,
    save_adapter,
    unpatch,
)
from fastlora.adapters import AdapterConfig
from fastlora.layers import QuantizedLinear
from tests.models import fill_adapters, llama, peft_model, plain
from tests.variants import VARIANTS, with_

IDS = torch.arange(12).view(2, 6)
X = torch.randn(3, 32, generator=torch.Generator().manual_seed(3))
REFERENCE: dict[str, Any] = {"backend": "reference"}
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
ATTENTION = ["q_proj", "v_proj"]

CONFIGS: dict[str, AdapterConfig] = {
    "suffixes": LoraConfig(r=4, lora_alpha=16, target_modules=ATTENTION),
    "pattern": LoraConfig(r=4, target_modules=r".*mlp\.(up|down)_proj"),
    "all-linear": LoraConfig(r=2, target_modules="all-linear"),
    "patterns": LoraConfig(
        r=4,
        target_modules=[*ATTENTION, "up_proj"],
        rank_pattern={"up_proj": 2, r"layers\.0\.self_attn\.q_proj": 3},
        alpha_pattern={"v_proj": 20},
    ),
    "rslora": LoraConfig(r=4, use_rslora=True, target_modules=ATTENTION),
    "layers": LoraConfig(r=4, target_modules=ATTENTION, layers_to_transform=[1]),
    "head": LoraConfig(r=4, target_modules=ATTENTION, modules_to_save=["lm_head"]),
    "exclude": LoraConfig(r=4, target_modules="all-linear", exclude_modules=["o_proj"]),
    "bias": LoraConfig(r=4, target_modules=ATTENTION, bias="lora_only"),
    "all biases": LoraConfig(r=4, target_modules=ATTENTION, bias="all"),
    "dora": LoraConfig(r=4, use_dora=True, target_modules="all-linear"),
    "dora, rslora, head": LoraConfig(
        r=4, use_dora=True, use_rslora=True, target_modules=ATTENTION, modules_to_save=["lm_head"]
    ),
    "dora with biases": LoraConfig(r=4, use_dora=True, target_modules=ATTENTION, bias="lora_only"),
    "loha": LoHaConfig(r=3, alpha=6, target_modules="all-linear"),
    "loha patterns": LoHaConfig(
        r=4,
        target_modules=[*ATTENTION, "up_proj"],
        rank_pattern={"up_proj": 2, r"layers\.0\.self_attn\.q_proj": 3},
        alpha_pattern={"v_proj": 20},
    ),
    "loha, head, layers": LoHaConfig(
        r=2, target_modules=ATTENTION, modules_to_save=["lm_head"], layers_to_transform=[0]
    ),
    "lokr, both full": LoKrConfig(r=40, alpha=60, target_modules="all-linear"),
    "lokr, w2 low": LoKrConfig(r=2, alpha=5, target_modules="all-linear"),
    "lokr, both low": LoKrConfig(
        r=1, alpha=2, decompose_both=True, target_modules="all-linear", exclude_modules=["o_proj"]
    ),
    "lokr, factor 8": LoKrConfig(r=2, decompose_factor=8, target_modules="all-linear"),
    "lokr, factor 7, patterns": LoKrConfig(
        r=2,
        decompose_factor=7,
        decompose_both=True,
        target_modules=[*ATTENTION, "up_proj"],
        rank_pattern={"up_proj": 1},
        alpha_pattern={"v_proj": 20},
    ),
}


def base(name: str) -> Any:
    return llama(attention_bias=True, mlp_bias=True) if "bias" in name else llama()


@pytest.mark.parametrize("name", CONFIGS)
def test_peft_loads_ours(name: str, tmp_path: Path) -> None:
    from peft import PeftModel

    ours = patch_model(base(name), CONFIGS[name], **REFERENCE)
    fill_adapters(ours)
    save_adapter(ours, tmp_path / "a")
    theirs = PeftModel.from_pretrained(base(name), str(tmp_path / "a"))
    torch.testing.assert_close(theirs(IDS).logits, ours(IDS).logits)
    assert not torch.allclose(base(name)(IDS).logits, ours(IDS).logits)
    theirs.save_pretrained(str(tmp_path / "b"))
    mine, again = load_file(tmp_path / "a" / WEIGHTS), load_file(tmp_path / "b" / WEIGHTS)
    assert mine.keys() == again.keys()
    assert all(torch.equal(mine[key], again[key]) for key in mine)


@pytest.mark.parametrize("name", CONFIGS)
def test_we_load_theirs(name: str, tmp_path: Path) -> None:
    theirs: Any = peft_model(base(name), CONFIGS[name], task_type="CAUSAL_LM").eval()
    fill_adapters(theirs)
    theirs.save_pretrained(str(tmp_path))
    ours = base(name)
    assert load_adapter(ours, tmp_path, **REFERENCE) is ours
    torch.testing.assert_close(ours(IDS).logits, theirs(IDS).logits)
    save_adapter(ours, tmp_path / "again")
    one, other = load_file(tmp_path / WEIGHTS), load_file(tmp_path / "again" / WEIGHTS)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_round_trip_on_a_plain_model(quantize: str | None, name: str, tmp_path: Path) -> None:
    config = with_(VARIANTS[name], modules_to_save=["head"])
    model = patch_model(plain(), config, quantize=quantize, **REFERENCE)
    fill_adapters(model)
    save_adapter(model, tmp_path / "a")
    fresh = load_adapter(plain(), tmp_path / "a", quantize=quantize, **REFERENCE)
    assert torch.equal(fresh(X), model(X))
    again = patch_model(plain(), config, quantize=quantize, seed=7, **REFERENCE)
    load_adapter(again, tmp_path / "a")
    assert torch.equal(again(X), model(X))
    trainable = {name for name, p in again.named_parameters() if p.requires_grad}
    assert trainable == {name for name, p in fresh.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("name", ["all-linear", "head", "bias", "dora", "lokr, w2 low"])
def test_loading_on_a_model_that_is_only_quantised(name: str, tmp_path: Path) -> None:
    quantised = patch_model(base(name), quantize="nf4", **REFERENCE)
    decoded = unpatch(copy.deepcopy(quantised), dequantize=True)
    theirs: Any = peft_model(decoded, CONFIGS[name], task_type="CAUSAL_LM").eval()
    fill_adapters(theirs)
    theirs.save_pretrained(str(tmp_path / "a"))
    with pytest.raises(ValueError, match="quantize must be None for a model that is patched"):
        load_adapter(quantised, tmp_path / "a", quantize="nf4")
    ours = load_adapter(quantised, tmp_path / "a", **REFERENCE)
    torch.testing.assert_close(ours(IDS).logits, theirs(IDS).logits)
    assert {row["format"] for row in fastlora.report(ours)["modules"]} == {"nf4"}
    save_adapter(ours, tmp_path / "b")
    one, other = load_file(tmp_path / "a" / WEIGHTS), load_file(tmp_path / "b" / WEIGHTS)
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("quantised", [False, True])
def test_a_file_of_peft_may_have_more_ranks_than_a_layer(quantised: bool, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 1))
    theirs = peft.get_peft_model(
        copy.deepcopy(net), peft.LoraConfig(r=4, target_modules=["0", "1"], init_lora_weights=False)
    )
    theirs.save_pretrained(tmp_path)
    if quantised:
        fastlora.patch_model(net, quantize="nf4")
    load_adapter(net, tmp_path)
    for name, layer in theirs.base_model.model.named_children():
        mine: Any = net.get_submodule(name)
        assert torch.equal(mine.lora_A, layer.lora_A["default"].weight)
    if not quantised:
        x = torch.randn(3, 8)
        torch.testing.assert_close(net.eval()(x), theirs.eval()(x))


def test_loading_takes_compute(saved: Path) -> None:
    first = load_adapter(plain(), saved, quantize="nf4", compute="fp8", **REFERENCE)
    later: Any = plain()
    patch_model(later.blocks, quantize="nf4", **REFERENCE)
    unnamed = {key.replace("blocks.", ""): t for key, t in load_file(saved / WEIGHTS).items()}
    save_file(unnamed, saved / WEIGHTS)
    load_adapter(later.blocks, saved, compute="fp8", **REFERENCE)
    for model in (first, later):
        packed: Any = [m for m in model.modules() if isinstance(m, QuantizedLinear)]
        assert len(packed) == 4 and {layer.compute for layer in packed} == {"fp8"}
    assert torch.equal(first(X), later(X))


def test_a_file_that_does_not_fit_leaves_a_quantised_model_alone(saved: Path) -> None:
    model: Any = patch_model(plain(), quantize="nf4", **REFERENCE)
    edit_weights(saved, lambda tensors: tensors.pop(KEY))
    y = model(X)
    with pytest.raises(ValueError, match="1 missing"):
        load_adapter(model, saved, **REFERENCE)
    assert torch.equal(model(X), y) and all(p.requires_grad for p in model.norm.parameters())


def test_sequence_classification_keeps_its_head(tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import LlamaForSequenceClassification

    def make() -> Any:
        return llama(cls=LlamaForSequenceClassification, num_labels=3)

    config = LoraConfig(r=4, target_modules=ATTENTION, task_type="SEQ_CLS")
    ours = patch_model(make(), config, **REFERENCE)
    fill_adapters(ours)
    save_adapter(ours, tmp_path / "a")
    theirs = PeftModel.from_pretrained(make(), str(tmp_path / "a")).eval()
    torch.testing.assert_close(theirs(IDS).logits, ours(IDS).logits)
    theirs.save_pretrained(str(tmp_path / "b"))
    back = load_adapter(make(), tmp_path / "b", **REFERENCE)
    torch.testing.assert_close(back(IDS).logits, ours(IDS).logits)


def test_the_files(tmp_path: Path) -> None:
    model = llama()
    model.name_or_path = "some/model"
    patch_model(model, LoraConfig(r=4), **REFERENCE)
    save_adapter(model, tmp_path / "new" / "a")
    assert sorted(os.listdir(tmp_path / "new")) == ["a"]
    assert sorted(os.listdir(tmp_path / "new" / "a")) == [CONFIG, WEIGHTS]
    text = (tmp_path / "new" / "a" / CONFIG).read_text()
    assert json.loads(text) == {
        "base_model_name_or_path": "some/model",
        "inference_mode": True,
        "lora_alpha": 8,
        "peft_type": "LORA",
        "r": 4,
        "target_modules": sorted(
            ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        ),
        "task_type": None,
    }
    assert text == json.dumps(json.loads(text), indent=2, sort_keys=True) + "\n"
    header = (tmp_path / "new" / "a" / WEIGHTS).read_bytes()[8:80]
    assert b'{"__metadata__":{"format":"pt"}' in header


def test_names_that_only_full_paths_can_select(tmp_path: Path) -> None:
    model = plain()
    model.head2 = nn.ModuleDict({"up": nn.LayerNorm(4)})
    patch_model(model, LoraConfig(r=2), **REFERENCE)
    save_adapter(model, tmp_path / "a")
    names = json.loads((tmp_path / "a" / CONFIG).read_text())["target_modules"]
    assert names == ["blocks.0.down", "blocks.0.up", "blocks.1.down", "blocks.1.up", "head"]


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    model = patch_model(plain(), LoraConfig(r=4, target_modules=["up", "down"]), **REFERENCE)
    fill_adapters(model)
    save_adapter(model, tmp_path / "a")
    return tmp_path / "a"


def edit_config(directory: Path, **changes: Any) -> None:
    fields = json.loads((directory / CONFIG).read_text())
    (directory / CONFIG).write_text(json.dumps({**fields, **changes}))


def edit_weights(directory: Path, change: Any) -> None:
    tensors = load_file(directory / WEIGHTS)
    change(tensors)
    save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})


KEY = "base_model.model.blocks.0.up.lora_A.weight"


def truncate(directory: Path) -> None:
    path = directory / WEIGHTS
    path.write_bytes(path.read_bytes()[:-7])


def flip(directory: Path) -> None:
    path = directory / WEIGHTS
    data = bytearray(path.read_bytes())
    data[3] ^= 0x40
    path.write_bytes(bytes(data))


def repeat_name(directory: Path) -> None:
    path = directory / WEIGHTS
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    entry = b'"x":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},'
    header = b"{" + entry + entry + data[9 : 8 + length]
    path.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + length :])


def pickle_only(directory: Path) -> None:
    (directory / WEIGHTS).rename(directory / "adapter_model.bin")


DAMAGE: list[tuple[Any, type[Exception], str]] = [
    (truncate, ValueError, "must be a whole safetensors file, but it is damaged"),
    (flip, ValueError, "must be a whole safetensors file, but it is damaged"),
    (repeat_name, ValueError, "but it is damaged: .*twice|but it is damaged: .*uplicate"),
    (pickle_only, ValueError, "got the pickle .*adapter_model.bin, which can run code"),
    (lambda d: (d / WEIGHTS).unlink(), FileNotFoundError, "adapter_model.safetensors must exist"),
    (lambda d: (d / CONFIG).unlink(), FileNotFoundError, "adapter_config.json must exist"),
    (lambda d: (d / CONFIG).write_text("{"), ValueError, "adapter_config.json must be JSON"),
    (lambda d: (d / CONFIG).write_text("[]"), ValueError, "must hold an object, got list"),
    (lambda d: (d / CONFIG).write_text(" " * 2**21), ValueError, "must be at most 1 MiB"),
    (lambda d: edit_weights(d, lambda t: t.pop(KEY)), ValueError,
     rf"1 missing \({KEY}\).*; load it on the model that it was trained on"),
    (lambda d: edit_weights(d, lambda t: t.update(z=torch.ones(1))), ValueError,
     r"1 unexpected \(z\)"),
    (lambda d: edit_weights(d, lambda t: t.update({KEY: torch.ones(4, 31)})), ValueError,
     rf"1 misshapen \({KEY} has shape \(4, 31\), the model needs \(4, 32\)\)"),
    (lambda d: edit_weights(d, lambda t: t[KEY].fill_(float("nan"))), ValueError,
     f"must hold finite floating values, but {KEY} does not"),
    (lambda d: edit_config(d, r=8), ValueError, "8 misshapen"),
    (lambda d: edit_config(d, r=0), ValueError, "r must be between 1 and 4096"),
    (lambda d: edit_config(d, r="4"), TypeError, "r must be an int, got '4'"),
    (lambda d: edit_config(d, lora_alpha=float("inf")), ValueError, "lora_alpha must be finite"),
    (lambda d: edit_config(d, lora_dropout=2), ValueError, "lora_dropout must be at least 0"),
    (lambda d: edit_config(d, target_modules="(([a-z0-9_.])+)+X"), ValueError, "in little time"),
    (lambda d: edit_config(d, target_modules=None), ValueError, "target_modules must be set"),
    (lambda d: edit_config(d, target_modules=["q"]), ValueError, "must match an nn.Linear"),
    (lambda d: edit_config(d, peft_type="IA3"), NotImplementedError, "got 'IA3'"),
    (lambda d: edit_config(d, use_dora=True), ValueError,
     r"4 missing \(base_model.model.blocks.0.down.lora_magnitude_vector, "),
    (lambda d: edit_config(d, peft_type="LOHA"), NotImplementedError,
     "the PEFT field 'lora_alpha' must be unset, got '8'"),
    (lambda d: edit_config(d, layer_replication=[[0, 1]]), NotImplementedError,
     "'layer_replication' must be unset"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("damage", "kind", "sentence"), DAMAGE, ids=[f"{i} {d[2][:30]}" for i, d in enumerate(DAMAGE)]
)
def test_damaged_files_leave_the_model_alone(
    damage: Any, kind: type[Exception], sentence: str, saved: Path
) -> None:
    damage(saved)
    model = plain()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(kind, match=sentence):
        load_adapter(model, saved, **REFERENCE)
    assert type(model.blocks[0].up) is nn.Linear
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())


def test_every_truncation_is_noticed(saved: Path) -> None:
    data = (saved / WEIGHTS).read_bytes()
    for length in range(0, len(data), 97):
        (saved / WEIGHTS).write_bytes(data[:length])
        with pytest.raises(ValueError, match="must be a whole safetensors file"):
            load_adapter(plain(), saved, **REFERENCE)


def test_another_base_and_another_patch(saved: Path) -> None:
    from tests.models import Plain

    with pytest.raises(ValueError, match=r"8 misshapen .*the model needs \(4, 40\)"):
        load_adapter(Plain(width=40), saved, **REFERENCE)
    for fields, sentence in (
        ({"r": 8, "target_modules": ["up", "down"]},
         "has lora with r=8, scaling=1 .* and the file lora with r=4, scaling=2"),
        ({"r": 4, "target_modules": ["up", "down"], "use_dora": True},
         r"has dora with r=4, .*lora_magnitude_vector \(64,\) and the file lora with r=4"),
        ({"r": 4, "target_modules": ["up"]}, "adapted modules differ in blocks.0.down"),
        ({"r": 4, "target_modules": ["up", "down"], "modules_to_save": ["norm"]},
         "modules_to_save differ in norm"),
    ):  # fmt: skip
        model = patch_model(plain(), LoraConfig(**fields), **REFERENCE)  # type: ignore[arg-type]
        y = model(X)
        with pytest.raises(ValueError, match=sentence):
            load_adapter(model, saved)
        assert torch.equal(model(X), y)
    other = patch_model(plain(), LoHaConfig(r=4, target_modules=["up", "down"]), **REFERENCE)
    with pytest.raises(ValueError, match=r"has loha with r=4, .*and the file lora with r=4"):
        load_adapter(other, saved)
    model = patch_model(plain(), LoraConfig(r=4, target_modules=["up", "down"]), **REFERENCE)
    with pytest.raises(ValueError, match="quantize must be None for a model that is patched"):
        load_adapter(model, saved, quantize="nf4")
    with pytest.raises(ValueError, match="compute must be 'auto' for a model that has an adapter"):
        load_adapter(model, saved, compute="fp8")
    with pytest.raises(ValueError, match="compute='fp8' takes 4-bit weights, got a model that"):
        load_adapter(plain(), saved, compute="fp8", **REFERENCE)


def test_refusals_of_save(saved: Path, tmp_path: Path) -> None:
    model = patch_model(plain(), LoraConfig(r=2), **REFERENCE)
    with pytest.raises(ValueError, match="the model must be patched, but it is not"):
        save_adapter(plain(), tmp_path / "b")
    with pytest.raises(ValueError, match="must have an adapter to save, but it is only quantised"):
        save_adapter(patch_model(plain(), quantize="nf4", **REFERENCE), tmp_path / "b")
    with pytest.raises(FileExistsError, match="must be empty or new, but it holds files"):
        save_adapter(model, saved)
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError, match="must be a directory, but it is a file"):
        save_adapter(model, tmp_path / "file")
    with pytest.raises(OSError, match=r"must be writable to .*file/b, but the system says"):
        save_adapter(model, tmp_path / "file" / "b")
    assert sorted(os.listdir(tmp_path)) == ["a", "file"]


def test_overwrite_keeps_other_files(saved: Path) -> None:
    (saved / "README.md").write_text("kept")
    model = patch_model(plain(), LoraConfig(r=2), **REFERENCE)
    save_adapter(model, saved, overwrite=True)
    assert sorted(os.listdir(saved)) == ["README.md", CONFIG, WEIGHTS]
    assert json.loads((saved / CONFIG).read_text())["r"] == 2
    assert os.listdir(saved.parent) == ["a"]
    (saved.parent / "empty").mkdir()
    save_adapter(model, saved.parent / "empty")


@pytest.mark.parametrize("call", ["mkdir", "write", "fsync", "rename", "replace"])
@pytest.mark.parametrize("kind", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_save_that_fails_leaves_nothing(
    call: str, kind: BaseException, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise kind

    over = call == "replace"
    target = saved if over else saved.parent / "b"
    old = (saved / WEIGHTS).read_bytes(), (saved / CONFIG).read_bytes()
    model = patch_model(plain(), LoraConfig(r=2), **REFERENCE)
    where: Any = {"mkdir": Path, "write": fastlora.adapter_files}.get(call, os)
    monkeypatch.setattr(where, "write_file" if call == "write" else call, fail)
    with pytest.raises(type(kind)) as error:
        save_adapter(model, target, overwrite=over)
    monkeypatch.undo()
    assert isinstance(kind, KeyboardInterrupt) or "No space left on device" in str(error.value)
    assert os.listdir(saved.parent) == ["a"]
    assert old == ((saved / WEIGHTS).read_bytes(), (saved / CONFIG).read_bytes())
