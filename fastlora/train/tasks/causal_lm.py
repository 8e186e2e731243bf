"""Causal language modelling: the next token of plain text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fastlora.train.data.rows import Row
from fastlora.train.tasks.base import Example
from fastlora.train.tasks.language import LanguageTask


class CausalLM(LanguageTask):
    """Go on learning to write; a long text is read in windows of max_length tokens."""

    name = "causal-lm"
    required = ("text",)

    def examples(self, row: Row, train: bool) -> list[Example]:
        """Return the windows of a text; every token is learnt, its end included."""
        ids = self.tokenizer(self.text(row, "text"), verbose=False)["input_ids"]
        end = self.tokenizer.eos_token_id
        if end is not None and (not ids or ids[-1] != end):
            ids = [*ids, end]
        size = self.max_length
        windows = [ids[i : i + size] for i in range(0, len(ids), size)]
        kept = [window for window in windows if len(window) > 1]
        return [{"input_ids": window, "labels": list(window)} for window in kept]

    def halves(self, row: Row, fraction: float) -> tuple[Row, Row] | None:
        """Return the first part of a text and its end, cut between lines or else words."""
        text = self.text(row, "text")
        near = round(len(text) * (1 - fraction))
        end = max(text.rfind("\n", near // 2, near), 0) or text.rfind(" ", 0, near)
        parts = (text[:end], text[end:])
        if end < 0 or not all(part.strip() for part in parts):
            return None
        first, second = (
            Row({**row.values, self.columns["text"]: part}, row.place) for part in parts
        )
        return first, second

    def measure(self, examples: Mapping[str, Sequence[Example]]) -> list[str]:
        """Let the model write as much as it reads; return that in words."""
        return self.limit_output(self.max_length)

    def ask(self, row: Row) -> list[int]:
        """Return the text's tokens."""
        return self.begin(self.text(row, "text"))

    def begin(self, text: str) -> list[int]:
        """Return the tokens of a text that goes on.

        Raises:
            BadRow: there is no place for more.
        """
        ids: list[int] = self.tokenizer(text, verbose=False)["input_ids"]
        if len(ids) > 1 and ids[-1] == self.tokenizer.eos_token_id:
            ids = ids[:-1]
        return self.with_room(ids)


TASK = CausalLM
