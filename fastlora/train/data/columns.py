"""Which column is what: named by the user, or recognised by its usual names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from fastlora.train.config import ROLES, DataSection
from fastlora.train.refusal import Refusal, nearest

USUAL: Mapping[str, tuple[str, ...]] = {
    "text": ("text", "sentence", "sentence1", "content", "review", "document", "body", "premise"),
    "text_pair": ("text_pair", "sentence2", "hypothesis"),
    "label": ("label", "labels", "class", "category", "intent", "target", "score", "stars"),
    "tokens": ("tokens", "words"),
    "tags": ("tags", "ner_tags", "labels", "pos_tags"),
    "question": ("question", "query"),
    "context": ("context", "passage", "paragraph"),
    "answers": ("answers", "answer"),
    "source": ("source", "src", "article", "document", "input", "input_text"),
    "target": ("target", "tgt", "summary", "highlights", "output", "target_text"),
    "image": ("image", "img", "file", "path", "file_name"),
    "messages": ("messages", "conversations", "conversation"),
    "prompt": ("prompt", "instruction", "question"),
    "completion": ("completion", "response", "output", "answer", "chosen"),
}
"""Role -> the names that such a column usually has, the likeliest first."""


def find_columns(
    data: DataSection,
    columns: Sequence[str],
    required: Sequence[str],
    optional: Sequence[str] = (),
    source: str = "the data",
) -> dict[str, str]:
    """Return role -> column for a task's roles.

    Args:
        data: the columns that the user names come first.
        columns: what the data has.
        required: roles that must be found.
        optional: roles that may be.
        source: what to call the data in an error.

    Raises:
        Refusal: a named column is not there, a role that the task has not is named, or a required
            one is not found.
    """
    wanted = [*required, *optional]
    for role in ROLES:
        if getattr(data, role) is not None and role not in wanted:
            raise Refusal(
                f"data.{role} must be a column that the task reads, but it reads only"
                f" {', '.join(wanted)}; leave it out"
            )
    found: dict[str, str] = {}
    for role in wanted:
        named = getattr(data, role)
        if named is not None and named not in columns:
            raise Refusal(
                f"data.{role} must name a column of {source}, got {named!r}"
                f"{nearest(named, columns)}; its columns are {', '.join(columns)}"
            )
        free = [name for name in USUAL[role] if name in columns and name not in found.values()]
        name = named or next(iter(free), None)
        if name is not None:
            found[role] = name
        elif role in required:
            raise Refusal(
                f"{source} must have a column of kind {role!r}, but it has"
                f" {', '.join(columns)}; name it with data.{role}"
            )
    return found


def check_columns(needed: Iterable[str], columns: Sequence[str], source: str) -> None:
    """Raise unless a source has the columns that were learnt from the training rows.

    Raises:
        Refusal: one is missing.
    """
    missing = [name for name in needed if name not in columns]
    if missing:
        raise Refusal(
            f"{source} must have the columns of the training rows, but {missing[0]!r} is missing;"
            f" its columns are {', '.join(columns)}"
        )
