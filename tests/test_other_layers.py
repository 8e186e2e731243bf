"""Convolutions and embeddings: the same numbers, gradients and files as PEFT's."""

from __future__ import annotations

import copy
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastlora
from fastlora import BottleneckConfig, LoHaConfig, LoKrConfig, LoraConfig
from fastlora.adapters import AdapterConfig


class Net(nn.Module):
    """A convolution of each kind, and a linear."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv1d(6, 8, 3, padding=1, stride=2)
        self.two = nn.Conv2d(8, 12, 3, padding=1)
        self.point = nn.Conv2d(12, 12, 1, bias=False, dilation=1)
        self.parts = nn.Conv2d(12, 8, 3, groups=4)
        self.out = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.one(x)).unsqueeze(2).expand(-1, -1, 8, -1)
        h = torch.tanh(self.point(torch.tanh(self.two(h))))
        found: Tensor = self.out(self.parts(h).mean((2, 3)))
        return found


class Words(nn.Module):
    """An embedding and a linear."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 16, padding_idx=0)
        self.out = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.out(self.embed(x).mean(1))
        return found


GROUPS = tuple(map(int, version("peft").split(".")[:2])) >= (0, 21)  # as PEFT adapts them since
CONVS = ["one", "two", "point"]
CONFIGS: dict[str, AdapterConfig] = {
    "lora": LoraConfig(r=3, lora_alpha=6, target_modules=[*CONVS, "out"]),
    "rslora": LoraConfig(r=2, use_rslora=True, target_modules=CONVS),
    "lora, groups": LoraConfig(r=4, lora_alpha=6, target_modules=["parts", *CONVS]),
    "dora": LoraConfig(r=3, use_dora=True, target_modules=CONVS),
    "loha": LoHaConfig(r=2, alpha=5, target_modules=[*CONVS, "parts"]),
    "lokr": LoKrConfig(r=1, alpha=5, target_modules=[*CONVS, "parts"]),
    "lokr, full": LoKrConfig(r=8, alpha=5, target_modules=["two", "point"]),
    "lokr, both low": LoKrConfig(r=1, decompose_both=True, target_modules=CONVS),
    "embedding": LoraConfig(r=4, target_modules=["embed", "out"]),
}


def start(name: str) -> tuple[Any, Tensor]:
    torch.manual_seed(0)
    if name == "embedding":
        return Words(), torch.randint(0, 20, (3, 7))
    return Net(), torch.randn(3, 6, 16)


def noise(model: nn.Module) -> None:
    torch.manual_seed(3)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.requires_grad:
                own = 0.05 if "magnitude" in key else 0.3
                parameter.add_(own * torch.randn_like(parameter))


def theirs(model: nn.Module, config: AdapterConfig) -> Any:
    import peft

    kind = getattr(peft, type(config).__name__)
    return peft.get_peft_model(model, kind(**config.changed_fields()))


