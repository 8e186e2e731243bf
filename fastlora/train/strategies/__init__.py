"""Ways of fine-tuning, one file each; `strategies` finds them."""

from __future__ import annotations

from fastlora.train.refusal import check_known
from fastlora.train.registry import members
from fastlora.train.strategies.base import Strategy


def strategies() -> dict[str, type[Strategy]]:
    """Return every strategy of this folder by name, in the order of `ORDER`."""
    found = members(__name__, __path__, "STRATEGY")
    return {name: found[name] for name in sorted(found, key=_order)}


ORDER = ("full", "head", "partial", "adapter", "lora", "dora", "loha", "lokr", "prefix", "prompt")
"""In which they are listed; others come after."""


def _order(name: str) -> tuple[int, str]:
    return (ORDER.index(name) if name in ORDER else len(ORDER), name)


def strategy(name: str) -> type[Strategy]:
    """Return the strategy of this name.

    Raises:
        Refusal: there is none.
    """
    known = strategies()
    check_known("method", [name], known)
    return known[name]
