"""Tasks, one file each; `tasks` finds them."""

from __future__ import annotations

import importlib
import pkgutil

from fastlora.train.refusal import Refusal, nearest
from fastlora.train.tasks.base import Task


def tasks() -> dict[str, type[Task]]:
    """Return every task of this folder by name."""
    found = {}
    for info in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"{__name__}.{info.name}")
        if hasattr(module, "TASK"):
            found[module.TASK.name] = module.TASK
    return dict(sorted(found.items()))


def task(name: str) -> type[Task]:
    """Return the task of this name.

    Raises:
        Refusal: there is none.
    """
    known = tasks()
    if name not in known:
        hint = nearest(name, known) or f"; known are {', '.join(known)}"
        raise Refusal(f"task must be known, got {name!r}{hint}")
    return known[name]
