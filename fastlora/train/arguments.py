"""The section `train`: fields of transformers' TrainingArguments, and a few of our own."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from pydantic import TypeAdapter, ValidationError

from fastlora.train.config import MOST_SEED, RunConfig
from fastlora.train.refusal import Refusal, check_known
from fastlora.train.strategies import strategy

AUTO = "auto"
BATCH, EVAL_BATCH = 8, 32
DEFAULTS: dict[str, Any] = {
    "num_train_epochs": 3,
    "per_device_train_batch_size": BATCH,
    "per_device_eval_batch_size": EVAL_BATCH,
    "lr_scheduler_type": "linear",
    "weight_decay": 0.01,
    "eval_strategy": "epoch",
    "save_strategy": "epoch",
    "save_total_limit": 2,
    "logging_steps": 1,
    "report_to": "none",
    "seed": 0,
}
"""Of the section; the learning rate is the method's."""
_LEAST = {
    "learning_rate": 0,
    "weight_decay": 0,
    "max_grad_norm": 0,
    "warmup_steps": 0,
    "seed": 0,
    "data_seed": 0,
    "dataloader_num_workers": 0,
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
}
_ABOVE_0 = ("num_train_epochs", "logging_steps", "eval_steps", "save_steps")
_KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
_OURS = {"output_dir", "resume_from_checkpoint", "remove_unused_columns", "label_names"}


@dataclass(frozen=True)
class Extras:
    """What TrainingArguments does not have.

    Attributes:
        layerwise_lr_decay: the learning rate of each block is this times that of the block after.
        loraplus_lr_ratio: the learning rate of lora_B is this times that of lora_A (LoRA+, Hayou et
            al. 2024, arXiv:2402.12354).
        early_stopping_patience: stop after this many evaluations that are no better, and take the
            best weights.
        max_bad_steps: stop after this many steps in a row whose loss or gradient is not finite.
        memory_budget_gib: the run must not need more memory than this; None: what is free.
        warmup_ratio: share of the steps in which the learning rate rises.
    """

    layerwise_lr_decay: float = 1.0
    loraplus_lr_ratio: float = 1.0
    early_stopping_patience: int | None = None
    max_bad_steps: int = 5
    memory_budget_gib: float | None = None
    warmup_ratio: float | None = None

    def __post_init__(self) -> None:
        for name, kind in typing.get_type_hints(Extras).items():
            _check_kind(name, getattr(self, name), kind)
        for name in ("layerwise_lr_decay", "loraplus_lr_ratio", "max_bad_steps"):
            if not getattr(self, name) > 0:
                raise Refusal(f"train.{name} must be a number above 0, got {getattr(self, name)!r}")
        patience, ratio = self.early_stopping_patience, self.warmup_ratio
        if patience is not None and patience < 1:
            raise Refusal(f"train.early_stopping_patience must be at least 1, got {patience!r}")
        if ratio is not None and not 0 <= ratio < 1:
            raise Refusal(f"train.warmup_ratio must be at least 0 and below 1, got {ratio!r}")
        if self.memory_budget_gib is not None and self.memory_budget_gib <= 0:
            raise Refusal(
                f"train.memory_budget_gib must be above 0, got {self.memory_budget_gib!r}"
            )


def known_fields() -> set[str]:
    """Return every key that the section may have."""
    ours = {field.name for field in dataclasses.fields(Extras)}
    theirs = {f.name for f in dataclasses.fields(transformers.TrainingArguments) if f.init}
    return (theirs - _OURS) | ours


def split_arguments(section: dict[str, Any]) -> tuple[dict[str, Any], Extras]:
    """Return the fields of TrainingArguments and ours.

    Raises:
        Refusal: a key is unknown or a value is wrong.
    """
    check_known("a key of train", section, sorted(known_fields()))
    names = {field.name for field in dataclasses.fields(Extras)}
    ours = {key: value for key, value in section.items() if key in names}
    theirs = {key: value for key, value in section.items() if key not in names}
    kinds = typing.get_type_hints(transformers.TrainingArguments)
    for key, value in theirs.items():
        if key != "per_device_train_batch_size" or value != AUTO:
            _check_kind(key, value, kinds[key])
            _check_range(key, value)
    return theirs, Extras(**ours)


