"""scikit-learn's digits as images: strategies against training from scratch, with few examples.

A small ViT and a small ResNet, built from config, are pre-trained on the digits 0-4; then each
method learns 5-9 from 20 examples a class, through the `fastlora` command, with three seeds, and so
does the same architecture without its pre-training. `python -m bench.digits` appends to
bench/results/digits.jsonl.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from bench import common

METHODS: Mapping[str, tuple[float, dict[str, Any]]] = {
    "full": (1e-3, {}),
    "head": (1e-2, {}),
    "partial": (3e-3, {"blocks": 2}),
    "adapter": (3e-3, {"r": 16}),
    "lora": (5e-3, {"r": 8}),
    "dora": (5e-3, {"r": 8}),
    "loha": (5e-3, {"r": 4}),
    "lokr": (1e-2, {"r": 8}),
}
PER_CLASS, STEPS, SEEDS = 20, 120, (0, 1, 2)
SCRATCH = 1e-3


def write_images(directory: Path, digits: range, per_class: int | None, seed: int) -> None:
    """Write folders train, valid and test of these digits, 16 x 16 pixels.

    Args:
        directory: where to.
        digits: the classes.
        per_class: training images of each; None: all that are not held out.
        seed: of the choice.
    """
    from PIL import Image
    from sklearn.datasets import load_digits

    data = load_digits()
    draw = random.Random(seed)
    for digit in digits:
        places = [i for i, label in enumerate(data.target) if label == digit]
        random.Random(0).shuffle(places)  # the test images are the same for every seed
        test, valid, train = places[:60], places[60:80], places[80:]
        draw.shuffle(train)
        for split, chosen in (("test", test), ("valid", valid), ("train", train[:per_class])):
            folder = directory / split / str(digit)
            folder.mkdir(parents=True)
            for i in chosen:
                pixels = (data.images[i] * 15.9).astype("uint8")
                image = Image.fromarray(pixels).resize((16, 16), Image.Resampling.NEAREST)
                image.save(folder / f"{i}.png")


def save_model(kind: str, directory: Path, labels: int) -> None:
    """Write a small model of this kind with random values."""
    import torch
    import transformers

    torch.manual_seed(0)
    if kind == "vit":
        vit = transformers.ViTConfig(
            image_size=16, patch_size=4, hidden_size=64, num_hidden_layers=4, num_attention_heads=4,
            intermediate_size=128, num_labels=labels,
        )  # fmt: skip
        transformers.ViTForImageClassification(vit).save_pretrained(directory)
    else:
        resnet = transformers.ResNetConfig(
            embedding_size=16, hidden_sizes=[16, 32, 64], depths=[1, 1, 1], layer_type="basic",
            downsample_in_first_stage=False, num_labels=labels,
        )  # fmt: skip
        resnet.image_size = 16
        transformers.ResNetForImageClassification(resnet).save_pretrained(directory)


def train(
    work: Path, name: str, model: Path, images: Path, method: str, rate: float, adapter: Any,
    seed: int, steps: int,
) -> dict[str, Any]:  # fmt: skip
    """Run the command; return its metrics."""
    content = {
        "model": str(model),
        "task": "image-classification",
        "data": {split: str(images / split) for split in ("train", "valid", "test")},
        "method": method,
        "adapter": adapter,
        "train": {
            "max_steps": steps, "learning_rate": rate, "per_device_train_batch_size": 25,
            "lr_scheduler_type": "cosine", "warmup_ratio": 0.1, "seed": seed, "eval_strategy": "no",
            "save_strategy": "no",
        },
        "output": str(work / name),
    }  # fmt: skip
    file = work / f"{name}.yaml"
    file.write_text(yaml.safe_dump(content), encoding="utf-8")
    command = [sys.executable, "-m", "fastlora", "train", str(file)]
    subprocess.run(command, check=True, capture_output=True, env=dict(os.environ))
    found: dict[str, Any] = json.loads((work / name / "metrics.json").read_text())
    return found


def main() -> None:
    """Pre-train, train everything, and write the rows."""
    with tempfile.TemporaryDirectory() as place:
        work = Path(place)
        write_images(work / "old", range(5), None, 0)
        for seed in SEEDS:
            write_images(work / f"new-{seed}", range(5, 10), PER_CLASS, seed)
        for kind in ("vit", "resnet"):
            save_model(kind, work / f"{kind}-random", 5)
            train(
                work,
                f"{kind}-base",
                work / f"{kind}-random",
                work / "old",
                "full",
                2e-3,
                {},
                0,
                300,
            )
            base = work / f"{kind}-base" / "model"
            methods = {**METHODS, "scratch": (SCRATCH, {})}
            if kind == "resnet":
                methods.pop("adapter")  # it stands after linears
            for method, (rate, adapter) in methods.items():
                for seed in SEEDS:
                    scratch = method == "scratch"
                    model = work / f"{kind}-random" if scratch else base
                    images, name = work / f"new-{seed}", f"{kind}-{method}-{seed}"
                    real = "full" if scratch else method
                    found = train(work, name, model, images, real, rate, adapter, seed, STEPS)
                    row = {
                        "name": f"{kind} {method}", "model": kind, "method": method, "seed": seed,
                        "accuracy": found["tuned"]["accuracy"], "seconds": found["train_seconds"],
                        "trainable_parameters": found["trainable_parameters"],
                    }  # fmt: skip
                    print(name, row["accuracy"], flush=True)
                    common.append("digits", [{**common.facts("cpu"), **row}])


if __name__ == "__main__":
    main()
