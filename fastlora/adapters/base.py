"""The fields that the configs of all adapter methods share, and the checks of their values."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, TypeVar

from fastlora.adapters import targets

MAX_RANK = 4096
MAX_ALPHA = 1e4
Names = str | Sequence[str] | None
UNUSED = frozenset(
    [
        "fan_in_fan_out",
        "peft_type",
        "auto_mapping",
        "peft_version",
        "base_model_name_or_path",
        "revision",
        "inference_mode",
        "megatron_core",
        "qalora_group_size",
        "runtime_config",
    ]
)
"""What a config of PEFT has beside the method's own fields, and what changes nothing here."""
_C = TypeVar("_C")


class _ConfigType(type):
    """The type of configs, which are made with the fields that PEFT's are made with."""

    def __call__(cls: type[_C], **values: Any) -> _C:
        """Return the config; fields of PEFT that change nothing here are left out."""
        own = {f.name for f in fields(cls) if f.init}  # type: ignore[arg-type]
        used = {name: value for name, value in values.items() if name in own or name not in UNUSED}
        unknown = sorted(set(used) - own)
        if unknown:
            raise TypeError(
                f"{cls.__name__} takes the fields {sorted(own)}, got {unknown[0]!r} too; leave it"
                " out"
            )
        config: _C = super().__call__(**used)  # type: ignore[misc]
        return config

    @property
    def __signature__(cls) -> inspect.Signature:
        """The fields, for what shows or reads signatures."""
        own = inspect.signature(cls.__init__)  # type: ignore[misc]
        return own.replace(parameters=list(own.parameters.values())[1:])


