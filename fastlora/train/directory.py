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
STATE = "state.json"
ERROR_LOG = "fastlora-error.log"
_LOCK = ".lock"
_NO_RUN = (_LOCK, ERROR_LOG)  # what an attempt that did not start may leave


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
        differ = differences(path / CONFIG, config)
        if differ:
            raise Refusal(
                f"output must be new, but {path} holds an unfinished run that differs in"
                f" {', '.join(differ)}; choose another, or go on with that run's own file"
            )
        return True
    if any(entry.name not in _NO_RUN for entry in path.iterdir()):
        raise Refusal(f"output must be new or empty, but {path} holds other files; choose another")
    return False


def differences(file: Path, config: RunConfig) -> list[str]:
    """Return the keys, with dots, whose values in a run's file are not those of a config."""
    before = parse_yaml(file.read_text(encoding="utf-8"), str(file))
    if not isinstance(before, dict):
        raise Refusal(f"{file} must hold keys and values, got {type(before).__name__}")
    return _differ(before, config.as_dict())


def _differ(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    found = []
    for key in sorted({*before, *now}):
        first, second = before.get(key), now.get(key)
        if isinstance(first, dict) and isinstance(second, dict):
            found += [f"{key}.{below}" for below in _differ(first, second)]
        elif first != second:
            found.append(key)
    return found


@contextmanager
def claimed(config: RunConfig) -> Iterator[Path]:
    """Yield the directory, held by this process alone, with the run's config in it.

    Raises:
        Refusal: another process holds it or has just used it, or it can't be written.
    """
    path = config.output
    with locked(path):
        check_free(config)
        if not (path / CONFIG).exists():
            text = yaml.safe_dump(config.as_dict(), sort_keys=False, allow_unicode=True)
            write_whole(path / CONFIG, text)
        yield path


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Make a directory and hold it for this process alone.

    Raises:
        Refusal: another process holds it, or it can't be written.
    """
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
        yield
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


def read_json(path: Path) -> dict[str, Any]:
    """Return the content of a JSON file of `write_json`; nothing where there is none."""
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return found


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
