"""Tiny models with tokenizers and data files on disk, one of each kind that can be trained."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from tests import offline

GOOD, BAD = ("good", "yes", "many"), ("bad", "no", "small")
COUNTS = {"train": 24, "valid": 8, "test": 8}


def config_of(model: str) -> tuple[Any, str]:
    """Return a transformers config and the class that is saved."""
    import transformers

    words = offline.tokenizer()
    vocabulary = len(words)
    if model == "bert":
        return transformers.BertConfig(
            vocab_size=vocabulary, hidden_size=32, num_hidden_layers=3, num_attention_heads=2,
            intermediate_size=64, max_position_embeddings=64, pad_token_id=0,
        ), "BertModel"  # fmt: skip
    if model == "t5":
        return transformers.T5Config(
            vocab_size=vocabulary, d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2,
            decoder_start_token_id=0, pad_token_id=0, eos_token_id=words.eos_token_id,
        ), "T5ForConditionalGeneration"  # fmt: skip
    if model == "vit":
        return transformers.ViTConfig(
            image_size=8, patch_size=4, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
            intermediate_size=64, num_labels=5,
        ), "ViTForImageClassification"  # fmt: skip
    if model == "resnet":
        return transformers.ResNetConfig(
            embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=5,
        ), "ResNetForImageClassification"  # fmt: skip
    return offline.llama().config, "LlamaForCausalLM"


def save_model(directory: Path, model: str) -> Path:
    """Write a tiny pre-trained model of this kind, as transformers does."""
    import transformers

    config, kind = config_of(model)
    torch.manual_seed(0)
    path = directory / model
    getattr(transformers, kind)(config).save_pretrained(path)
    if model not in ("vit", "resnet"):
        offline.tokenizer().save_pretrained(path)
    return path


def _labelled(draw: random.Random, i: int) -> dict[str, Any]:
    words = GOOD if i % 2 else BAD
    text = " ".join([*draw.sample(offline.WORDS, 4), draw.choice(words)])
    return {"text": text, "label": "plus" if i % 2 else "minus"}


def _tagged(draw: random.Random, i: int) -> dict[str, Any]:
    words = draw.sample(offline.WORDS, 5)
    return {"tokens": words, "tags": ["B-X" if w in (*GOOD, *BAD) else "O" for w in words]}


def _asked(draw: random.Random, i: int) -> dict[str, Any]:
    words = draw.sample(offline.WORDS, 8)
    return {"question": "which word", "context": " ".join(words), "answers": words[i % 8]}


def _image(draw: random.Random, i: int, directory: Path, split: str) -> dict[str, Any]:
    import numpy as np
    from PIL import Image

    (directory / "images").mkdir(exist_ok=True)
    pixels = np.full((8, 8, 3), 40 if i % 2 else 200, dtype=np.uint8)
    pixels += np.array(draw.choices(range(40), k=192), dtype=np.uint8).reshape(8, 8, 3)
    name = f"images/{split}-{i}.png"
    Image.fromarray(pixels).save(directory / name)
    return {"image": name, "label": "dark" if i % 2 else "light"}


ROWS: Mapping[str, Callable[[random.Random, int], dict[str, Any]]] = {
    "classification": _labelled,
    "regression": lambda draw, i: {**_labelled(draw, i), "label": float(i % 2)},
    "token-classification": _tagged,
    "question-answering": _asked,
    "causal-lm": lambda draw, i: {"text": offline.sentence(i, 9)},
    "instruction": lambda draw, i: {
        "messages": [
            {"role": "user", "content": offline.sentence(i, 4)},
            {"role": "assistant", "content": offline.sentence(i + 4, 3)},
        ]
    },
    "seq2seq": lambda draw, i: {
        "source": offline.sentence(i, 4), "target": offline.sentence(i + 4, 2)
    },
}  # fmt: skip
MODELS = {
    "classification": "bert",
    "regression": "bert",
    "token-classification": "bert",
    "question-answering": "bert",
    "causal-lm": "llama",
    "instruction": "llama",
    "seq2seq": "t5",
    "image-classification": "vit",
}


def write_data(directory: Path, task: str) -> None:
    """Write train.jsonl, valid.jsonl and test.jsonl for a task."""
    draw = random.Random(0)
    for split, count in COUNTS.items():
        rows = []
        for i in range(count):
            if task == "image-classification":
                rows.append(_image(draw, i, directory, split))
            else:
                rows.append(ROWS[task](draw, i))
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (directory / f"{split}.jsonl").write_text(text, encoding="utf-8")


def write_run(
    directory: Path, task: str, method: str, model: str | None = None, **fields: Any
) -> Path:
    """Write model, data and a short run.yaml; return the latter's path."""
    import yaml

    if not (directory / "train.jsonl").exists():
        write_data(directory, task)
    path = directory / (model or MODELS[task])
    if not path.exists():
        save_model(directory, model or MODELS[task])
    data = {s: str(directory / f"{s}.jsonl") for s in COUNTS}
    adapter = {"r": 2} if method in ("lora", "dora", "loha", "lokr", "adapter") else {}
    if method in ("prefix", "prompt"):
        adapter = {"num_virtual_tokens": 3}
    if method == "partial":
        adapter = {"blocks": 1}
    content: dict[str, Any] = {
        "model": str(path),
        "task": task,
        "data": {**data, "max_length": 32},
        "method": method,
        "adapter": adapter,
        "train": {
            "max_steps": 6, "per_device_train_batch_size": 4, "learning_rate": 1e-2,
            "eval_strategy": "steps", "eval_steps": 3, "save_strategy": "steps", "save_steps": 2,
        },
        "output": str(directory / "out"),
    }  # fmt: skip
    for key, value in fields.items():
        if isinstance(value, dict) and isinstance(content.get(key), dict):
            content[key] = {**content[key], **value}
        else:
            content[key] = value
    file = directory / "run.yaml"
    file.write_text(yaml.safe_dump(content), encoding="utf-8")
    return file
