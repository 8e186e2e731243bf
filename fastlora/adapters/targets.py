"""Match module names against what a config asks for, by PEFT's rules and with safe patterns.

Patterns may come from a downloaded file, so one that could take exponential time is refused
before it is used: no repeat inside a repeat, no alternatives inside a repeat, no back-references,
and at most four unbounded repeats in a row.
"""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

LONGEST_PATTERN = 2000
MOST_REPEATS = 4
_PARSER: Any = importlib.import_module("re._parser" if sys.version_info >= (3, 11) else "sre_parse")


class _Unsafe(Exception):
    """A pattern whose matching time is not bounded by a small power of the name's length."""


def _repeats(tree: Iterable[Any]) -> int:
    """Return how many unbounded repeats follow each other at most in a parsed pattern."""
    total = 0
    for code, value in tree:
        kind = str(code)
        if kind.endswith("_REPEAT"):
            low, high, body = value
            inner = _repeats(body)
            if int(high) > 1:
                if inner or _has_choice(body):
                    raise _Unsafe("a repeat contains another repeat or alternatives")
                inner = int(low != high)
            total += inner
        elif kind == "BRANCH":
            total += max(_repeats(branch) for branch in value[1])
        elif kind in ("SUBPATTERN", "ASSERT", "ASSERT_NOT"):
            total += _repeats(value[-1])
        elif kind == "ATOMIC_GROUP":
            total += _repeats(value)
        elif kind.startswith("GROUPREF"):
            raise _Unsafe("it refers back to a group")
    return total


def _has_choice(tree: Iterable[Any]) -> bool:
    for code, value in tree:
        kind = str(code)
        if kind.endswith("_REPEAT") or kind in ("BRANCH", "ATOMIC_GROUP", "ASSERT", "ASSERT_NOT"):
            return True
        if kind == "SUBPATTERN" and _has_choice(value[-1]):
            return True
    return False


def check_pattern(pattern: str, field: str) -> None:
    """Raise unless `pattern` is a regular expression that is safe to run on module names.

    Args:
        pattern: the regular expression.
        field: name of the config field, for the message.

    Raises:
        ValueError: it is too long, does not compile, or could take exponential time.
    """
    if len(pattern) > LONGEST_PATTERN:
        raise ValueError(
            f"{field} must be a pattern of at most {LONGEST_PATTERN} characters, got"
            f" {len(pattern)}; list the modules instead"
        )
    try:
        re.compile(pattern)
        count = _repeats(_PARSER.parse(pattern))
        if count > MOST_REPEATS:
            raise _Unsafe(f"it has {count} repeats in a row, more than {MOST_REPEATS}")
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(
            f"{field} must be a regular expression, got {pattern[:80]!r}: {error}; correct it or"
            " list the modules instead"
        ) from None
    except _Unsafe as error:
        raise ValueError(
            f"{field} must be a pattern that matches in little time, but in {pattern[:80]!r}"
            f" {error}; simplify it or list the modules instead"
        ) from None


@lru_cache(maxsize=1024)
def _key_pattern(key: str) -> re.Pattern[str]:
    return re.compile(rf"(.*\.)?({key})$")


def pattern_key(keys: Iterable[str], name: str) -> str | None:
    """Return the first key of a rank or alpha pattern that matches a module name, or None."""
    return next((key for key in keys if _key_pattern(key).match(name)), None)


def matches(target: str | Sequence[str], name: str) -> bool:
    """Return whether a pattern matches the whole name, or an entry of a list is its suffix."""
    if isinstance(target, str):
        return re.fullmatch(target, name) is not None
    return any(name == entry or name.endswith("." + entry) for entry in target)


def is_under(entries: Sequence[str], name: str) -> bool:
    """Return whether a module is one of `entries` (by suffix of its path) or lies inside one."""
    padded = f".{name}."
    return any(f".{entry}." in padded for entry in entries)


def in_layers(layers: int | Sequence[int], pattern: str | Sequence[str] | None, name: str) -> bool:
    """Return whether the number of the layer that a module lies in is one of `layers`.

    It is the first numbered segment of the name, or the first after one of `pattern`.

    Args:
        layers: layer numbers.
        pattern: name or names of the module list that is numbered; None: any.
        name: module name, such as "model.layers.3.mlp.up_proj".
    """
    wanted = (layers,) if isinstance(layers, int) else layers
    if not pattern:
        match = re.match(r".*?\.[^.]*\.(\d+)\.", name)
        return match is not None and int(match.group(1)) in wanted
    names = (pattern,) if isinstance(pattern, str) else pattern
    for entry in names:
        match = re.match(rf"(?:^|.*?\.){re.escape(entry)}\.(\d+)\.", name)
        if match:
            return int(match.group(1)) in wanted
    return False
