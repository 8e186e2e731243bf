"""Instruction tuning: conversations, of which the answers are learnt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from fastlora.train import conversations
from fastlora.train.config import ROLES
from fastlora.train.data.rows import BadRow, Row
from fastlora.train.refusal import Refusal
from fastlora.train.tasks.base import Example
from fastlora.train.tasks.language import LanguageTask
from fastlora.train.tasks.text import IGNORED


class Instruction(LanguageTask):
    """Learn to answer; chat messages, ShareGPT, alpaca, and prompt with completion are known."""

    name = "instruction"
    required = ()
    optional = ("messages", "prompt", "completion")
    targets = ("completion",)
    sparse = ("input", "system")
    output = "answer"

    def find_columns(self, columns: Sequence[str]) -> dict[str, str]:
        """Return the columns of the form that the data has."""
        data = self.config.data
        for role in ROLES:
            if getattr(data, role) is not None and role not in self.optional:
                raise Refusal(
                    f"data.{role} must be a column that the task reads, but it reads only"
                    f" {', '.join(self.optional)}; leave it out"
                )
        named = {role: getattr(data, role) for role in self.optional if getattr(data, role)}
        self.form, roles = conversations.recognise(columns, named)
        return roles

    def columns_in(self, columns: Sequence[str], source: str, predict: bool) -> dict[str, str]:
        """Return the columns that were learnt, or else those of another form of conversations."""
        data = self.config.data
        named = [getattr(data, role) for role in self.optional if getattr(data, role)]
        learnt = set(self.needed_columns(predict)) <= set(columns)
        if named or learnt:
            return super().columns_in(columns, source, predict)
        if predict:
            return conversations.recognise_question(columns)
        return conversations.recognise(columns, {})[1]

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

    def measure(self, examples: Mapping[str, Sequence[Example]]) -> list[str]:
        """Let the model write as much as the longest answer has; return that in words."""
        known = [*examples["train"], *examples["valid"]]
        return self.limit_output(max(_longest_learnt(example["labels"]) for example in known))

    def ask(self, row: Row) -> list[int]:
        """Return the tokens of a conversation up to where the assistant has to answer."""
        return self.begin(conversations.asked_of(row.values, self.columns))

    def begin(self, messages: Sequence[conversations.Message]) -> list[int]:
        """Return the tokens after which the assistant's answer comes.

        Raises:
            BadRow: there is no place for one.
        """
        return self.with_room(conversations.prompt_of(self.tokenizer, messages))


def _longest_learnt(labels: Sequence[int]) -> int:
    runs = groupby(labels, lambda label: label != IGNORED)
    return max((len(list(run)) for learnt, run in runs if learnt), default=0)


TASK = Instruction
