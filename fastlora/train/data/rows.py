"""Read a data file into rows, each of which knows where it came from."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from fastlora.train.refusal import Refusal

IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".ppm")
_LONGEST_CELL = 2**31 - 1  # characters; csv itself stops at 2**17
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?\Z")


class Row(NamedTuple):
    """One example as it was read.

    Attributes:
        values: column -> value.
        place: where it stands, "train.jsonl:12".
    """

    values: dict[str, Any]
    place: str


@dataclass
class Rows:
    """The rows of one source, and what was wrong with others.

    Attributes:
        rows: those that could be read.
        bad: a sentence for each that could not.
    """

    rows: list[Row] = field(default_factory=list)
    bad: list[str] = field(default_factory=list)

    @property
    def columns(self) -> list[str]:
        """The names of all columns, in order of first appearance."""
        return list(dict.fromkeys(key for row in self.rows for key in row.values))


class BadRow(ValueError):
    """A row that can't be used; the message says why."""


def read_rows(source: str, split: str, skip_bad: bool) -> Rows:
    """Return the rows of a file, a folder or a hub data set.

    Args:
        source: see `fastlora.train.config.DataSection`.
        split: "train", "valid" or "test": what is read of a hub data set.
        skip_bad: leave bad rows out, and list them; otherwise the first one raises.

    Raises:
        Refusal: there is no such source, its kind is not known, it is empty, or a row is bad.
    """
    path = Path(source)
    if path.is_dir():
        found = list(_folder(path))
    elif path.is_file():
        found = _file(path)
    elif path.suffix or not _HUB_ID.match(source):
        raise Refusal(f"data.{split} must exist, but there is no file or folder {source}")
    else:
        found = list(_hub(source, split))
    rows = Rows()
    for row in found:
        if isinstance(row, str):
            if not skip_bad:
                raise Refusal(f"{row}; mend it, or set data.bad_rows: skip")
            rows.bad.append(row)
        else:
            rows.rows.append(row)
    if not rows.rows:
        raise Refusal(f"data.{split} must hold at least one row, but {source} has none")
    return rows


def _file(path: Path) -> list[Row | str]:
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise Refusal(f"a data file must be one of {', '.join(READERS)}, got {path}; convert it")
    try:
        return list(reader(path))
    except UnicodeDecodeError as error:
        raise Refusal(f"{path} must be UTF-8, but byte {error.start} is not; convert it") from None


def _json_lines(path: Path) -> Iterator[Row | str]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            place = f"{path}:{number}"
            if not line.strip():
                continue
            try:
                values = json.loads(line)
            except (ValueError, RecursionError) as error:
                yield f"{place} must be a JSON object, got: {error}"
                continue
            yield _object(values, place)


def _json(path: Path) -> Iterator[Row | str]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError:
        raise
    except (ValueError, RecursionError) as error:
        raise Refusal(f"{path} must be JSON, got: {error}") from None
    if isinstance(content, dict):
        lists = [value for value in content.values() if isinstance(value, list)]
        content = lists[0] if len(lists) == 1 else content
    if not isinstance(content, list):
        raise Refusal(f"{path} must hold a list of objects, got {type(content).__name__}")
    for number, values in enumerate(content, 1):
        yield _object(values, f"{path}, item {number}")


def _object(values: object, place: str) -> Row | str:
    if not isinstance(values, dict):
        return f"{place} must be a JSON object, got {type(values).__name__}"
    return Row(values, place)


def _table(delimiter: str) -> Callable[[Path], Iterator[Row | str]]:
    def read(path: Path) -> Iterator[Row | str]:
        with path.open(encoding="utf-8-sig", newline="") as file:
            csv.field_size_limit(_LONGEST_CELL)
            reader = csv.reader(file, delimiter=delimiter)
            header: list[str] | None = None
            while True:
                try:
                    cells = next(reader)
                except StopIteration:
                    return
                except csv.Error as error:
                    yield f"{path}:{reader.line_num} must be a row of a table, got: {error}"
                    continue
                if header is None:
                    header = cells
                elif cells:
                    yield _cells(header, cells, f"{path}:{reader.line_num}")

    return read


def _cells(header: list[str], cells: list[str], place: str) -> Row | str:
    if len(cells) != len(header):
        return f"{place} must have {len(header)} cells, got {len(cells)}"
    return Row(dict(zip(header, cells, strict=True)), place)


def _parquet(path: Path) -> Iterator[Row | str]:
    try:
        import pyarrow.parquet
    except ImportError:
        raise Refusal(f'reading {path} needs pyarrow; run: pip install "fastlora[data]"') from None
    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise Refusal(f"{path} must be a whole Parquet file, got: {error}") from None
    for number, values in enumerate(rows, 1):
        yield Row(values, f"{path}, row {number}")


def _text(path: Path) -> Iterator[Row | str]:
    yield Row({"text": path.read_text(encoding="utf-8")}, str(path))


READERS: dict[str, Callable[[Path], Iterator[Row | str]]] = {
    ".jsonl": _json_lines,
    ".json": _json,
    ".csv": _table(","),
    ".tsv": _table("\t"),
    ".parquet": _parquet,
    ".txt": _text,
    ".md": _text,
}


def _folder(path: Path) -> Iterator[Row | str]:
    """Yield the images of a folder's sub-folders, or its text files."""
    texts = sorted(path.glob("*.txt"))
    for text in texts:
        yield from _text(text)
    for folder in sorted(part for part in path.iterdir() if part.is_dir()):
        for image in sorted(folder.iterdir()):
            if image.suffix.lower() in IMAGES:
                yield Row({"image": str(image), "label": folder.name}, str(image))


def _hub(source: str, split: str) -> Iterator[Row | str]:
    try:
        import datasets
    except ImportError:
        raise Refusal(
            f"data.{split} must exist, but there is no file {source}; for the hub's data set of"
            ' that name run: pip install "fastlora[data]"'
        ) from None
    names = {"valid": "validation"}
    try:
        found = datasets.load_dataset(source, split=names.get(split, split))
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        first = str(error).splitlines()[0]
        raise Refusal(
            f"data.{split} must exist, but there is no file or folder {source}, and the hub's data"
            f" set of that name can't be had: {first}"
        ) from None
    for number, values in enumerate(found, 1):
        yield Row(dict(values), f"{source}[{split}], row {number}")
