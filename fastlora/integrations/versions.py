"""Which versions of other libraries are supported."""

from __future__ import annotations

from functools import cache
from importlib.metadata import version

SUPPORTED = {
    "transformers": ((5, 12), (6, 0)),
    "peft": ((0, 19), (0, 22)),
    "trl": ((1, 8), (2, 0)),
    "bitsandbytes": ((0, 46), (1, 0)),
}
"""Package -> (the first supported version, the first that is not)."""


@cache
def check_version(package: str) -> None:
    """Raise unless the installed version is supported.

    Raises:
        ImportError: it is not; the message names the range.
    """
    found, (first, end) = version(package), SUPPORTED[package]
    numbers = tuple(int(part) for part in found.split(".")[:2] if part.isdigit())
    if not first <= numbers < end:
        low, high = (".".join(map(str, v)) for v in (first, end))
        raise ImportError(
            f"fastlora works with {package}>={low},<{high}, found {found}; install one of these:"
            f' pip install "{package}>={low},<{high}"'
        )
