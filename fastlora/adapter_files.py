"""Read and write the files of an adapter directory: strictly, without pickle, all or nothing."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

MAX_JSON_BYTES = 2**20


def encode(tensors: dict[str, Tensor]) -> bytes:
    """Return the bytes of a safetensors file with PEFT's metadata."""
    from safetensors.torch import save

    data: bytes = save(tensors, metadata={"format": "pt"})
    return data


def write_directory(path: Path, files: Mapping[str, bytes], overwrite: bool) -> None:
    """Write files into a directory so that they appear together or not at all.

    Args:
        path: the directory; made if it does not exist, with its parents.
        files: name -> content, in the order in which an overwrite replaces them.
        overwrite: allow a directory that is not empty; its other files are left alone.

    Raises:
        FileExistsError: the directory is not empty and `overwrite` is False, or it is a file.
        OSError: something can't be written; what was there before is untouched.
    """
    if path.exists() and not path.is_dir():
        raise FileExistsError(f"{path} must be a directory, but it is a file; choose another path")
    filled = path.is_dir() and any(path.iterdir())
    if filled and not overwrite:
        raise FileExistsError(
            f"{path} must be empty or new, but it holds files; pass overwrite=True or choose"
            " another path"
        )
    target = path.absolute()
    scratch = target.parent / f".{target.name}.{secrets.token_hex(6)}.tmp"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch.mkdir()
        for name, data in files.items():
            write_file(scratch / name, data)
        sync_directory(scratch)
        if filled:
            for name in files:
                os.replace(scratch / name, target / name)
            sync_directory(target)
        else:
            os.rename(scratch, target)
        sync_directory(target.parent)
    except OSError as error:
        raise type(error)(
            f"the adapter must be writable to {path}, but the system says:"
            f" {error.strerror or error}; free space, fix the permissions or choose another path"
        ) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def write_file(path: Path, data: bytes) -> None:
    """Write a new file, forced to the disk."""
    with open(path, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_directory(directory: Path) -> None:
    """Flush the directory's entries to the disk."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_json(path: Path) -> dict[str, Any]:
    """Return the object of a JSON file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is too large, not JSON or not an object.
    """
    _check_exists(path)
    if path.stat().st_size > MAX_JSON_BYTES:
        raise ValueError(
            f"{path} must be at most 1 MiB, got {path.stat().st_size} bytes; this is no adapter"
            " config"
        )
    try:
        fields = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} must be JSON, got: {error}; fetch or save it again") from None
    if not isinstance(fields, dict):
        raise ValueError(f"{path} must hold an object, got {type(fields).__name__}; save it again")
    return fields


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file, on CPU.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: only a pickle is there, or the file is truncated or damaged.
    """
    pickled = path.with_suffix(".bin")
    if pickled.exists() and not path.exists():
        raise ValueError(
            f"an adapter must be a safetensors file, got the pickle {pickled}, which can run code"
            " when it is read; convert it with PEFT's save_pretrained"
        )
    _check_exists(path)
    from safetensors import SafetensorError
    from safetensors.torch import load

    data = path.read_bytes()
    try:
        tensors: dict[str, Tensor] = load(data)
        length = int.from_bytes(data[:8], "little")
        json.loads(data[8 : 8 + length], object_pairs_hook=_no_repeats)
    except (SafetensorError, ValueError, KeyError) as error:
        raise ValueError(
            f"{path} must be a whole safetensors file, but it is damaged: {error}; fetch or save it"
            " again"
        ) from None
    return tensors


def _no_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name appears twice")
    return found


def _check_exists(path: Path) -> None:
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} must exist, but there is no such file; pass an adapter directory"
        )
