"""Text that every CPython carries, split so that pre-training and fine-tuning share none of it.

Pre-training text: the standard library's source, and its docstrings (those of C modules included).
Fine-tuning text: `pydoc_data.topics`, the language reference. A pre-training block that shares
`SHARED_WORDS` consecutive words with the reference is dropped. Both have a held-out part: whole
files for the source, whole topics for the reference.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import inspect
import re
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

SHARED_WORDS = 12
"""This many consecutive words in common count as an overlap."""

# Tests, vendored code, tables, and the reference itself (kept for fine-tuning).
_SKIPPED_DIRS = frozenset(
    {"test", "tests", "idle_test", "site-packages", "dist-packages", "lib2to3", "idlelib"}
    | {"pydoc_data", "encodings", "lib-dynload", "__pycache__", "__phello__"}
)
_SKIPPED_FILES = re.compile(r"_sysconfigdata|^this\.py$|^config-|^entities\.py$|^pydoc_topics")
_WORD = re.compile(r"\w+")


class Document(NamedTuple):
    """One text: `name` decides its split, `text` is what a model reads."""

    name: str
    text: str


class Split(NamedTuple):
    """Training and held-out documents, no block of text in both."""

    train: list[Document]
    held_out: list[Document]


def _bucket(name: str, buckets: int) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") % buckets


def _blocks(text: str) -> list[str]:
    return [b for b in re.split(r"\n[ \t]*\n", text) if b.strip()]


def windows(text: str, size: int = SHARED_WORDS) -> set[tuple[str, ...]]:
    """Return every run of `size` consecutive lower-case words in `text`."""
    words = _WORD.findall(text.lower())
    return {tuple(words[i : i + size]) for i in range(len(words) - size + 1)}


def _all_windows(documents: Iterable[Document]) -> set[tuple[str, ...]]:
    return set().union(*(windows(d.text) for d in documents))


@lru_cache(maxsize=1)
def _reference() -> dict[str, str]:
    from pydoc_data.topics import topics

    return {name: text.strip() for name, text in sorted(topics.items())}


def _source_files() -> Iterator[tuple[str, str]]:
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if _SKIPPED_DIRS.isdisjoint(parts) and not any(_SKIPPED_FILES.search(p) for p in parts):
            text = path.read_text(encoding="utf-8", errors="replace")
            if text.strip():
                yield "/".join(parts), text.replace("\r\n", "\n")


def _docstrings(source: str) -> str:
    """Return the module's docstrings, each below the name it documents."""
    parts: list[str] = []

    def visit(node: ast.AST, prefix: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                name = f"{prefix}{child.name}"
                doc = ast.get_docstring(child)
                if doc and len(doc) > 80:
                    parts.append(f"{name}\n\n{doc}")
                visit(child, f"{name}.")

    tree = ast.parse(source)
    module_doc = ast.get_docstring(tree)
    if module_doc and len(module_doc) > 80:
        parts.append(module_doc)
    visit(tree, "")
    return "\n\n".join(parts)


def _compiled_docs(module_name: str) -> str:
    """Return the docstrings of a module written in C, or '' where there is none to read."""
    try:
        module = importlib.import_module(module_name)
    except ImportError:
        return ""
    parts: list[str] = []
    for name, value in sorted(vars(module).items()):
        if getattr(value, "__module__", None) not in (module_name, None) or name.startswith("__"):
            continue
        members = sorted(vars(value).items()) if inspect.isclass(value) else []
        for label, item in [(name, value), *((f"{name}.{m}", v) for m, v in members)]:
            doc = getattr(item, "__doc__", None)
            if callable(item) and isinstance(doc, str) and len(doc) > 80:
                parts.append(f"{label}\n\n{inspect.cleandoc(doc)}")
    return "\n\n".join(dict.fromkeys(parts))


def _deduplicated(documents: Iterable[Document], seen: set[str]) -> list[Document]:
    """Drop documents whose text came before, and blocks shared with the reference."""
    forbidden = _all_windows(Document(name, text) for name, text in _reference().items())
    kept: list[Document] = []
    for document in documents:
        key = hashlib.sha256(" ".join(document.text.split()).encode()).hexdigest()
        if key in seen:
            continue
        seen.add(key)
        text = _without(document.text, forbidden)
        if text.strip():
            kept.append(Document(document.name, text))
    return kept


def _without(text: str, forbidden: set[tuple[str, ...]]) -> str:
    """Drop the lines of `text` that a forbidden window touches."""
    spans = [(m.start(), m.end()) for m in _WORD.finditer(text)]
    words = [text[a:b].lower() for a, b in spans]
    hits = [
        i
        for i in range(len(words) - SHARED_WORDS + 1)
        if tuple(words[i : i + SHARED_WORDS]) in forbidden
    ]
    if not hits:
        return text
    cut = bytearray(len(text))
    for i in hits:
        start = text.rfind("\n", 0, spans[i][0]) + 1
        end = text.find("\n", spans[i + SHARED_WORDS - 1][1])
        end = len(text) if end < 0 else end + 1
        cut[start:end] = b"\x01" * (end - start)
    return "".join(c for c, gone in zip(text, cut, strict=True) if not gone)


def pretraining() -> Split:
    """Return the standard library's source and docstrings; about 1 file in 50 is held out.

    A held-out file's docstrings are held out with it, and blocks of more than 80 characters that a
    training document holds too are dropped from the held-out one.
    """
    train: list[Document] = []
    held_out: list[Document] = []
    for name, text in _source_files():
        side = held_out if _bucket(name, 50) == 0 else train
        side.append(Document(name, text))
        try:
            docs = _docstrings(text)
        except SyntaxError:  # a file for another Python
            continue
        if docs:
            side.append(Document(f"{name} docstrings", docs))
    for module_name in sorted(sys.builtin_module_names):
        docs = _compiled_docs(module_name)
        if docs:
            train.append(Document(f"{module_name} docstrings", docs))
    seen: set[str] = set()
    train = _deduplicated(train, seen)
    return Split(train, _fresh(train, _deduplicated(held_out, seen)))


def _fresh(train: list[Document], held_out: list[Document]) -> list[Document]:
    """Drop the blocks of `held_out` that `train` holds too."""
    known = {" ".join(b.split()) for d in train for b in _blocks(d.text) if len(b) > 80}
    kept: list[Document] = []
    for document in held_out:
        blocks = [b for b in _blocks(document.text) if " ".join(b.split()) not in known]
        if blocks:
            kept.append(Document(document.name, "\n\n".join(blocks)))
    return kept


def reference() -> Split:
    """Return the language reference of the running Python; about 1 topic in 8 is held out.

    Topics repeat one another's sections: each block is kept once, in a held-out topic where one
    holds it, and training lines that share `SHARED_WORDS` words with a held-out topic are dropped.
    """
    seen: set[str] = set()
    held_out, train = [], []
    for document in _topics(held_out=True):
        held_out.append(_unseen(document, seen))
    forbidden = _all_windows(held_out)
    for document in _topics(held_out=False):
        unseen = _unseen(document, seen)
        train.append(Document(unseen.name, _without(unseen.text, forbidden)))
    return Split([d for d in train if d.text.strip()], [d for d in held_out if d.text])


def _topics(held_out: bool) -> Iterator[Document]:
    for name, text in _reference().items():
        if (_bucket(name, 8) == 0) == held_out:
            yield Document(name, text)


def _unseen(document: Document, seen: set[str]) -> Document:
    """Drop the blocks whose words are in `seen`, and add the others to it."""
    blocks: list[str] = []
    for block in _blocks(document.text):
        key = " ".join(block.split())
        if key not in seen:
            seen.add(key)
            blocks.append(block)
    return Document(document.name, "\n\n".join(blocks))
