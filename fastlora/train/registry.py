"""Folders whose files are found by what they define: tasks and strategies."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterable
from typing import Any


def members(package: str, paths: Iterable[str], attribute: str) -> dict[str, Any]:
    """Return what the files of a package define under this name, by its own `name`."""
    found = {}
    for info in pkgutil.iter_modules(paths):
        module = importlib.import_module(f"{package}.{info.name}")
        member = getattr(module, attribute, None)
        if member is not None:
            found[member.name] = member
    return found
