"""PEFT's names for keys and values, on models of a transformers that has others.

transformers 5.24 renamed the argument `past_key_values` to `cache`. PEFT up to 0.21 looks for the
old name: encoders can't take its prefix then, and in generation neither prefix nor prompt reaches
the model as it should. What is changed here are single objects, never a class of theirs.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

_OLD, _NEW = "past_key_values", "cache"


def speak_old_names(model: Any) -> None:
    """Let the base of PEFT's model take and give keys and values by their old name.

    Args:
        model: PEFT's model for prefix or prompt tuning; nothing happens where names are as it
            expects them.
    """
    place = getattr(model, "transformer_backbone_name", None)
    if place is not None:
        _rename_argument(model.base_model.get_submodule(place))
    prepare = getattr(model, "base_model_prepare_inputs_for_generation", None)
    if prepare is not None:
        model.base_model_prepare_inputs_for_generation = _renamed(prepare)


def _rename_argument(encoder: nn.Module) -> None:
    """Replace the class of this one module by a subclass whose forward has the old name."""
    kind: Any = type(encoder)
    known = inspect.signature(kind.forward).parameters
    if _OLD in known or _NEW not in known:
        return

    def forward(self: Any, *args: Any, past_key_values: Any = None, **kwargs: Any) -> Any:
        if past_key_values is not None:
            kwargs[_NEW] = past_key_values
        return kind.forward(self, *args, **kwargs)

    same = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "forward": forward}
    encoder.__class__ = type(kind.__name__, (kind,), same)


def _renamed(prepare: Any) -> Any:
    """Return `prepare_inputs_for_generation` with the old name in what it returns."""

    def by_old_name(*args: Any, **kwargs: Any) -> dict[str, Any]:
        found: dict[str, Any] = prepare(*args, **kwargs)
        if _NEW in found:
            found[_OLD] = found.pop(_NEW)
        return found

    return by_old_name
