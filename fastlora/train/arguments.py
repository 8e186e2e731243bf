"""The section `train`: fields of transformers' TrainingArguments, and a few of our own."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from fastlora.train.refusal import Refusal, check_known

AUTO = "auto"
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
        for name, low in (
            ("layerwise_lr_decay", 0),
            ("loraplus_lr_ratio", 0),
            ("max_bad_steps", 0),
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not value > low:
                raise Refusal(f"train.{name} must be a number above {low}, got {value!r}")
        if not isinstance(self.max_bad_steps, int):
            raise Refusal(f"train.max_bad_steps must be a whole number, got {self.max_bad_steps!r}")
        patience = self.early_stopping_patience
        if patience is not None and (not isinstance(patience, int) or patience < 1):
            raise Refusal(f"train.early_stopping_patience must be at least 1, got {patience!r}")
        ratio = self.warmup_ratio
        if ratio is not None and not (isinstance(ratio, int | float) and 0 <= ratio < 1):
            raise Refusal(f"train.warmup_ratio must be at least 0 and below 1, got {ratio!r}")
        budget = self.memory_budget_gib
        if budget is not None and not (isinstance(budget, int | float) and budget > 0):
            raise Refusal(f"train.memory_budget_gib must be above 0, got {budget!r}")


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
    for key in ("learning_rate", "num_train_epochs", "max_grad_norm"):
        value = theirs.get(key, 1.0)
        if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0:
            raise Refusal(f"train.{key} must be a number of at least 0, got {value!r}")
        if not math.isfinite(value):
            raise Refusal(f"train.{key} must be finite, got {value!r}")
    for key in (
        "per_device_train_batch_size",
        "per_device_eval_batch_size",
        "max_steps",
        "gradient_accumulation_steps",
    ):
        value = theirs.get(key, 1)
        if key == "per_device_train_batch_size" and value == AUTO:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or (value < 1 and value != -1):
            raise Refusal(f"train.{key} must be a whole number of at least 1, got {value!r}")
    return theirs, Extras(**ours)


def make_arguments(
    fields: dict[str, Any],
    extras: Extras,
    directory: Path,
    learning_rate: float,
    metric: str,
    greater: bool,
    batch_size: int,
) -> transformers.TrainingArguments:
    """Return TrainingArguments with our defaults under the user's fields.

    Args:
        fields: the user's.
        extras: ours.
        directory: of the checkpoints.
        learning_rate: the method's default.
        metric: the score that the best checkpoint has.
        greater: whether more of it is better.
        batch_size: rows per step and device, where the user asks for "auto".

    Raises:
        Refusal: a value is wrong.
    """
    values: dict[str, Any] = {
        "learning_rate": learning_rate,
        "num_train_epochs": 3,
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 32,
        "lr_scheduler_type": "linear",
        "weight_decay": 0.01,
        "eval_strategy": "epoch",
        "save_strategy": "epoch",
        "save_total_limit": 2,
        "logging_steps": 1,
        "report_to": "none",
        "seed": 0,
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
    if values["per_device_train_batch_size"] == AUTO:
        values["per_device_train_batch_size"] = batch_size
    if extras.warmup_ratio is not None:
        values["warmup_steps"] = extras.warmup_ratio
    if not torch.cuda.is_available():
        values.setdefault("dataloader_pin_memory", False)
    if extras.early_stopping_patience is not None:
        values["load_best_model_at_end"] = True
        values["save_strategy"] = values["eval_strategy"]
        values.setdefault("save_steps", values.get("eval_steps"))
        values = {key: value for key, value in values.items() if value is not None}
    if values.get("gradient_checkpointing"):
        values.setdefault("gradient_checkpointing_kwargs", {"use_reentrant": False})
    try:
        return transformers.TrainingArguments(**values)
    except (TypeError, ValueError, ImportError) as error:
        raise Refusal(f"train: {' '.join(str(error).split())}") from error
