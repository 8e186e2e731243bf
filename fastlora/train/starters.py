"""Starter files: the YAML of a task's page in `fastlora/docs/tasks`."""

from __future__ import annotations

import re
from importlib.resources import files
from pathlib import Path

from rich.console import Console

from fastlora.train.directory import write_whole
from fastlora.train.refusal import Refusal, check_known

_BLOCK = re.compile(r"```yaml\n(.*?)```", re.DOTALL)


def pages(kind: str) -> dict[str, str]:
    """Return name -> text of the pages on "tasks" or "methods"."""
    folder = files("fastlora") / "docs" / kind
    found = [page for page in folder.iterdir() if page.name.endswith(".md")]
    return {
        page.name.removesuffix(".md"): page.read_text(encoding="utf-8")
        for page in sorted(found, key=lambda page: page.name)
    }


def yaml_of(page: str) -> str:
    """Return the YAML of a page."""
    match = _BLOCK.search(page)
    assert match is not None
    return match.group(1)


def write(task: str, output: Path, console: Console) -> None:
    """Write the starter of a task.

    Raises:
        Refusal: there is no such task, or the file is there already.
    """
    known = pages("tasks")
    check_known("task", [task], known)
    if output.exists():
        raise Refusal(f"the file must be new, but {output} exists; choose another with --output")
    write_whole(output, yaml_of(known[task]))
    console.print(
        f"{output} written; put in your model and data, then: fastlora train {output}",
        highlight=False,
    )
