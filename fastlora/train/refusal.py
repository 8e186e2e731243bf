"""Bad input: one sentence that a person can act on."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class Refusal(Exception):
    """Bad input, found before anything was written; the message is one sentence."""


@contextmanager
def refusing() -> Iterator[None]:
    """Turn the errors of bad input into `Refusal`."""
    try:
        yield
    except (ValueError, TypeError, NotImplementedError, ImportError, OSError) as error:
        raise Refusal(str(error)) from error


def nearest(name: str, known: Iterable[str]) -> str:
    """Return " (did you mean ...?)" with the known name that looks most like this one, or ""."""
    found = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean {found[0]!r}?" if found else ""


def check_known(what: str, names: Iterable[str], known: Iterable[str]) -> None:
    """Raise unless every name is known.

    Raises:
        Refusal: the first that is not, with the nearest known one, or all in the given order.
    """
    known = list(known)
    for name in names:
        if name not in known:
            hint = nearest(name, known) or f"; known are {', '.join(known)}"
            raise Refusal(f"{what} must be known, got {name!r}{hint}")
