"""scikit-learn's digits as images: strategies against training from scratch, with few examples.

A small ViT and a small ResNet, built from config, are pre-trained on the digits 0-4 to tell which
digit it is and by how many quarter turns it is turned, each image in several views (tilted, moved,
scaled): a net that only tells five digits apart need not see what others are made of. Then each
method learns 5-9 from 20 images a class, as they are, through the `fastlora` command, with three
seeds, and so does the same architecture without its pre-training. `python -m bench.digits` appends
to bench/results/digits.jsonl.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from bench import common

Settings = Mapping[str, tuple[float, dict[str, Any]]]  # method -> learning rate and adapter section
VIT: Settings = {
    "full": (1e-3, {}),
    "head": (1e-2, {}),
    "partial": (3e-3, {"blocks": 2}),
    "adapter": (3e-3, {"r": 16}),
    "lora": (5e-3, {"r": 8}),
    "dora": (5e-3, {"r": 8}),
    "loha": (5e-3, {"r": 4}),
    "lokr": (1e-2, {"r": 8}),
    "scratch": (1e-3, {}),
}
# Batch norms learn the new statistics. No linear is there for the bottleneck adapter to follow.
NORMS = {"modules_to_save": ["normalization"]}
RESNET: Settings = {
    "full": (1e-3, {}),
    "head": (1e-2, {}),
    "partial": (2e-3, {"blocks": 2}),
    "lora": (1e-2, {"r": 16, **NORMS}),
    "dora": (5e-3, {"r": 16, **NORMS}),
    "loha": (5e-3, {"r": 8, **NORMS}),
    "lokr": (2e-2, {"r": 16, **NORMS}),
    "scratch": (1e-2, {}),
}
PER_CLASS, STEPS = 20, 240
TURNS, VIEWS = 4, 12  # quarter turns, and files per image of the first digits and each turn
PRETRAINING = 5000  # steps on them
RESULTS = "digits"


def write_images(
    directory: Path, digits: range, per_class: int | None, seed: int, turns: int = 1, views: int = 1
) -> None:
    """Write folders train, valid and test of these digits, 16 x 16 pixels.

    Args:
        directory: where to.
        digits: the classes.
        per_class: training images of each; None: all that are not held out.
        seed: of the choice.
        turns: classes of each digit: itself and its quarter turns.
        views: files per training image: itself, and the others tilted, moved and scaled a little.
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
        splits = {"test": test, "valid": valid, "train": train[:per_class]}
        for (split, chosen), turn in itertools.product(splits.items(), range(turns)):
            folder = directory / split / (f"{digit}-{90 * turn}" if turns > 1 else str(digit))
            folder.mkdir(parents=True)
            for i in chosen:
                pixels = (data.images[i] * 15.9).astype("uint8")
                image = Image.fromarray(pixels).resize((16, 16), Image.Resampling.NEAREST)
                image = image.rotate(90 * turn)
                image.save(folder / f"{i}.png")
                for view in range(1, views if split == "train" else 1):
                    tilted(image, draw).save(folder / f"{i}-{view}.png")


def tilted(image: Any, draw: random.Random) -> Any:
    """Return an image tilted by up to 20 degrees, moved by up to 2 pixels, scaled by up to 15%."""
    from PIL import Image

    angle, scale = math.radians(draw.uniform(-20, 20)), draw.uniform(0.85, 1.15)
    cos, sin, half = math.cos(angle) / scale, math.sin(angle) / scale, 7.5
    x, y = half + draw.uniform(-2, 2), half + draw.uniform(-2, 2)  # where the middle comes from
    matrix = (cos, sin, x - cos * half - sin * half, -sin, cos, y + sin * half - cos * half)
    return image.transform((16, 16), Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)


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
            embedding_size=32, hidden_sizes=[64, 128, 256], depths=[2, 2, 2],
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


def trials(kind: str, work: Path, wanted: Sequence[str], seeds: Sequence[int]) -> None:
    """Pre-train one model, then train it with each method; each row is written when it is there."""
    random_model, base = work / f"{kind}-random", work / f"{kind}-base" / "model"
    save_model(kind, random_model, 5)
    old = train(
        work, f"{kind}-base", random_model, work / "old", "full", 2e-3, {}, 0, PRETRAINING
    )  # fmt: skip
    print(f"{kind} pre-trained: accuracy {old['tuned']['accuracy']} on its own digits", flush=True)
    settings = {"vit": VIT, "resnet": RESNET}[kind]
    for method in [m for m in wanted if m in settings]:
        rate, adapter = settings[method]
        for seed in seeds:
            scratch = method == "scratch"
            found = train(
                work, f"{kind}-{method}-{seed}", random_model if scratch else base,
                work / f"new-{seed}", "full" if scratch else method, rate, adapter, seed, STEPS,
            )  # fmt: skip
            row = {
                "name": f"{kind} {method}", "model": kind, "method": method, "seed": seed,
                "accuracy": found["tuned"]["accuracy"], "seconds": found["train_seconds"],
                "trainable_parameters": found["trainable_parameters"],
            }  # fmt: skip
            print(row["name"], seed, row["accuracy"], flush=True)
            common.append(RESULTS, [{**common.facts("cpu"), **row}])


def main() -> None:
    """Run what was asked for, and write its rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default=",".join(VIT), help="methods")
    parser.add_argument("--models", default="vit,resnet")
    parser.add_argument("--seeds", default="0,1,2")
    options = parser.parse_args()
    seeds = [int(seed) for seed in options.seeds.split(",")]
    with tempfile.TemporaryDirectory() as place:
        work = Path(place)
        write_images(work / "old", range(5), None, 0, TURNS, VIEWS)
        for seed in seeds:
            write_images(work / f"new-{seed}", range(5, 10), PER_CLASS, seed)
        for kind in options.models.split(","):
            trials(kind, work, options.only.split(","), seeds)


if __name__ == "__main__":
    main()
