"""Checkpoints that are whole or absent: fsync, a manifest with hashes, rename; no pickle."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load, save
from torch import Tensor

from fastlora.adapter_files import sync_directory, write_file

MANIFEST = "manifest.json"
PREFIX = "checkpoint-"
OPTIMIZER = ("optimizer.safetensors", "optimizer.json")
RANDOM = ("random.safetensors", "random.json")
_NAME = re.compile(rf"{PREFIX}(\d+)\Z")
_HIDDEN = ".checkpoint-"
_REPLACED = re.compile(rf"\{_HIDDEN}old-(\d+)-")


class DamagedCheckpoint(ValueError):
    """A checkpoint that is not what was written; the message says which file, and how."""


def write(root: Path, step: int, files: Mapping[str, bytes]) -> Path:
    """Write the checkpoint of a step, so that it is there in whole or not at all.

    Each file is forced to the disk; a manifest with their sizes and SHA-256 comes last; then the
    directory gets its name. A checkpoint of the same step is replaced.

    Raises:
        OSError: something can't be written; what was there before is untouched.
    """
    root.mkdir(parents=True, exist_ok=True)
    clean(root)
    scratch, final = root / f"{_HIDDEN}{step}-{os.getpid()}", root / f"{PREFIX}{step}"
    entries = {
        name: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        for name, data in files.items()
    }
    body = json.dumps({"format": 1, "step": step, "files": entries}, sort_keys=True).encode()
    digest = hashlib.sha256(body).hexdigest().encode()
    try:
        scratch.mkdir()
        for name, data in files.items():
            write_file(scratch / name, data)
        write_file(scratch / MANIFEST, digest + b"\n" + body)
        sync_directory(scratch)
        if final.exists():
            final.rename(root / f"{_HIDDEN}old-{step}-{os.getpid()}")
        scratch.rename(final)
        sync_directory(root)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    clean(root)
    return final


def clean(root: Path) -> None:
    """Remove what an interrupted write left; a replaced checkpoint without a new one stays."""
    for stale in root.glob(f"{_HIDDEN}*"):
        replaced = _REPLACED.match(stale.name)
        final = root / f"{PREFIX}{replaced.group(1)}" if replaced else stale
        if final.exists():
            shutil.rmtree(stale, ignore_errors=True)
        else:
            stale.rename(final)


def read(path: Path, *names: str) -> dict[str, bytes]:
    """Return files of a checkpoint, verified: those of these names, or all.

    Raises:
        DamagedCheckpoint: a file is missing or is not what was written.
    """
    try:
        digest, _, body = (path / MANIFEST).read_bytes().partition(b"\n")
        if hashlib.sha256(body).hexdigest().encode() != digest:
            raise DamagedCheckpoint(f"{path / MANIFEST} does not match its SHA-256")
        found = {}
        entries = json.loads(body)["files"]
        for name in names or entries:
            entry = entries[name]
            data = (path / Path(name).name).read_bytes()
            if hashlib.sha256(data).hexdigest() != entry["sha256"]:
                raise DamagedCheckpoint(f"{path / name} does not match its SHA-256")
            found[name] = data
    except OSError as error:
        raise DamagedCheckpoint(f"{error.filename or path}: {error.strerror}") from None
    return found


def steps(root: Path) -> list[int]:
    """Return the steps that have a checkpoint, the newest first."""
    names = [_NAME.match(path.name) for path in root.glob(f"{PREFIX}*")]
    return sorted((int(match.group(1)) for match in names if match), reverse=True)


def newest(root: Path, tell: Callable[[str], None]) -> Path | None:
    """Return the newest checkpoint that is whole; `tell` hears of each that is not."""
    for step in steps(root):
        path = root / f"{PREFIX}{step}"
        try:
            read(path)
        except DamagedCheckpoint as error:
            tell(f"the checkpoint of step {step} is damaged ({error}); taking the one before it")
        else:
            return path
    return None


def rotate(root: Path, keep: int | None, best: Path | None) -> None:
    """Remove the oldest checkpoints but `keep`; never the best one."""
    if not keep:
        return
    for step in steps(root)[keep:]:
        path = root / f"{PREFIX}{step}"
        if best is None or path.name != best.name:
            shutil.rmtree(path, ignore_errors=True)


def pack_optimizer(optimizer: torch.optim.Optimizer) -> dict[str, bytes]:
    """Return an optimizer's state as files."""
    state = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, Any] = {}
    for name, value in _flat(state["state"]):
        if isinstance(value, Tensor):
            tensors[name] = value.detach().to("cpu", copy=True).contiguous()
        else:
            scalars[name] = value
    described = {"scalars": scalars, "groups": state["param_groups"]}
    return {
        "optimizer.safetensors": save(tensors),
        "optimizer.json": json.dumps(described, default=_plain).encode(),
    }


