"""From data files to examples: columns, splits, cleaning."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fastlora.train.config import DataSection
from fastlora.train.data.cleaning import CleaningReport, drop_duplicates, label_counts, leaks
from fastlora.train.data.columns import check_columns
from fastlora.train.data.rows import BadRow, Row, read_rows
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
            check_columns(task.needed_columns(), read.columns, sources[name])
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
        splits["train"], splits["valid"], note = split(
            task, splits["train"], data.valid_fraction, seed
        )
        report.notes.append(note)
    for name in ("valid", "test"):
        if name in splits:
            task.check(splits[name], name)
    inputs = [task.inputs_of(row) for row in splits["train"]]
    for name in splits:
        if name != "train":
            report.leaked[name] = leaks([task.inputs_of(row) for row in splits[name]], inputs)
    labels = [label for row in splits["train"] if (label := task.label_of(row)) is not None]
    report.labels = label_counts(labels)
    examples = {name: examples_of(task, rows, name, report) for name, rows in splits.items()}
    report.notes += task.measure(examples)
    report.columns, report.new_tokens = task.columns, task.new_tokens
    if "test" not in examples:
        report.notes.append("there is no data.test, so the final scores are of the validation rows")
    return Prepared(
        task.group(examples["train"]),
        examples["valid"],
        examples.get("test", examples["valid"]),
        report,
    )


def split(
    task: Task, rows: Sequence[Row], fraction: float, seed: int
) -> tuple[list[Row], list[Row], str]:
    """Return training and validation rows, and what was done in words.

    Each class keeps its share where it has enough rows.

    Raises:
        Refusal: there are too few rows to split.
    """
    from sklearn.model_selection import train_test_split

    if len(rows) < 2:
        return _halves(task, rows[0], fraction)
    labels = [task.label_of(row) for row in rows]
    counts = label_counts(labels)
    held_out = max(1, round(len(rows) * fraction))
    stratify = None
    if None not in labels and min(counts.values()) > 1 and held_out >= len(counts):
        stratify = labels
    first, second = train_test_split(
        list(rows), test_size=held_out, random_state=seed, stratify=stratify
    )
    said = (
        f"{len(second)} of the training rows are held out for validation"
        f" (data.valid_fraction, seed {seed})"
    )
    return first, second, said


def _halves(task: Task, row: Row, fraction: float) -> tuple[list[Row], list[Row], str]:
    found = task.halves(row, fraction)
    if found is None:
        raise Refusal(
            "the training rows must be at least 2, so that one can be held out for validation, but"
            f" {row.place} is the only one; add rows, or name others with data.valid"
        )
    said = (
        f"the last {fraction:.0%} of the only training row, {row.place}, are held out for"
        " validation (data.valid_fraction)"
    )
    return [found[0]], [found[1]], said


def examples_of(
    task: Task, rows: Sequence[Row], name: str, report: CleaningReport
) -> list[Example]:
    """Return a split's examples; bad rows are left out where data.bad_rows says so.

    Args:
        task: makes them.
        rows: of the split.
        name: of the split; "train": the rows are learnt from.
        report: what is found is added to it.

    Raises:
        Refusal: a row is bad, or none is left.
    """
    found: list[Example] = []
    task.long = 0
    made = usable(rows, lambda row: task.examples(row, name == "train"), name, task, report)
    for row, examples in made:
        found += [{**example, "place": row.place} for example in examples]
    report.long[name] = task.long
    if not found:
        raise Refusal(f"data.{name} must hold at least one usable row, but none is left")
    return found


def usable(
    rows: Sequence[Row], make: Callable[[Row], Any], name: str, task: Task, report: CleaningReport
) -> list[tuple[Row, Any]]:
    """Return each row with what is made of it, without the bad rows.

    Raises:
        Refusal: a row is bad, and data.bad_rows is "stop".
    """
    found = []
    bad = report.bad.setdefault(name, [])
    for row in rows:
        try:
            found.append((row, make(row)))
        except BadRow as error:
            if task.config.data.bad_rows == "stop":
                raise Refusal(
                    f"{row.place}: {error}; mend it, or set data.bad_rows: skip"
                ) from None
            bad.append(f"{row.place}: {error}")
    report.rows[name] = len(found)
    return found
