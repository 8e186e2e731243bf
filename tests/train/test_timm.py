"""Models of timm behind the interface of transformers; timm itself where it is installed."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")
from rich.console import Console

from fastlora.train import finished
from fastlora.train.config import read_config
from fastlora.train.refusal import Refusal
from fastlora.train.run import Run
from tests.train import world

QUIET = Console(quiet=True)


class Tiny(nn.Module):
    """What timm's models have that we use."""

    pretrained_cfg = {"classifier": "head"}

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(192, 192) for _ in range(2))
        self.head = nn.Linear(192, 1000)

    def reset_classifier(self, classes: int) -> None:
        self.head = nn.Linear(192, classes)

    def forward(self, pixels: Tensor) -> Tensor:
        h = pixels.flatten(1)
        for block in self.blocks:
            h = h + torch.tanh(block(h))
        found: Tensor = self.head(h)
        return found


def to_pixels(image: Any) -> Tensor:
    import numpy as np

    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float() / 255


@pytest.fixture
def timm(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A package with the calls that are made of timm."""

    def create_model(name: str, **options: Any) -> Tiny:
        if name != "tiny":
            raise RuntimeError(f"Unknown model ({name})")
        if options.get("pretrained"):
            torch.manual_seed(5)
        return Tiny()

    fake: Any = types.ModuleType("timm")
    fake.create_model = create_model
    fake.data = types.SimpleNamespace(
        resolve_data_config=lambda args, model: {}, create_transform=lambda **config: to_pixels
    )
    monkeypatch.setitem(sys.modules, "timm", fake)
    return fake


@pytest.mark.parametrize(
    ("method", "quantize"), [("full", None), ("head", "nf4"), ("lora", None), ("lora", "nf4")]
)
def test_training(timm: Any, tmp_path: Path, method: str, quantize: str | None) -> None:
    file = world.write_run(tmp_path, "image-classification", method, quantize=quantize)
    config = read_config(file, ["model=timm:tiny", "train.learning_rate=1e-2"])
    output = Run(config, QUIET).train()
    metrics = json.loads((output / "metrics.json").read_text())
    assert metrics["tuned"]["loss"] < metrics["base"]["loss"]
    again = finished.evaluate(output, str(tmp_path / "test.jsonl"), QUIET)
    assert again["loss"] == pytest.approx(metrics["tuned"]["loss"], rel=1e-4)


def test_what_is_refused(timm: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = world.write_run(tmp_path, "image-classification", "lora")
    for model, sentence in (
        ("timm:huge", "timm must have the model huge"),
        ("timm:tiny@none.safetensors", "there is no none.safetensors"),
    ):
        with pytest.raises(Refusal, match=sentence):
            Run(read_config(file, [f"model={model}"]), QUIET)
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(Refusal, match=r'need the package; run: pip install "fastlora\[vision\]"'):
        Run(read_config(file, ["model=timm:tiny"]), QUIET)


def test_the_real_package(tmp_path: Path) -> None:
    real = pytest.importorskip("timm")
    from safetensors.torch import save_file

    body = real.create_model("resnet10t", pretrained=False)
    save_file(body.state_dict(), tmp_path / "weights.safetensors")
    file = world.write_run(tmp_path, "image-classification", "lora")
    model = f"model=timm:resnet10t@{tmp_path / 'weights.safetensors'}"
    metrics = Run(read_config(file, [model, "train.max_steps=2"]), QUIET).train() / "metrics.json"
    assert json.loads(metrics.read_text())["steps"] == 2
