"""Causal language modelling: the next token of plain text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from fastlora.train.data.rows import Row
from fastlora.train.tasks.base import Example
from fastlora.train.tasks.language import SAMPLE_TOKENS, LanguageTask


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

    def predict(self, model: nn.Module, rows: Sequence[Row], batch_size: int) -> list[Any]:
        """Return a continuation of each text."""
        texts = [self.text(row, "text") for row in rows]
        return [{"text": self.continue_text(model, text, SAMPLE_TOKENS)} for text in texts]


TASK = CausalLM