def _check_kind(key: str, value: Any, kind: Any) -> None:
    """Raise unless a value is of the kind that TrainingArguments says the field is."""
    try:
        TypeAdapter(kind).validate_python(value, strict=True)
    except ValidationError:
        raise Refusal(f"train.{key} must be {_in_words(kind)}, got {value!r}") from None
    if isinstance(value, float) and not math.isfinite(value):
        raise Refusal(f"train.{key} must be finite, got {value!r}")


def _in_words(kind: Any) -> str:
    if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union:
        said = [_in_words(part) for part in typing.get_args(kind) if part is not types.NoneType]
        return " or ".join(dict.fromkeys(said))
    plain = typing.get_origin(kind) or kind
    if plain is list:
        return "a list"
    if plain is dict:
        return "keys and values"
    return _KINDS.get(plain, "text")


def _check_range(key: str, value: Any) -> None:
    """Raise unless a value of the right kind is in the range that a run can use."""
    least = _LEAST.get(key)
    if value is None:
        return
    if least is not None and value < least:
        kind = "whole number" if isinstance(value, int) else "number"
        raise Refusal(f"train.{key} must be a {kind} of at least {least}, got {value!r}")
    if key in ("seed", "data_seed") and value > MOST_SEED:
        raise Refusal(f"train.{key} must be at most {MOST_SEED}, got {value!r}")
    if key in _ABOVE_0 and value <= 0:
        raise Refusal(f"train.{key} must be above 0, got {value!r}")
    if key == "max_steps" and value < 1 and value != -1:
        raise Refusal(
            "train.max_steps must be a whole number of at least 1, or -1 for train.num_train_epochs"
            f" epochs, got {value!r}"
        )


def resolve(config: RunConfig) -> RunConfig:
    """Return a run's config with the defaults of its section `train` written out.

    Raises:
        Refusal: the method is unknown, or a key or a value of the section is wrong.
    """
    _, extras = split_arguments(config.train)
    defaults = {"learning_rate": strategy(config.method).learning_rate, **DEFAULTS}
    if config.train.get("max_steps", -1) > 0:
        del defaults["num_train_epochs"]
    section = {**defaults, **config.train}
    if extras.early_stopping_patience is not None:
        section["save_strategy"] = section["eval_strategy"]
        if section.get("eval_steps") is not None:
            section.setdefault("save_steps", section["eval_steps"])
    return config.model_copy(update={"train": section})


def make_arguments(
    fields: dict[str, Any], extras: Extras, directory: Path, metric: str, greater: bool
) -> transformers.TrainingArguments:
    """Return TrainingArguments.

    Args:
        fields: of the section as `resolve` leaves it, with a number for the batch size.
        extras: ours.
        directory: of the checkpoints.
        metric: the score that the best checkpoint has.
        greater: whether more of it is better.

    Raises:
        Refusal: a value is wrong.
    """
    values: dict[str, Any] = {
        "use_cpu": not torch.cuda.is_available(),
        "metric_for_best_model": metric,
        "greater_is_better": greater,
        **fields,
        "output_dir": str(directory),
        "remove_unused_columns": False,
        "disable_tqdm": True,
        "logging_nan_inf_filter": False,
        "restore_callback_states_from_checkpoint": True,
    }
    if extras.warmup_ratio is not None:
        values["warmup_steps"] = extras.warmup_ratio
    if not torch.cuda.is_available():
        values.setdefault("dataloader_pin_memory", False)
    if extras.early_stopping_patience is not None:
        if values["eval_strategy"] == "no":
            raise Refusal(
                "train.early_stopping_patience counts evaluations, but train.eval_strategy is 'no';"
                " set it to epoch or steps, or leave the patience out"
            )
        values["load_best_model_at_end"] = True
    if values.get("gradient_checkpointing"):
        values.setdefault("gradient_checkpointing_kwargs", {"use_reentrant": False})
    with refused_options():
        return transformers.TrainingArguments(**values)


@contextmanager
def refused_options() -> Iterator[None]:
    """Turn what transformers says of wrong options into `Refusal`."""
    try:
        yield
    except (TypeError, ValueError, KeyError, ImportError, RuntimeError) as error:
        raise Refusal(f"train: {' '.join(str(error).split())}") from error
