"""Read a config in PEFT's fields: an adapter_config.json, or a live PEFT config object."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from fastlora.adapters import METHODS
from fastlora.adapters.base import UNUSED, AdapterConfig


def from_fields(values: Mapping[str, Any]) -> AdapterConfig:
    """Return the config that PEFT's fields describe.

    Args:
        values: field names and values; fields that are null, false, zero or empty may be unknown.

    Raises:
        ValueError: a value is out of range, or peft_type is missing.
        TypeError: a value has the wrong type.
        NotImplementedError: an unknown peft_type, or a feature that fastlora does not have.
    """
    kind = str(getattr(values.get("peft_type"), "value", values.get("peft_type")))
    known = {method.config_class.peft_type: method.config_class for method in METHODS.values()}
    if kind not in known:
        raise NotImplementedError(
            f"peft_type must be one of {sorted(known)}, got {kind!r}; use an adapter of one of"
            " these methods"
        )
    own = {f.name for f in fields(known[kind])}
    for name, value in values.items():
        if name not in own and name not in UNUSED and value:
            raise NotImplementedError(
                f"the PEFT field {name!r} must be unset, got {str(value)[:80]!r}; fastlora has no"
                " such feature, so train without it"
            )
    return known[kind](**{name: value for name, value in values.items() if name in own})


def as_config(config: object) -> AdapterConfig:
    """Return a config of ours as it is, and a PEFT config object as ours.

    Raises:
        TypeError: it is neither.
        ValueError: a value is out of range.
        NotImplementedError: an unknown peft_type, or a feature that fastlora does not have.
    """
    if isinstance(config, AdapterConfig):
        return config
    if hasattr(config, "peft_type") and hasattr(config, "to_dict"):
        return from_fields(config.to_dict())
    known = [method.config_class.__name__ for method in METHODS.values()]
    raise TypeError(
        f"config must be one of {known} or PEFT's config, got {type(config).__name__}; pass one"
    )
