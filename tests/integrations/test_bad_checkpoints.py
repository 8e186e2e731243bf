"""Checkpoints that are damaged, incomplete or of another kind: refused, whoever loads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
import transformers
from safetensors.torch import load_file, save_file

import fastlora
from tests import offline

BF16 = torch.bfloat16
UP = "model.layers.1.mlp.up_proj.weight"
INDEX = "model.safetensors.index.json"


def edit(path: Path, change: Any) -> None:
    """Change the tensors of the shard that holds UP."""
    shard = path / json.loads((path / INDEX).read_text())["weight_map"][UP]
    tensors = load_file(shard)
    change(tensors)
    save_file({**tensors, "left": torch.zeros(1)}, shard, metadata={"format": "pt"})


def forget(path: Path) -> None:
    """Take UP out of its shard and out of the index."""
    edit(path, lambda tensors: tensors.pop(UP))
    index = json.loads((path / INDEX).read_text())
    del index["weight_map"][UP]
    (path / INDEX).write_text(json.dumps(index))


def pickle_all(path: Path) -> None:
    for file in path.glob("*.safetensors*"):
        file.unlink()
    torch.save(offline.llama(BF16).state_dict(), path / "pytorch_model.bin")


def cut(path: Path) -> None:
    shard = sorted(path.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-100])


def packed_by(method: str) -> Any:
    def change(path: Path) -> None:
        config = json.loads((path / "config.json").read_text())
        config["quantization_config"] = {"quant_method": method}
        (path / "config.json").write_text(json.dumps(config))

    return change


EVERYWHERE: dict[str, tuple[Any, Any, str]] = {
    "truncated": (cut, ValueError, "must be whole, but .* is truncated or damaged"),
    "garbage": (
        lambda path: sorted(path.glob("*.safetensors"))[1].write_bytes(b"\xff" * 64),
        ValueError,
        "must be whole, but .* is truncated or damaged",
    ),
    "missing": (
        lambda path: sorted(path.glob("*.safetensors"))[1].unlink(),
        FileNotFoundError,
        "every shard .* is missing from",
    ),
    "pickled": (pickle_all, ValueError, "stored as safetensors, but .*pytorch_model.bin"),
    "not in its shard": (
        lambda path: edit(path, lambda tensors: tensors.pop(UP)),
        ValueError,
        f"must hold the tensors that {INDEX} names, but .* lacks '{UP}'",
    ),
    "not at all": (
        forget,
        ValueError,
        f"must hold the weights of all layers, but '{UP}' is missing; fetch",
    ),
    "shape": (
        lambda path: edit(path, lambda t: t.update({UP: torch.zeros(5, 7, dtype=BF16)})),
        ValueError,
        rf"the weight '{UP}' must have shape \(128, 64\), got \(5, 7\); the checkpoint is of",
    ),
    "transposed": (
        lambda path: edit(path, lambda t: t.update({UP: t[UP].t().contiguous()})),
        ValueError,
        r"must have shape \(128, 64\), got \(64, 128\)",
    ),
    "nan": (
        lambda path: edit(path, lambda t: t[UP].fill_(float("nan"))),
        ValueError,
        f"the weight '{UP}' must be finite, but it holds NaN or infinity; repair",
    ),
}
OURS: dict[str, tuple[Any, Any, str]] = {
    "no config": (
        lambda path: (path / "config.json").unlink(),
        FileNotFoundError,
        "must hold config.json, but",
    ),
    "config": (
        lambda path: (path / "config.json").write_text("{"),
        ValueError,
        "config.json must be JSON, got: .*; fetch the checkpoint again",
    ),
    "index": (
        lambda path: (path / INDEX).write_text("{"),
        ValueError,
        "index.json must be JSON, got: .*; fetch the checkpoint again",
    ),
    "list": (lambda path: (path / INDEX).write_text("[]"), ValueError, "must hold an object"),
    "no map": (lambda path: (path / INDEX).write_text("{}"), ValueError, "say which shard holds"),
    "gptq": (packed_by("gptq"), ValueError, "in 4 bits of bitsandbytes or fastlora, got 'gptq'"),
    "8 bits": (packed_by("bitsandbytes"), ValueError, "packed in 4 bits, got one in 8 bits"),
}


@pytest.mark.parametrize("name", [*EVERYWHERE, *OURS])
def test_bad_checkpoints(checkpoint: Path, name: str) -> None:
    damage, error, words = {**EVERYWHERE, **OURS}[name]
    damage(checkpoint)
    with pytest.raises(error, match=words):
        fastlora.from_pretrained(checkpoint)


@pytest.mark.parametrize("name", EVERYWHERE)
def test_bad_checkpoints_by_transformers_own_way(checkpoint: Path, name: str) -> None:
    damage, error, words = EVERYWHERE[name]
    damage(checkpoint)
    with pytest.raises(error, match=words):
        transformers.AutoModelForCausalLM.from_pretrained(
            checkpoint, quantization_config=fastlora.FastLoraQuantConfig()
        )


@pytest.mark.parametrize("kind", ["shape", "missing", "magnitudes"])
def test_bad_packed_checkpoints(checkpoint: Path, tmp_path: Path, kind: str) -> None:
    fastlora.save_quantized(fastlora.from_pretrained(checkpoint), tmp_path / "packed")
    file = tmp_path / "packed" / "model.safetensors"
    tensors = load_file(file)
    own = {key for key in tensors if key.startswith(UP)}
    if kind == "missing":
        tensors = {key: value for key, value in tensors.items() if key not in own}
    elif kind == "magnitudes":
        del tensors[f"{UP}.absmax"]
    else:
        down = UP.replace("up_proj", "down_proj")
        tensors |= {key: tensors[key.replace(UP, down)].clone() for key in own}
    save_file(tensors, file, metadata={"format": "pt"})
    words = {
        "shape": rf"'{UP}' must have shape \(128, 64\), got \(64, 128\)",
        "missing": f"must hold the weights of all layers, but '{UP}' is missing",
        "magnitudes": "absmax",
    }[kind]
    with pytest.raises(ValueError, match=words):
        fastlora.from_pretrained(tmp_path / "packed")


def test_a_head_may_be_new_and_so_may_a_layer_that_is_named(checkpoint: Path) -> None:
    kind = "AutoModelForSequenceClassification"
    model = fastlora.from_pretrained(checkpoint, auto_class=kind)
    assert type(model.score) is torch.nn.Linear
    forget(checkpoint)
    model = fastlora.from_pretrained(checkpoint, skip_modules=["lm_head", "layers.1.mlp.up_proj"])
    assert type(model.model.layers[1].mlp.up_proj) is torch.nn.Linear
