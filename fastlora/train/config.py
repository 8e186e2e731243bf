"""The YAML file of a run: what it may hold, and how it is read."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fastlora.train.refusal import Refusal, nearest

MAX_BYTES = 2**20
MOST_SEED = 2**32 - 1


class Section(BaseModel):
    """A part of the file: unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class DataSection(Section):
    """Where the rows come from, and what their columns are called.

    Attributes:
        train: a .jsonl, .json, .csv, .tsv, .parquet or .txt file, a folder of images with one
            sub-folder per class, or a hub data set's id.
        valid: as `train`; None: `valid_fraction` of the training rows.
        test: as `train`; None: the validation rows are the test.
        retain: texts that the model should still be good at; the perplexity of their words, or
            of some that are masked for an encoder, is measured before and after.
        valid_fraction: share of the training rows that are held out when `valid` is None.
        max_length: tokens per example; what is longer is cut, and counted.
        max_new_tokens: the most that a model writes; None: the longest answer of the training and
            validation rows, and 64 at least; max_length for plain text.
        bad_rows: "stop" at the first bad row, or "skip" and count them.
        duplicates: "keep" or "drop" rows that repeat an earlier one.
        packing: put several examples in one row of max_length tokens (language models).
        assistant_only: learn from the answers only (instruction tuning).
    """

    train: str
    valid: str | None = None
    test: str | None = None
    retain: str | None = None
    valid_fraction: float = Field(0.1, gt=0, lt=1)
    max_length: int = Field(512, ge=2)
    max_new_tokens: int | None = Field(None, ge=1)
    bad_rows: Literal["stop", "skip"] = "stop"
    duplicates: Literal["keep", "drop"] = "keep"
    packing: bool = False
    assistant_only: bool = True
    text: str | None = None
    text_pair: str | None = None
    label: str | None = None
    tokens: str | None = None
    tags: str | None = None
    question: str | None = None
    context: str | None = None
    answers: str | None = None
    source: str | None = None
    target: str | None = None
    image: str | None = None
    messages: str | None = None
    prompt: str | None = None
    completion: str | None = None


ROLES = tuple(
    name
    for name, field in DataSection.model_fields.items()
    if field.default is None and name not in ("valid", "test", "retain", "max_new_tokens")
)
"""The keys of `data` that name columns."""


SFT_FIELDS = {
    "packing": "packing",
    "max_length": "max_length",
    "assistant_only_loss": "assistant_only",
    "completion_only_loss": "assistant_only",
    "dataset_text_field": "text",
}
"""Fields of TRL's SFTConfig that the section `train` may have -> what the key of `data` is."""


class RunConfig(Section):
    """One run.

    Attributes:
        model: a directory, a hub id, "timm:NAME", or "nano", the bundled language model.
        task: one of `fastlora.train.tasks.TASKS`.
        data: see `DataSection`.
        method: the name of one of `fastlora.train.strategies.strategies()`.
        adapter: the fields of the method's config, by PEFT's names.
        quantize: how the frozen base is stored; None: as it is.
        train: fields of transformers' TrainingArguments and those of `fastlora.train.arguments`;
            `SFT_FIELDS` of TRL are moved to `data`.
        output: the directory of the run's results.
    """

    model: str
    task: str
    data: DataSection
    method: str = "lora"
    adapter: dict[str, Any] = Field(default_factory=dict)
    quantize: Literal["nf4", "fp4"] | None = None
    train: dict[str, Any] = Field(default_factory=dict)
    output: Path

    @property
    def seed(self) -> int:
        """The seed of data split, head, adapter and order."""
        return int(self.train.get("seed", 0))

    def as_dict(self) -> dict[str, Any]:
        """Return the file's content, with paths as text and without what is not set."""
        found = self.model_dump(mode="json", exclude_none=True)
        return {key: value for key, value in found.items() if value != {}}


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """Safe YAML as in version 1.2: 1e-3 is a number, `no` is text; a key may not appear twice."""


