"""The directory of a run: claimed by one process, finished once, resumable until then."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from fastlora.adapter_files import sync_directory
from fastlora.train.config import RunConfig, parse_yaml
from fastlora.train.refusal import Refusal

CONFIG, METRICS, LOG, REPORT = "run.yaml", "metrics.json", "log.jsonl", "report.html"
LABELS, BASE, WEIGHTS, CHECKPOINTS = "labels.json", "base.json", "model", "checkpoints"
_LOCK = ".lock"


def check_free(config: RunConfig) -> bool:
    """Return whether an unfinished run of this very config is there to be resumed.

    Raises:
        Refusal: the directory holds something else, or a finished run.
    """
    path = config.output
    if not path.exists():
        return False
    if not path.is_dir():
        raise Refusal(f"output must be a directory, but {path} is a file; choose another")
    if (path / METRICS).exists():
        raise Refusal(
            f"output must be new, but {path} holds a finished run; choose another, or remove it"
        )
    if (path / CONFIG).is_file():
        before = parse_yaml((path / CONFIG).read_text(encoding="utf-8"), str(path / CONFIG))
        now = config.as_dict()
        differ = sorted(k for k in {*before, *now} if before.get(k) != now.get(k))
        if differ:
            raise Refusal(
                f"output must be new, but {path} holds an unfinished run that differs in"
                f" {', '.join(differ)}; choose another, or go on with that run's own file"
            )
        return True
    if any(entry.name != _LOCK for entry in path.iterdir()):
        raise Refusal(f"output must be new or empty, but {path} holds other files; choose another")
    return False


@contextmanager
def claimed(config: RunConfig) -> Iterator[Path]:
    """Yield the directory, held by this process alone, with the run's config in it.

    Raises:
        Refusal: another process holds it, or it can't be written.
    """
    path = config.output
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = open(path / _LOCK, "w")  # noqa: SIM115 - closed below
    except OSError as error:
        raise Refusal(
            f"output must be writable, but {path} can't be made ({error.strerror}); choose another"
        ) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise Refusal(f"output must not be in use, but another run writes to {path}") from None
        if not (path / CONFIG).exists():
            text = yaml.safe_dump(config.as_dict(), sort_keys=False, allow_unicode=True)
            write_whole(path / CONFIG, text)
        yield path
        (path / _LOCK).unlink(missing_ok=True)


def write_whole(path: Path, text: str) -> None:
    """Write a file so that it is there in whole or not at all."""
    scratch = path.with_name(f".{path.name}.tmp")
    with open(scratch, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    scratch.replace(path)
    sync_directory(path.parent)


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file in whole; what is not finite becomes null."""
    write_whole(path, json.dumps(finite(content), indent=2, ensure_ascii=False) + "\n")


def finite(content: Any) -> Any:
    """Return JSON content with null for NaN and infinity, which JSON does not have."""
    if isinstance(content, dict):
        return {key: finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [finite(value) for value in content]
    if isinstance(content, float) and not (-1e308 < content < 1e308):
        return None
    return content


def read_log(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a log; a last line that was cut off is left out."""
    rows = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                rows.append(json.loads(line))
            except ValueError:
                break
    return rows


def cut_log(path: Path, step: int) -> None:
    """Remove what a log says of steps after this one, which are run again."""
    rows = [row for row in read_log(path) if row["step"] <= step]
    write_whole(path, "".join(json.dumps(row) + "\n" for row in rows))
