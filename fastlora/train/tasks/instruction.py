"""Instruction tuning: conversations, of which the answers are learnt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from fastlora.train import conversations
from fastlora.train.config import ROLES
from fastlora.train.data.rows import BadRow, Row
from fastlora.train.refusal import Refusal
from fastlora.train.tasks.base import Example
from fastlora.train.tasks.language import SAMPLE_TOKENS, LanguageTask
from fastlora.train.tasks.text import IGNORED


class Instruction(LanguageTask):
    """Learn to answer; chat messages, ShareGPT, alpaca, and prompt with completion are known."""

    name = "instruction"
    required = ()
    optional = ("messages", "prompt", "completion")

    def find_columns(self, columns: Sequence[str], predict: bool = False) -> dict[str, str]:
        """Return the columns of the form that the data has."""
        data = self.config.data
        for role in ROLES:
            if getattr(data, role) is not None and role not in self.optional:
                raise Refusal(
                    f"data.{role} must be a column that the task reads, but it reads only"
                    f" {', '.join(self.optional)}; leave it out"
                )
        named = {role: getattr(data, role) for role in self.optional if getattr(data, role)}
        if predict and not {"messages", "conversations"} & set(columns):
            named.pop("completion", None)
            names = [named.get("prompt"), "prompt", "instruction", "question", "input"]
            found = next((name for name in names if name in columns), None)
            if found is None:
                raise Refusal(f"the rows must have a prompt, but have {', '.join(columns)}")
            return {"prompt": found}
        self.form, roles = conversations.recognise(columns, named)
        return roles

    def notes(self) -> list[str]:
        """Return what was recognised."""
        used = ", ".join(self.columns.values())
        template = "the model's" if self.tokenizer.chat_template else "plain headings"
        learnt = "answers only" if self.config.data.assistant_only else "every token"
        said = f"the data is {self.form} ({used}); chat template: {template}; learnt: {learnt}"
        return [said, *super().notes()[1:]]

    def inputs_of(self, row: Row) -> Any:
        """Return the conversation up to its last answer."""
        try:
            return conversations.asked_of(row.values, self.columns)
        except BadRow:
            return row.place

    def examples(self, row: Row, train: bool) -> list[Example]:
        """Return a conversation's tokens; at least one that is learnt must be left of it."""
        messages = conversations.messages_of(row.values, self.columns)
        only = self.config.data.assistant_only
        ids, labels = conversations.tokenize(self.tokenizer, messages, IGNORED, only)
        if len(ids) > self.max_length:
            self.long += 1
            ids, labels = ids[: self.max_length], labels[: self.max_length]
        if all(label == IGNORED for label in labels[1:]):
            raise BadRow(
                f"nothing of the answer is left in {self.max_length} tokens; raise data.max_length"
            )
        return [{"input_ids": ids, "labels": labels}]

    def predict(self, model: nn.Module, rows: Sequence[Row], batch_size: int) -> list[Any]:
        """Return the answer to each row's question, or to its last message."""
        return [{"answer": self.answer(model, self._asked(row))} for row in rows]

    def _asked(self, row: Row) -> list[conversations.Message]:
        if "messages" in self.columns:
            found = conversations.messages_of(row.values, self.columns)
            return found[:-1] if found[-1]["role"] == "assistant" else found
        return [{"role": "user", "content": self.text(row, "prompt")}]

    def answer(
        self, model: Any, messages: Sequence[conversations.Message], tokens: int = SAMPLE_TOKENS
    ) -> str:
        """Return what the assistant says next."""
        ids = conversations.prompt_of(self.tokenizer, messages)
        text: str = self.tokenizer.decode(
            self.generate(model, ids, tokens), skip_special_tokens=True
        )
        return text


TASK = Instruction
