"""Rows of instruction data, whatever their form, as chat messages; and messages as tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastlora.train.data.rows import BadRow
from fastlora.train.refusal import Refusal

Message = dict[str, str]
SHAREGPT_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "system": "system",
    "user": "user",
    "assistant": "assistant",
    "model": "assistant",
    "bot": "assistant",
}
DEFAULT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '### ' + message['role'] + '\\n' + message['content'] + '\\n' }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '### assistant\\n' }}{% endif %}"
)
"""For tokenizers without a chat template: plain headings, the end-of-text token after answers."""


def recognise(columns: Sequence[str], named: Mapping[str, str]) -> tuple[str, dict[str, str]]:
    """Return the form of instruction data and role -> column.

    Args:
        columns: what the data has.
        named: roles that the user named: "messages", "prompt", "completion".

    Raises:
        Refusal: no form fits.
    """
    have = set(columns)
    for role, column in named.items():
        if column not in have:
            raise Refusal(
                f"data.{role} must name a column, got {column!r}; there are {', '.join(columns)}"
            )
    if "messages" in named:
        return "chat messages", {"messages": named["messages"]}
    if "prompt" in named or "completion" in named:
        roles = {"prompt": "prompt", "completion": "completion", **named}
        if set(roles.values()) <= have:
            return "prompt and completion", _with_system(roles, have)
    if "messages" in have:
        return "chat messages", {"messages": "messages"}
    for name in ("conversations", "conversation"):
        if name in have:
            return "ShareGPT", {"messages": name}
    if "instruction" in have and {"output", "response"} & have:
        answer = "output" if "output" in have else "response"
        roles = {"prompt": "instruction", "completion": answer}
        return "alpaca", {**roles, **{name: name for name in ("input", "system") if name in have}}
    if "chosen" in have and {"prompt", "rejected"} & have:
        roles = {"prompt": "prompt", "completion": "chosen"}
        form = "preference pairs, of which the chosen answer is learnt"
        return form, _with_system(roles, have) if "prompt" in have else {"messages": "chosen"}
    for prompt in ("prompt", "question", "input"):
        for answer in ("completion", "response", "answer", "output"):
            if {prompt, answer} <= have:
                roles = {"prompt": prompt, "completion": answer}
                return "prompt and completion", _with_system(roles, have)
    raise Refusal(
        "instruction data must have messages (chat or ShareGPT), instruction and output (alpaca),"
        " prompt and completion, or chosen with prompt or rejected, but the columns are"
        f" {', '.join(columns)}"
    )


def recognise_question(columns: Sequence[str]) -> dict[str, str]:
    """Return role -> column of conversations that are still to be answered.

    Raises:
        Refusal: there is neither a conversation nor a prompt.
    """
    have = set(columns)
    for name in ("messages", "conversations", "conversation"):
        if name in have:
            return {"messages": name}
    for name in ("prompt", "instruction", "question", "input"):
        if name in have:
            extra = {"input": "input"} if name == "instruction" and "input" in have else {}
            return _with_system({"prompt": name, **extra}, have)
    raise Refusal(
        "the rows must have messages (chat or ShareGPT), a prompt or an instruction, but the"
        f" columns are {', '.join(columns)}"
    )


def _with_system(roles: dict[str, str], have: set[str]) -> dict[str, str]:
    return {**roles, "system": "system"} if "system" in have else roles


def messages_of(values: Mapping[str, Any], columns: Mapping[str, str]) -> list[Message]:
    """Return a row as chat messages.

    Raises:
        BadRow: something is empty, or no message is the assistant's.
    """
    if "messages" in columns:
        found = _listed(values.get(columns["messages"]))
    else:
        found = _joined(_prompt(values, columns), _answer(values.get(columns["completion"])))
    if not any(message["role"] == "assistant" for message in found):
        raise BadRow("a conversation must have an answer of the assistant, got none")
    return found


def asked_of(values: Mapping[str, Any], columns: Mapping[str, str]) -> list[Message]:
    """Return a row's messages up to where the assistant has to answer.

    Raises:
        BadRow: something is empty.
    """
    if "messages" not in columns:
        return _prompt(values, columns)
    found = _listed(values.get(columns["messages"]))
    if found[-1]["role"] == "assistant":
        found = found[:-1]
    if not found:
        raise BadRow("a conversation must have a message to be answered, got none")
    return found


def _prompt(values: Mapping[str, Any], columns: Mapping[str, str]) -> list[Message]:
    """Return the messages of a prompt: those it lists, or system text and the user's turn."""
    asked = values.get(columns["prompt"])
    if isinstance(asked, list):
        return _listed(asked)
    text = _content(asked, "user")
    extra = values.get(columns.get("input", ""))
    system = values.get(columns.get("system", ""))
    first = [{"role": "system", "content": _content(system, "system")}] if system else []
    return [*first, {"role": "user", "content": f"{text}\n\n{extra}" if extra else text}]


