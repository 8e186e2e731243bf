"""Words, entities and answers as spans of tokens."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence


def first_tokens(word_ids: Sequence[int | None]) -> list[int | None]:
    """Return, per token, the word that it begins; None: it goes on with one, or is no word."""
    found: list[int | None] = []
    before = None
    for word in word_ids:
        found.append(word if word is not None and word != before else None)
        before = word
    return found


def entities(tags: Sequence[str]) -> set[tuple[str, int, int]]:
    """Return (kind, start, end) of the entities that tags B-, I- and O describe (CoNLL)."""
    found, start, kind = set(), 0, ""
    for i, tag in enumerate([*tags, "O"]):
        prefix, _, name = tag.partition("-")
        if kind and (prefix != "I" or name != kind):
            found.add((kind, start, i))
            kind = ""
        if prefix == "B" or (prefix == "I" and not kind):
            start, kind = i, name
    return found


class EntityCounts:
    """How many entities were there, found, and right."""

    def __init__(self) -> None:
        self.there = self.found = self.right = 0

    def add(self, truth: Sequence[str], given: Sequence[str]) -> None:
        """Count a row's."""
        real, mine = entities(truth), entities(given)
        self.there, self.found = self.there + len(real), self.found + len(mine)
        self.right += len(real & mine)

    def f1(self) -> float:
        """Return the harmonic mean of precision and recall; 0 where nothing is right."""
        return 2 * self.right / max(self.there + self.found, 1)


def normal(text: str) -> str:
    """Return an answer without case, punctuation and articles (SQuAD, arXiv:1606.05250)."""
    bare = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split())


def same(truth: str, given: str) -> bool:
    """Return whether two answers are alike but for case, punctuation and articles (SQuAD)."""
    return normal(truth) == normal(given)


def overlap(truth: str, given: str) -> float:
    """Return F1 of the words that two answers share (SQuAD)."""
    right, mine = normal(truth).split(), normal(given).split()
    if not right or not mine:
        return float(right == mine)
    shared = sum((Counter(right) & Counter(mine)).values())
    return 2 * shared / (len(right) + len(mine))