def _flat(tree: Mapping[Any, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """Yield ("index.key", value), and ("index.key.key", value) where a state is nested."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value


def unpack_optimizer(optimizer: torch.optim.Optimizer, files: Mapping[str, bytes]) -> None:
    """Give an optimizer the state of `pack_optimizer`."""
    described = json.loads(files["optimizer.json"])
    live = optimizer.state_dict()["param_groups"]
    if [g["params"] for g in live] != [g["params"] for g in described["groups"]]:
        raise DamagedCheckpoint("the optimizer's groups are not those of this run")
    state: dict[int, dict[str, Any]] = {}
    everything = {**load(files["optimizer.safetensors"]), **described["scalars"]}
    for key, value in everything.items():
        index, *above, name = key.split(".")
        place = state.setdefault(int(index), {})
        for part in above:
            place = place.setdefault(part, {})
        place[name] = value
    groups = [
        {key: tuple(value) if key == "betas" else value for key, value in group.items()}
        for group in described["groups"]
    ]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.item()
    raise TypeError(f"an optimizer's option must be a number or text, got {value!r}")


def digest(examples: Iterable[Mapping[str, Any]]) -> str:
    """Return a hash of examples as a model gets them, wherever they were read from."""
    found = hashlib.sha256()
    for example in examples:
        for key in sorted(example.keys() - {"place"}):
            value = example[key]
            found.update(f"{key}={getattr(value, 'shape', '')}".encode())
            if isinstance(value, Tensor):
                flat = value.detach().cpu().contiguous().view(-1).view(torch.uint8)
                found.update(flat.numpy().data)
            else:
                found.update(json.dumps(value, default=str).encode())
    return found.hexdigest()


def pack_random() -> dict[str, bytes]:
    """Return the states of every random generator as files."""
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    tensors = {
        "torch": torch.get_rng_state(),
        "numpy": torch.from_numpy(np.asarray(keys, dtype=np.int64)),
    }
    if torch.cuda.is_available():
        for index, state in enumerate(torch.cuda.get_rng_state_all()):
            tensors[f"cuda.{index}"] = state
    version, internal, gauss = random.getstate()
    described = {
        "numpy": [str(kind), int(position), int(has_gauss), float(cached)],
        "python": [version, list(internal), gauss],
    }
    return {"random.safetensors": save(tensors), "random.json": json.dumps(described).encode()}


def unpack_random(files: Mapping[str, bytes]) -> None:
    """Set every random generator to the states of `pack_random`."""
    tensors, described = load(files["random.safetensors"]), json.loads(files["random.json"])
    torch.set_rng_state(tensors["torch"])
    kind, position, has_gauss, cached = described["numpy"]
    np.random.set_state(
        (kind, tensors["numpy"].numpy().astype(np.uint32), position, has_gauss, cached)
    )
    version, internal, gauss = described["python"]
    random.setstate((version, tuple(internal), gauss))
    states = [tensors[key] for key in sorted(key for key in tensors if key.startswith("cuda."))]
    if states and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(states)
