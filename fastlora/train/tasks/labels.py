"""Classes that are found in the training rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastlora.train.data.rows import BadRow, Row
from fastlora.train.refusal import Refusal
from fastlora.train.tasks.base import Task


class ClassLabels(Task):
    """A task whose rows have one class each, in the column of role "label"."""

    def label_of(self, row: Row) -> str | None:
        """Return a row's class as text; None: it has none."""
        return as_class(row.values.get(self.columns["label"]))

    def learn(self, rows: Sequence[Row]) -> None:
        """Take the classes of the training rows, numbers in order of size, else of the alphabet."""
        found = {label for label in map(self.label_of, rows) if label is not None}
        if len(found) < 2:
            raise Refusal(
                f"the training rows must have at least 2 classes in {self.columns['label']!r}, got"
                f" {sorted(found)}"
            )
        self.classes = sort_classes(found)

    def check(self, rows: Sequence[Row], split: str) -> None:
        """Raise unless every class of another split was seen in training."""
        assert self.classes is not None
        for row in rows:
            label = self.label_of(row)
            if label is not None and label not in self.classes:
                raise Refusal(
                    f"every class of {split} must occur in train, but {row.place} has {label!r};"
                    f" train has {', '.join(self.classes[:20])}"
                )

    def number_of(self, row: Row) -> int:
        """Return the number of a row's class.

        Raises:
            BadRow: it has none.
        """
        label = self.label_of(row)
        if label is None:
            raise BadRow(f"{self.columns['label']!r} must name a class, got nothing")
        assert self.classes is not None
        return self.classes.index(label)


def as_class(value: Any) -> str | None:
    """Return a cell as the name of a class; None when it is empty."""
    if value is None or isinstance(value, list | dict) or not str(value).strip():
        return None
    return str(value).strip()


def sort_classes(found: set[str]) -> list[str]:
    """Return classes in order: numbers by size, other names by the alphabet."""
    if all(name.removeprefix("-").isdecimal() for name in found):
        return sorted(found, key=lambda name: (int(name), name))
    return sorted(found)
