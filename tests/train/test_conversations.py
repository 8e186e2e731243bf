"""Rows of instruction data, in every form, as chat messages."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("peft")

from fastlora.train import conversations
from fastlora.train.data.rows import BadRow
from fastlora.train.refusal import Refusal

USER, ANSWER = {"role": "user", "content": "why"}, {"role": "assistant", "content": "so"}
SYSTEM = {"role": "system", "content": "be brief"}
NO = [{"role": "assistant", "content": "no"}]

ROWS: list[tuple[dict[str, Any], list[dict[str, str]]]] = [
    ({"prompt": "why", "completion": "so"}, [USER, ANSWER]),
    ({"prompt": "why", "completion": "so", "system": "be brief"}, [SYSTEM, USER, ANSWER]),
    ({"instruction": "why", "output": "so"}, [USER, ANSWER]),
    ({"instruction": "why", "input": "", "output": "so"}, [USER, ANSWER]),
    ({"prompt": "why", "chosen": "so", "rejected": "no"}, [USER, ANSWER]),
    # whole conversations beside their question, and without it
    ({"prompt": "why", "chosen": [USER, ANSWER], "rejected": [USER, *NO]}, [USER, ANSWER]),
    ({"prompt": [SYSTEM, USER], "chosen": [USER, ANSWER]}, [SYSTEM, USER, ANSWER]),
    ({"chosen": [USER, ANSWER], "rejected": [USER, *NO]}, [USER, ANSWER]),
    # the answer's messages alone
    ({"prompt": "why", "chosen": [ANSWER], "rejected": NO}, [USER, ANSWER]),
    ({"prompt": [USER], "chosen": [ANSWER], "rejected": NO}, [USER, ANSWER]),
    ({"prompt": [USER], "completion": "so"}, [USER, ANSWER]),
]


@pytest.mark.parametrize(("row", "messages"), ROWS, ids=[str(list(r)) for r, _ in ROWS])
def test_forms(row: dict[str, Any], messages: list[dict[str, str]]) -> None:
    _, columns = conversations.recognise(list(row), {})
    assert conversations.messages_of(row, columns) == messages
    assert conversations.asked_of(row, columns) == messages[:-1]


def test_a_whole_conversation_keeps_its_system_message() -> None:
    row = {"prompt": " why\n", "chosen": [SYSTEM, USER, ANSWER]}
    roles = {"prompt": "prompt", "completion": "chosen"}
    assert conversations.messages_of(row, roles) == [SYSTEM, USER, ANSWER]


def test_alpaca_is_asked_as_it_is_learnt() -> None:
    row = {"instruction": "add", "input": "1 and 2", "output": "3", "system": "be brief"}
    _, columns = conversations.recognise(list(row), {})
    learnt = conversations.messages_of(row, columns)
    assert learnt[:2] == [SYSTEM, {"role": "user", "content": "add\n\n1 and 2"}]
    del row["output"]
    assert conversations.asked_of(row, columns) == learnt[:-1]


def test_a_conversation_that_ends_with_the_user_can_be_answered_but_not_learnt() -> None:
    columns = {"messages": "messages"}
    assert conversations.asked_of({"messages": [USER]}, columns) == [USER]
    with pytest.raises(BadRow, match="must have an answer of the assistant"):
        conversations.messages_of({"messages": [USER]}, columns)


@pytest.mark.parametrize("value", ["text", [], None, [ANSWER]])
def test_rows_that_ask_nothing(value: Any) -> None:
    with pytest.raises(BadRow, match="must"):
        conversations.asked_of({"messages": value}, {"messages": "messages"})


def test_what_is_no_form_is_refused() -> None:
    with pytest.raises(Refusal, match="or chosen with prompt or rejected, but the columns are a"):
        conversations.recognise(["a"], {})
