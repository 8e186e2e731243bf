"""A real 10-class short-text task that is on every machine: which package does a text document?

The texts are paragraphs, at least six words long, of the docstrings of CPython's standard library;
the classes are packages. `python -m bench.docstrings DIR` writes train.jsonl (200 rows a class),
valid.jsonl (20) and test.jsonl (50), the same for everyone with the same Python.
"""

from __future__ import annotations

import ast
import json
import random
import re
import sys
import warnings
from pathlib import Path

CLASSES = (
    "asyncio", "decimal", "email", "http", "importlib",
    "logging", "tkinter", "turtle", "unittest", "xml",
)  # fmt: skip
COUNTS = {"train": 200, "valid": 20, "test": 50}
_LEFT_OUT = {"test", "tests", "site-packages", "idlelib"}
_WORDS, _CHARACTERS = 6, 300


def paragraphs(package: str) -> list[str]:
    """Return the distinct paragraphs of a package's docstrings, sorted."""
    root = Path(ast.__file__).parent
    stem = {"decimal": "_pydecimal"}.get(package, package)
    files = [root / f"{stem}.py", *sorted((root / stem).rglob("*.py"))]
    found: set[str] = set()
    for file in files:
        if file.is_file() and not _LEFT_OUT & set(file.relative_to(root).parts):
            found |= set(_of_file(file))
    return sorted(found)


def _of_file(file: Path) -> list[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tree = ast.parse(file.read_text(encoding="utf-8"))
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    texts = [ast.get_docstring(node) or "" for node in ast.walk(tree) if isinstance(node, kinds)]
    parts = [" ".join(part.split()) for text in texts for part in re.split(r"\n\s*\n", text)]
    return [p[:_CHARACTERS] for p in parts if len(p.split()) >= _WORDS and ">>>" not in p]


def write(directory: Path, counts: dict[str, int] = COUNTS, seed: int = 0) -> None:
    """Write the three files, drawn with this seed."""
    draw = random.Random(seed)
    rows: dict[str, list[dict[str, str]]] = {name: [] for name in counts}
    for package in CLASSES:
        texts = paragraphs(package)
        draw.shuffle(texts)
        for name, count in counts.items():
            taken, texts = texts[:count], texts[count:]
            rows[name] += [{"text": text, "label": package} for text in taken]
    directory.mkdir(parents=True, exist_ok=True)
    for name, chosen in rows.items():
        draw.shuffle(chosen)
        lines = [json.dumps(row) + "\n" for row in chosen]
        (directory / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
