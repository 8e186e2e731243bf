"""Tasks, one file each; `tasks` finds them."""

from __future__ import annotations

from fastlora.train.refusal import check_known
from fastlora.train.registry import members
from fastlora.train.tasks.base import Task


def tasks() -> dict[str, type[Task]]:
    """Return every task of this folder by name."""
    return dict(sorted(members(__name__, __path__, "TASK").items()))


def task(name: str) -> type[Task]:
    """Return the task of this name.

    Raises:
        Refusal: there is none.
    """
    known = tasks()
    check_known("task", [name], known)
    return known[name]
