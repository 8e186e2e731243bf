"""From data files to examples: columns, splits, cleaning."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fastlora.train.config import DataSection
from fastlora.train.data.cleaning import CleaningReport, drop_duplicates, label_counts, leaks
from fastlora.train.data.rows import BadRow, Row, Rows, read_rows
from fastlora.train.refusal import Refusal
from fastlora.train.tasks.base import Example, Task

SPLITS = ("train", "valid", "test")


@dataclass
class Prepared:
    """What a run learns from and is measured on.

    Attributes:
        train: examples.
        valid: examples that decide which weights are the best.
        test: examples of the final scores.
        report: what was found in the data.
    """

    train: list[Example]
    valid: list[Example]
    test: list[Example]
    report: CleaningReport


def prepare(task: Task, data: DataSection, seed: int) -> Prepared:
    """Return the examples of every split; `task` learns its columns and classes.

    Raises:
        Refusal: the data can't be used; the message names file and line.
    """
    sources = {name: getattr(data, name) for name in SPLITS if getattr(data, name)}
    found = {name: read_rows(src, name, data.bad_rows == "skip") for name, src in sources.items()}
    report = CleaningReport(bad={name: rows.bad for name, rows in found.items()})
    task.columns = task.find_columns(found["train"].columns)
    for name, read in found.items():
        if name != "train":
            _check_columns(task, read, sources[name])
    splits = {name: read.rows for name, read in found.items()}
    for name, rows in splits.items():
        kept = drop_duplicates(rows)
        report.duplicates[name] = len(rows) - len(kept)
        if data.duplicates == "drop":
            report.dropped, splits[name] = True, kept
    task.prepare()
    report.notes += task.notes()
    task.learn(splits["train"])
    if "valid" not in splits:
        splits["train"], splits["valid"] = split(task, splits["train"], data.valid_fraction, seed)
        report.notes.append(
            f"{len(splits['valid'])} of the training rows are held out for validation"
            f" (data.valid_fraction, seed {seed})"
        )
    for name in ("valid", "test"):
        if name in splits:
            task.check(splits[name], name)
    inputs = [task.inputs_of(row) for row in splits["train"]]
    for name in splits:
        if name != "train":
            report.leaked[name] = leaks([task.inputs_of(row) for row in splits[name]], inputs)
    labels = [label for row in splits["train"] if (label := task.label_of(row)) is not None]
    report.labels = label_counts(labels)
    examples = {name: _examples(task, rows, name, data, report) for name, rows in splits.items()}
    if "test" not in examples:
        report.notes.append("there is no data.test, so the final scores are of the validation rows")
    return Prepared(
        task.group(examples["train"]),
        examples["valid"],
        examples.get("test", examples["valid"]),
        report,
    )


def _check_columns(task: Task, rows: Rows, source: str) -> None:
    missing = [name for name in task.columns.values() if name not in rows.columns]
    if missing:
        raise Refusal(
            f"{source} must have the columns of the training rows, but {missing[0]!r} is missing;"
            f" its columns are {', '.join(rows.columns)}"
        )


def split(
    task: Task, rows: Sequence[Row], fraction: float, seed: int
) -> tuple[list[Row], list[Row]]:
    """Return training and validation rows; each class keeps its share where it has enough rows.

    Raises:
        Refusal: there are too few rows to split.
    """
    from sklearn.model_selection import train_test_split

    if len(rows) < 2:
        return _same(rows)
    labels = [task.label_of(row) for row in rows]
    counts = label_counts(labels)
    held_out = max(1, round(len(rows) * fraction))
    stratify = None
    if None not in labels and min(counts.values()) > 1 and held_out >= len(counts):
        stratify = labels
    first, second = train_test_split(
        list(rows), test_size=held_out, random_state=seed, stratify=stratify
    )
    return first, second


def _same(rows: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    return list(rows), list(rows)


def _examples(
    task: Task, rows: Sequence[Row], name: str, data: DataSection, report: CleaningReport
) -> list[Example]:
    """Return a split's examples; bad rows stop the run or are left out."""
    found: list[Example] = []
    task.long = 0
    used = 0
    bad = report.bad.setdefault(name, [])
    for row in rows:
        try:
            made = task.examples(row, name == "train")
        except BadRow as error:
            if data.bad_rows == "stop":
                raise Refusal(
                    f"{row.place}: {error}; mend it, or set data.bad_rows: skip"
                ) from None
            bad.append(f"{row.place}: {error}")
            continue
        used += 1
        found += [{**example, "place": row.place} for example in made]
    report.rows[name], report.long[name] = used, task.long
    if not found:
        raise Refusal(f"data.{name} must hold at least one usable row, but none is left")
    return found