@pytest.mark.parametrize(
    "name", [n for n in sorted(CONFIGS) if n not in ("loha", "lokr") or GROUPS]
)
def test_numbers_gradients_and_files_are_those_of_peft(name: str, tmp_path: Path) -> None:
    import peft

    config = CONFIGS[name]
    base, x = start(name)
    other = theirs(copy.deepcopy(base), config)
    noise(other)
    other.save_pretrained(tmp_path / "theirs")
    ours = fastlora.load_adapter(copy.deepcopy(base), tmp_path / "theirs")
    torch.testing.assert_close(ours(x), other(x))
    target = torch.randn(3, 5)
    for model in (ours, other):
        (model(x) - target).square().sum().backward()
    grads = [{k: p.grad for k, p in m.named_parameters() if p.requires_grad} for m in (ours, other)]
    assert len(grads[0]) == len(grads[1])
    flat = [
        sorted(float(g.double().square().sum()) for g in found.values() if g is not None)
        for found in grads
    ]
    assert flat[0] == pytest.approx(flat[1], rel=1e-4)
    fastlora.save_adapter(ours, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "ours"))
    torch.testing.assert_close(again(x), other(x))
    merged = fastlora.merge(ours)
    assert not [p for p in merged.parameters() if "lora" in str(p)]
    torch.testing.assert_close(merged(x), other(x), rtol=1e-4, atol=1e-5)
    assert type(merged.get_submodule(config.target_modules[0])) is type(  # type: ignore[index]
        base.get_submodule(config.target_modules[0])  # type: ignore[index]
    )


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_identity_at_first_training_and_unpatch(name: str) -> None:
    model, x = start(name)
    before, state = model(x), copy.deepcopy(model.state_dict())
    fastlora.patch_model(model, CONFIGS[name])
    torch.testing.assert_close(model(x), before)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-2)
    target = torch.randn(3, 5)
    values = []
    for _ in range(15):
        loss = (model(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        values.append(loss.item())
    assert values[-1] < 0.9 * values[0]
    kinds = {row["module"]: row["method"] for row in fastlora.report(model)["modules"]}
    assert len(kinds) == len(CONFIGS[name].target_modules or ())
    fastlora.unpatch(model)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    torch.testing.assert_close(model(x), before)


@pytest.mark.parametrize(
    ("kind", "groups", "out", "r"),
    [(nn.Conv1d, 2, 10, 4), (nn.Conv2d, 2, 10, 4), (nn.Conv3d, 2, 10, 4), (nn.Conv1d, 6, 12, 6)],
)
def test_groups_are_those_of_peft(kind: Any, groups: int, out: int, r: int, tmp_path: Path) -> None:
    """Of each number of dimensions, and one channel in a group."""
    import peft

    torch.manual_seed(0)
    base: Any = nn.Sequential(kind(6, out, 3, stride=2, padding=1, groups=groups), nn.Tanh())
    x = torch.randn(2, 6, *[7] * (base[0].weight.dim() - 2))
    other = theirs(copy.deepcopy(base), LoraConfig(r=r, use_rslora=True, target_modules=["0"]))
    noise(other)
    other.save_pretrained(tmp_path / "theirs")
    ours: Any = fastlora.load_adapter(copy.deepcopy(base), tmp_path / "theirs")
    torch.testing.assert_close(ours(x), other(x))
    fastlora.save_adapter(ours, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "ours"))
    torch.testing.assert_close(again(x), other(x))
    y = ours(x)
    merged: Any = fastlora.merge(copy.deepcopy(ours))
    assert type(merged[0]) is kind and merged[0].groups == 1
    torch.testing.assert_close(merged(x), y)
    plain: Any = fastlora.unpatch(ours)
    assert plain[0].groups == groups and torch.equal(plain(x), base(x))


def test_quantize_leaves_them_dense() -> None:
    model, x = start("lora")
    fastlora.patch_model(model, CONFIGS["lora"], quantize="nf4")
    rows = {row["module"]: row["format"] for row in fastlora.report(model)["modules"]}
    assert rows == {"one": "dense", "two": "dense", "point": "dense", "out": "nf4"}
    assert model(x).isfinite().all()


def test_all_linear_means_linears() -> None:
    model, _ = start("lora")
    fastlora.patch_model(model, LoraConfig(r=2))
    assert [row["module"] for row in fastlora.report(model)["modules"]] == ["out"]


def test_what_is_refused() -> None:
    model, _ = start("lora")
    with pytest.raises(ValueError, match="the rank of 'point' must be at most 12"):
        fastlora.patch_model(model, LoraConfig(r=13, target_modules=["point"]))
    with pytest.raises(NotImplementedError, match="bottleneck adapter stands after a linear"):
        fastlora.patch_model(model, BottleneckConfig(r=2, target_modules=["two"]))
    with pytest.raises(NotImplementedError, match="LoKr on a 1-d convolution needs r below"):
        fastlora.patch_model(model, LoKrConfig(r=2, target_modules=["one"]))
    with pytest.raises(ValueError, match="rank of 'parts' must be a multiple of its 4 groups, got"):
        fastlora.patch_model(model, LoraConfig(r=3, target_modules=["parts"]))
    with pytest.raises(NotImplementedError, match="use_dora must be False for a convolution with"):
        fastlora.patch_model(model, LoraConfig(r=4, use_dora=True, target_modules=["parts"]))
    words, _ = start("embedding")
    with pytest.raises(NotImplementedError, match="an embedding can have LoRA alone"):
        fastlora.patch_model(words, LoHaConfig(r=2, target_modules=["embed"]))
    with pytest.raises(NotImplementedError, match="use_dora must be False for an embedding"):
        fastlora.patch_model(words, LoraConfig(r=2, use_dora=True, target_modules=["embed"]))
    words.out = nn.Linear(16, 20)
    words.out.weight = words.embed.weight
    with pytest.raises(ValueError, match="that of 'embed' is tied"):
        fastlora.patch_model(words, LoraConfig(r=2, target_modules=["embed"]))
    norm = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4))
    with pytest.raises(TypeError, match="a convolution or an nn"):
        fastlora.patch_model(norm, LoraConfig(r=2, target_modules=["0"]))
    assert not any(p.requires_grad is False for p in model.parameters())