@dataclass(frozen=True, kw_only=True)
class AdapterConfig(metaclass=_ConfigType):
    """The fields that all methods have, under PEFT's names and with PEFT's defaults.

    Attributes:
        r: rank, 1 to 4096.
        target_modules: list of module names or suffixes, a regular expression that matches the
            whole name, or "all-linear" (also None): every linear but the output head.
        exclude_modules: list of names or suffixes, or a regular expression: never adapted.
        rank_pattern: rank by regular expression for the end of a module's name; first match wins.
        alpha_pattern: alpha in the same way.
        layers_to_transform: numbers of the layers to adapt, None for all; lists only.
        layers_pattern: name of the module list that `layers_to_transform` counts in.
        modules_to_save: names or suffixes of modules that are trained whole and saved along.
        task_type: PEFT's task type, such as "CAUSAL_LM", kept for PEFT.

    The fields in `UNUSED` are taken and forgotten; `fan_in_fan_out` is one, as a layer shows it.

    Raises:
        TypeError: a field has the wrong type, or there is no such field.
        ValueError: a field has a value out of range, or a pattern is not safe.
    """

    peft_type: ClassVar[str] = ""
    alpha_field: ClassVar[str] = "alpha"

    r: int = 8
    target_modules: Names = None
    exclude_modules: Names = None
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    layers_to_transform: int | Sequence[int] | None = None
    layers_pattern: Names = None
    modules_to_save: Sequence[str] | None = None
    task_type: str | None = None

    def __post_init__(self) -> None:
        check_rank("r", self.r)
        for name in ("target_modules", "exclude_modules", "modules_to_save", "layers_pattern"):
            self._set(name, check_names(name, getattr(self, name)))
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if isinstance(value, str) and value.lower() != "all-linear":
                targets.check_pattern(value, name)
        if isinstance(self.modules_to_save, str):
            raise TypeError(
                f"modules_to_save must be a list of names, got {self.modules_to_save!r}; put it in"
                " a list"
            )
        self._check_patterns()
        self._check_layers()
        task = getattr(self.task_type, "value", self.task_type)
        if task is not None and not isinstance(task, str):
            raise TypeError(f"task_type must be a str or None, got {type(task).__name__}")
        self._set("task_type", task)

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def _check_patterns(self) -> None:
        for name, check in (("rank_pattern", check_rank), ("alpha_pattern", check_alpha)):
            pattern = getattr(self, name)
            if not isinstance(pattern, Mapping):
                raise TypeError(f"{name} must be a dict, got {type(pattern).__name__}; pass a dict")
            for key, value in pattern.items():
                if not isinstance(key, str):
                    raise TypeError(f"the keys of {name} must be str, got {key!r}; pass names")
                targets.check_pattern(key, f"a key of {name}")
                check(f"{name}[{key!r}]", value)
            self._set(name, dict(pattern))

    def _check_layers(self) -> None:
        layers = self.layers_to_transform
        if layers is None:
            if self.layers_pattern:
                raise ValueError(
                    "layers_pattern needs layers_to_transform, got only layers_pattern; give both"
                )
            return
        if not isinstance(layers, int):
            layers = tuple(layers)
            self._set("layers_to_transform", layers or None)
        for layer in (layers,) if isinstance(layers, int) else layers:
            if not isinstance(layer, int) or isinstance(layer, bool) or layer < 0:
                raise ValueError(f"layers_to_transform must hold numbers from 0, got {layer!r}")
        if isinstance(self.target_modules, str) and self.target_modules.lower() != "all-linear":
            raise ValueError(
                "layers_to_transform needs target_modules as a list, got the pattern"
                f" {self.target_modules!r}; put the layers into the pattern"
            )

    @property
    def all_linear(self) -> bool:
        """Whether every linear but the head is a target."""
        wanted = self.target_modules
        return wanted is None or (isinstance(wanted, str) and wanted.lower() == "all-linear")

    def excludes(self, name: str) -> bool:
        """Return whether a module is excluded, or is in a module that is saved whole."""
        if self.exclude_modules and targets.matches(self.exclude_modules, name):
            return True
        return bool(self.modules_to_save) and targets.is_under(self.modules_to_save or (), name)

    def wants(self, name: str) -> bool:
        """Return whether the module of this name is to be adapted; "all-linear" wants every one."""
        if self.excludes(name):
            return False
        wanted = self.target_modules
        if not self.all_linear and not targets.matches(wanted or (), name):
            return False
        layers = self.layers_to_transform
        return layers is None or targets.in_layers(layers, self.layers_pattern, name)

    def rank_of(self, name: str) -> int:
        """Return the rank of the module of this name."""
        key = targets.pattern_key(self.rank_pattern, name)
        return self.r if key is None else self.rank_pattern[key]

    def alpha_of(self, name: str) -> float:
        """Return the alpha of the module of this name."""
        key = targets.pattern_key(self.alpha_pattern, name)
        return float(getattr(self, self.alpha_field) if key is None else self.alpha_pattern[key])

    def changed_fields(self) -> dict[str, Any]:
        """Return the fields that differ from their defaults; tuples as lists."""
        default = type(self)()
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        changed = {k: v for k, v in values.items() if v != getattr(default, k)}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in changed.items()}


def check_rank(name: str, value: object) -> None:
    """Raise unless `value` is a rank."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, got {value!r}; pass a whole number")
    if not 1 <= value <= MAX_RANK:
        raise ValueError(f"{name} must be between 1 and {MAX_RANK}, got {value}; pass another rank")


def check_alpha(name: str, value: object) -> None:
    """Raise unless `value` is a finite number of sensible size."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number, got {value!r}; pass a number")
    if not math.isfinite(value) or abs(value) > MAX_ALPHA:
        raise ValueError(
            f"{name} must be finite and at most {MAX_ALPHA:.0f} in size, got {value}; pass another"
        )


def check_flag(name: str, value: object) -> None:
    """Raise unless `value` is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}; pass one")


def check_dropout(name: str, value: object) -> None:
    """Raise unless `value` is a probability below 1."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number, got {value!r}; pass a number")
    if not 0 <= value < 1:
        raise ValueError(f"{name} must be at least 0 and below 1, got {value}; pass another")


def check_names(field_name: str, value: Any) -> str | tuple[str, ...] | None:
    """Return a str as it is and a collection of names as a tuple; a set comes in sorted order."""
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, (list, tuple, set, frozenset)):
        raise TypeError(
            f"{field_name} must be a str or a list of str, got {type(value).__name__}; pass a list"
        )
    names = sorted(value) if isinstance(value, (set, frozenset)) else list(value)
    if any(not isinstance(name, str) or not name for name in names):
        raise TypeError(f"{field_name} must hold names, got {names!r}; pass str that are not empty")
    return tuple(names)
