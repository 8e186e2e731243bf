"""Measured tables of regimes, kept in the user's cache: one file per card and version of triton.

`fastlora tune` writes them; `fastlora_kernels.regimes` reads the one of the card at hand when it is
first asked for a plan. FASTLORA_TUNED=0 leaves them alone.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
import warnings
from pathlib import Path
from typing import Any, NamedTuple

VERSION = 1
Row = tuple[int, str, tuple[int, ...] | None]  # up to so many tokens, kind of plan, tile


class Measured(NamedTuple):
    """What was measured on one card.

    Attributes:
        date: when, ISO 8601.
        tables: direction -> rows, ascending by tokens; above the last row: "dense".
    """

    date: str
    tables: dict[str, tuple[Row, ...]]


def path_of(device: str, arch: str, triton: str) -> Path:
    """Return the file of a card, by its name, its architecture and triton's version."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    slug = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    return Path(root) / "fastlora" / "tuned" / f"{slug}-{arch}-triton{triton}.json"


def save(path: Path, measured: Measured) -> None:
    """Write a table: to a temporary file first, which then takes the place of the old one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    try:
        with os.fdopen(handle, "w") as file:
            json.dump({"version": VERSION, **measured._asdict()}, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def load(path: Path) -> Measured | None:
    """Return what a file holds; None where there is none or it can't be used, with a warning."""
    if os.environ.get("FASTLORA_TUNED") == "0" or not path.is_file():
        return None
    try:
        return _read(json.loads(path.read_text()))
    except (OSError, ValueError, KeyError, TypeError) as error:
        warnings.warn(
            f"the measured table {path} can't be used ({error}), so the default one is; run"
            " `fastlora tune` again or delete the file",
            stacklevel=2,
        )
        return None


def _read(content: Any) -> Measured:
    if content["version"] != VERSION:
        raise ValueError(f"version {content['version']!r}, not {VERSION}")
    tables = {}
    for direction in ("forward", "backward"):
        rows = tuple(_row(*entry) for entry in content["tables"][direction])
        if [row[0] for row in rows] != sorted({row[0] for row in rows}):
            raise ValueError("its rows must ascend by tokens")
        tables[direction] = rows
    return Measured(str(content["date"]), tables)


def _row(tokens: int, kind: str, tile: list[int] | None) -> Row:
    sizes = None if tile is None else tuple(int(size) for size in tile)
    if kind not in ("gemv", "mma", "dense") or (sizes is None) != (kind == "dense"):
        raise ValueError(f"a plan of kind {kind!r} with tile {tile!r}")
    if sizes is not None and (len(sizes) != 5 or min(sizes) < 1):
        raise ValueError(f"a tile must be five positive numbers, got {tile!r}")
    return int(tokens), kind, sizes
