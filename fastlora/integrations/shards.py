"""Check the files of a checkpoint before any of their tensors is read: they are whole, and all."""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"


def check_files(files: Sequence[Path]) -> None:
    """Raise unless these files of one directory are safetensors, whole, and as its index says.

    Raises:
        ValueError: one is pickled or damaged, or lacks a tensor that the index names.
        FileNotFoundError: one is missing.
    """
    others = sorted(file.name for file in files if file.suffix != ".safetensors")
    if others:
        raise ValueError(
            f"a checkpoint must be stored as safetensors, but {files[0].parent} holds {others};"
            " convert it with transformers' save_pretrained"
        )
    held = {file.name: _tensors(file) for file in files}
    index = files[0].parent / INDEX
    if not index.is_file():
        return
    for tensor, shard in weight_map(index).items():
        if shard in held and tensor not in held[shard]:
            raise ValueError(
                f"a shard must hold the tensors that {INDEX} names, but {shard} of {index.parent}"
                f" lacks {tensor!r}; fetch the checkpoint again"
            )


def weight_map(index: Path) -> dict[str, str]:
    """Return tensor -> shard, as the index of a checkpoint says."""
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise ValueError(
            f"the index of a checkpoint must say which shard holds which tensor, but {index} does"
            " not; fetch the checkpoint again"
        )
    return shards


def read_json(path: Path) -> dict[str, Any]:
    """Return the object of a JSON file of a checkpoint."""
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} must be JSON, got: {error}; fetch the checkpoint again") from None
    if not isinstance(found, dict):
        raise ValueError(
            f"{path} must hold an object, got {type(found).__name__}; fetch the checkpoint again"
        )
    return found


def _tensors(shard: Path) -> set[str]:
    """Return the names of a shard's tensors; raise unless it is as long as its header says."""
    if not shard.is_file():
        raise FileNotFoundError(
            f"every shard that {INDEX} names must be there, but {shard.name} is missing from"
            f" {shard.parent}; fetch the checkpoint again"
        )
    size = shard.stat().st_size
    try:
        with shard.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length)) if length < size else {}
        header.pop("__metadata__", None)
        end = max(entry["data_offsets"][1] for entry in header.values())
    except (struct.error, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        header, length, end = {}, 0, 0
    if not header or 8 + length + end != size:
        raise ValueError(
            f"a shard must be whole, but {shard} is truncated or damaged; fetch the checkpoint"
            " again"
        )
    return set(header)
