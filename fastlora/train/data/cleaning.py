"""What is wrong with the data, counted: duplicates, leaks, label counts."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from fastlora.train.data.rows import Row


@dataclass
class CleaningReport:
    """What was found in the data; counts are of rows.

    Attributes:
        rows: rows that are used, by split.
        bad: sentences about rows that were left out, by split.
        duplicates: rows that repeat an earlier one of the same split.
        dropped: whether those were left out.
        leaked: rows of the test or validation split whose input is in the training split.
        long: examples that are cut at max_length, by split.
        labels: how often each label occurs in training.
        columns: role -> column, as `eval` and `predict` read them.
        new_tokens: the most that the model writes; None: it writes no text.
        notes: what else a person should know.
    """

    rows: dict[str, int] = field(default_factory=dict)
    bad: dict[str, list[str]] = field(default_factory=dict)
    duplicates: dict[str, int] = field(default_factory=dict)
    dropped: bool = False
    leaked: dict[str, int] = field(default_factory=dict)
    long: dict[str, int] = field(default_factory=dict)
    labels: dict[str, int] = field(default_factory=dict)
    columns: dict[str, str] = field(default_factory=dict)
    new_tokens: int | None = None
    notes: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """Return the report as sentences."""
        found = [", ".join(f"{split}: {count:,} rows" for split, count in self.rows.items())]
        for split, bad in self.bad.items():
            if bad:
                found.append(f"{split}: {len(bad)} bad rows left out; the first: {bad[0]}")
        for split, count in self.duplicates.items():
            if count:
                done = "dropped" if self.dropped else "kept (data.duplicates: drop removes them)"
                found.append(f"{split}: {count} rows repeat an earlier one, {done}")
        for split, count in self.leaked.items():
            if count:
                found.append(f"{split}: {count} rows are in train too, so its score flatters")
        for split, count in self.long.items():
            if count:
                found.append(f"{split}: {count} examples are longer than max_length and cut")
        if self.labels:
            counts = sorted(self.labels.items(), key=lambda item: -item[1])
            shown = ", ".join(f"{label} {count}" for label, count in counts[:20])
            found.append(f"labels in train: {shown}{', ...' if len(counts) > 20 else ''}")
        return found + self.notes


def fingerprint(values: Any) -> str:
    """Return a digest of a row's values."""
    text = json.dumps(values, sort_keys=True, default=str, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def drop_duplicates(rows: Sequence[Row]) -> list[Row]:
    """Return the rows without those that repeat an earlier one."""
    seen: set[str] = set()
    kept = []
    for row in rows:
        digest = fingerprint(row.values)
        if digest not in seen:
            kept.append(row)
        seen.add(digest)
    return kept


def leaks(inputs: Sequence[Any], train_inputs: Sequence[Any]) -> int:
    """Return how many of these inputs are among the training inputs."""
    known = {fingerprint(value) for value in train_inputs}
    return sum(fingerprint(value) in known for value in inputs)


def label_counts(labels: Sequence[Any]) -> dict[str, int]:
    """Return how often each label occurs."""
    return dict(Counter(str(label) for label in labels))
