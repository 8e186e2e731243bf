"""The adapter methods: one file per method; a module of this folder with a `METHOD` is one."""

from __future__ import annotations

import importlib
import pkgutil

from fastlora.adapters.base import AdapterConfig
from fastlora.adapters.cache import Cache
from fastlora.adapters.call import Base, Call
from fastlora.adapters.method import AdapterSpec, Method

_MODULES = [importlib.import_module(f"{__name__}.{m.name}") for m in pkgutil.iter_modules(__path__)]
METHODS: dict[str, Method] = {
    module.METHOD.name: module.METHOD for module in _MODULES if hasattr(module, "METHOD")
}


def method_of(config: AdapterConfig) -> Method:
    """Return the method that a config belongs to.

    Raises:
        TypeError: it is no config of a known method.
    """
    for method in METHODS.values():
        if type(config) is method.config_class:
            return method
    known = [method.config_class.__name__ for method in METHODS.values()]
    raise TypeError(
        f"config must be one of {known}, got {type(config).__name__}; pass one of these"
    )


__all__ = [
    "METHODS",
    "AdapterConfig",
    "AdapterSpec",
    "Base",
    "Cache",
    "Call",
    "Method",
    "method_of",
]