def _answer(value: Any) -> list[Message]:
    if isinstance(value, list):
        return _listed(value)
    return [{"role": "assistant", "content": _content(value, "assistant")}]


def _joined(asked: list[Message], answer: list[Message]) -> list[Message]:
    """Return prompt and answer as one conversation; the answer may be the whole of it already."""
    system = [message for message in asked[:1] if message["role"] == "system"]
    own = [message for message in answer[:1] if message["role"] == "system"]
    turns, rest = asked[len(system) :], answer[len(own) :]
    if turns and _bare(rest[: len(turns)]) == _bare(turns):
        return [*(own or system), *rest]
    return [*asked, *answer]


def _bare(messages: Sequence[Message]) -> list[tuple[str, str]]:
    return [(message["role"], message["content"].strip()) for message in messages]


def _listed(value: Any) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise BadRow(f"messages must be a list, got {value!r:.60}")
    found = []
    for part in value:
        if not isinstance(part, dict):
            raise BadRow(f"a message must be an object, got {part!r:.60}")
        role = str(part.get("role", part.get("from", "")))
        known = SHAREGPT_ROLES.get(role)
        if known is None:
            raise BadRow(
                f"a message's role must be one of {', '.join(SHAREGPT_ROLES)}, got {role!r}"
            )
        found.append(
            {"role": known, "content": _content(part.get("content", part.get("value")), role)}
        )
    return found


def _content(value: Any, role: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise BadRow(f"the text of {role!r} must not be empty, got {value!r:.60}")
    return value


def tokenize(
    tokenizer: Any, messages: Sequence[Message], ignored: int, assistant_only: bool
) -> tuple[list[int], list[int]]:
    """Return the tokens of a conversation and its labels: the answers with their ends, or all.

    The conversation is rendered message by message, and what an answer adds to the text before it
    is what is learnt, so any template does.
    """
    ids: list[int] = []
    labels: list[int] = []
    before = ""
    for count, message in enumerate(messages, 1):
        if message["role"] == "assistant":
            opened = _render(tokenizer, messages[: count - 1], True)
            if opened.startswith(before):
                _append(tokenizer, opened[len(before) :], ids, labels, not assistant_only, ignored)
                before = opened
        text = _render(tokenizer, messages[:count], False)
        if not text.startswith(before):
            raise BadRow(
                "the chat template must only add text for each message, but it rewrites it"
            )
        learnt = message["role"] == "assistant" or not assistant_only
        _append(tokenizer, text[len(before) :], ids, labels, learnt, ignored)
        before = text
    end = tokenizer.eos_token_id
    if end is not None and messages[-1]["role"] == "assistant" and end not in ids[-3:]:
        ids.append(end)
        labels.append(end)
    return ids, labels


def _render(tokenizer: Any, messages: Sequence[Message], prompt: bool) -> str:
    if not messages:
        return ""
    template = None if tokenizer.chat_template else DEFAULT_TEMPLATE
    try:
        text: str = tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=prompt, chat_template=template
        )
    except Exception as error:  # a template may raise anything
        raise BadRow(f"the chat template can't render the messages: {error}") from None
    return text


def _append(
    tokenizer: Any, text: str, ids: list[int], labels: list[int], learnt: bool, ignored: int
) -> None:
    if text:
        new = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        ids += new
        labels += new if learnt else [ignored] * len(new)


def prompt_of(tokenizer: Any, messages: Sequence[Message]) -> list[int]:
    """Return the tokens after which the assistant's answer comes."""
    ids: list[int] = tokenizer(_render(tokenizer, messages, True), add_special_tokens=False)[
        "input_ids"
    ]
    return ids
