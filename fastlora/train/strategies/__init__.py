"""Ways of fine-tuning, one file each; `STRATEGIES` finds them."""

from __future__ import annotations

import importlib
import pkgutil

from fastlora.train.refusal import Refusal, nearest
from fastlora.train.strategies.base import Strategy


def strategies() -> dict[str, type[Strategy]]:
    """Return every strategy of this folder by name, in the order of `ORDER`."""
    found = {}
    for info in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"{__name__}.{info.name}")
        if hasattr(module, "STRATEGY"):
            found[module.STRATEGY.name] = module.STRATEGY
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
    if name not in known:
        hint = nearest(name, known) or f"; known are {', '.join(known)}"
        raise Refusal(f"method must be known, got {name!r}{hint}")
    return known[name]