_BOOL, _FLOAT = "tag:yaml.org,2002:bool", "tag:yaml.org,2002:float"
_Loader.yaml_implicit_resolvers = {
    key: [pair for pair in pairs if pair[0] not in (_BOOL, _FLOAT)]
    for key, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    _BOOL, re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_Loader.add_implicit_resolver(
    _FLOAT,
    re.compile(
        r"^[-+]?(\d[\d_]*\.[\d_]*([eE][-+]?\d+)?|\.\d+([eE][-+]?\d+)?|\d+[eE][-+]?\d+"
        r"|\.(inf|Inf|INF)|\.(nan|NaN|NAN))$|^[-+]\.(inf|Inf|INF)$"
    ),
    list("-+0123456789."),
)


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    keys = [loader.construct_object(key, deep=True) for key, _ in node.value]
    for key in keys:
        if keys.count(key) > 1:
            raise yaml.constructor.ConstructorError(
                None, None, f"the key {key!r} appears twice", node.start_mark
            )
    found: dict[Any, Any] = loader.construct_mapping(node, deep=True)
    return found


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def parse_yaml(text: str, name: str) -> Any:
    """Return what a YAML text holds.

    Raises:
        Refusal: it is not YAML, or uses aliases.
    """
    try:
        if any(isinstance(token, yaml.AliasToken) for token in yaml.scan(text, Loader=_Loader)):
            raise Refusal(f"{name} must not use aliases (*name); write the values out")
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        said = " ".join(str(error).split())
        raise Refusal(f"{name} must be YAML, got: {said}; mend the file") from None


def read_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Return a run's config from its file and `key=value` overrides.

    Args:
        path: a YAML file.
        overrides: "train.learning_rate=1e-3": a dotted key, and a YAML value.

    Raises:
        Refusal: the file is missing or not YAML, or a key or value is wrong.
    """
    if not path.is_file():
        raise Refusal(
            f"the run must be a YAML file, but there is no {path}; `fastlora init TASK` writes one"
        )
    if path.stat().st_size > MAX_BYTES:
        raise Refusal(f"the run must be a YAML file of at most 1 MiB, but {path} is larger")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise Refusal(f"{path} must be a text file in UTF-8; save it as such") from None
    except OSError as error:
        raise Refusal(f"{path} must be readable, but it is not: {error.strerror}") from None
    content = parse_yaml(text, str(path))
    if not isinstance(content, dict):
        raise Refusal(f"{path} must hold keys and values, got {type(content).__name__}")
    for override in overrides:
        _override(content, override)
    return as_config(content, str(path))


def _override(content: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise Refusal(f"an override must be key=value, got {override!r}")
    *parents, last = key.split(".")
    place = content
    for parent in parents:
        below = place.setdefault(parent, {})
        if not isinstance(below, dict):
            raise Refusal(
                f"an override's key must lead through sections, but in {key!r}"
                f" {parent!r} is a value"
            )
        place = below
    place[last] = parse_yaml(value, f"the value of {key}")


def _moved(content: dict[str, Any]) -> dict[str, Any]:
    """Return the content with TRL's fields where fastlora's are.

    Raises:
        Refusal: a field and fastlora's key for it are both there, and differ.
    """
    train, data = content.get("train"), content.get("data")
    if not isinstance(train, dict) or not isinstance(data, dict):
        return content
    train, data = dict(train), dict(data)
    for theirs in SFT_FIELDS.keys() & train.keys():
        ours, value = SFT_FIELDS[theirs], train.pop(theirs)
        if data.setdefault(ours, value) != value:
            raise Refusal(
                f"train.{theirs} must be what data.{ours} is, got {value!r} and {data[ours]!r};"
                " leave one out"
            )
    return {**content, "train": train, "data": data}


def as_config(content: dict[str, Any], name: str) -> RunConfig:
    """Return the config that these keys and values are.

    Raises:
        Refusal: a key or a value is wrong; the first is named.
    """
    try:
        return RunConfig(**_moved(content))
    except ValidationError as error:
        first = error.errors()[0]
    except TypeError as error:
        raise Refusal(f"{name} must have text for keys, got: {error}") from None
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        section = DataSection if len(first["loc"]) > 1 else RunConfig
        key = str(first["loc"][-1])
        hint = nearest(key, section.model_fields)
        known = hint or f"; known are {', '.join(section.model_fields)}"
        raise Refusal(f"{name} must have known keys, got {where!r}{known}")
    if first["type"] == "missing":
        raise Refusal(f"{name} must have the key {where!r}; add it")
    said = first["msg"][0].lower() + first["msg"][1:]
    raise Refusal(f"{name}: the value of {where} is wrong: {said}, got {first['input']!r}")
