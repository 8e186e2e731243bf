"""What a task is: its model, its examples, its scores."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fastlora.train.config import RunConfig
from fastlora.train.data.columns import check_columns, find_columns
from fastlora.train.data.rows import Row
from fastlora.train.models import Loaded

Example = dict[str, Any]


@dataclass
class Evaluation:
    """What a model scored.

    Attributes:
        scores: name -> value; losses are in nats.
        confusion: counts, rows are the truth, columns the prediction; None: not a classification.
        classes: names of the rows and columns.
        samples: (input, expected, given) of a few examples.
        notes: what else is to be known of the scores.
    """

    scores: dict[str, float]
    confusion: list[list[int]] | None = None
    classes: list[str] = field(default_factory=list)
    samples: list[tuple[str, str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


class Task(ABC):
    """One kind of task. A file of this folder that has a `TASK` is one.

    Attributes:
        name: as in `RunConfig.task`.
        required: roles of the columns that it needs.
        optional: roles of columns that it can use.
        targets: those of them that hold the answer, which `predict` does not read.
        sparse: roles of columns that other rows than the training ones may lack.
        metric: the score that the best checkpoint has.
        greater: whether more of it is better.
        task_type: PEFT's name of it.
        vision: whether its inputs are images.
        columns: role -> column, once `learn` was called.
        classes: names of its classes, once `learn` was called; None: it has none.
        long: examples that were cut at max_length, since it was last set to 0.
        new_tokens: the most that the model writes, once it is known; None: it writes no text.
    """

    name: ClassVar[str]
    required: ClassVar[tuple[str, ...]]
    optional: ClassVar[tuple[str, ...]] = ()
    targets: ClassVar[tuple[str, ...]] = ()
    sparse: ClassVar[tuple[str, ...]] = ()
    metric: ClassVar[str] = "loss"
    greater: ClassVar[bool] = False
    task_type: ClassVar[str]
    vision: ClassVar[bool] = False

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.columns: dict[str, str] = {}
        self.classes: list[str] | None = None
        self.long = 0
        self.new_tokens: int | None = None

    def find_columns(self, columns: Sequence[str]) -> dict[str, str]:
        """Return role -> column of training rows with these columns.

        Raises:
            Refusal: one is missing.
        """
        return find_columns(self.config.data, columns, self.required, self.optional)

    def needed_columns(self, predict: bool = False) -> list[str]:
        """Return the learnt columns that other rows must have; `predict` leaves the answer out."""
        left_out = (*self.sparse, *(self.targets if predict else ()))
        return [name for role, name in self.columns.items() if role not in left_out]

    def columns_in(self, columns: Sequence[str], source: str, predict: bool) -> dict[str, str]:
        """Return role -> column of rows that are scored or answered after training.

        Args:
            columns: what they have.
            source: what to call them in an error.
            predict: whether they may lack the answer.

        Raises:
            Refusal: a column that was learnt is missing.
        """
        check_columns(self.needed_columns(predict), columns, source)
        return {role: name for role, name in self.columns.items() if name in columns}

    def notes(self) -> list[str]:
        """Return what was recognised in the data without a word from the user."""
        return [f"columns: {', '.join(f'{role} = {name}' for role, name in self.columns.items())}"]

    def label_of(self, row: Row) -> str | None:
        """Return a row's class, for counts and for a split that keeps the shares; None: none."""
        return None

    def inputs_of(self, row: Row) -> Any:
        """Return what the model is given of a row, without the answer."""
        return row.values

    @abstractmethod
    def prepare(self) -> None:
        """Load the tokenizer or image processor.

        Raises:
            Refusal: there is none.
        """

    def learn(self, rows: Sequence[Row]) -> None:  # noqa: B027 - most tasks have no classes
        """Find the classes in the training rows.

        Raises:
            Refusal: there are too few.
        """

    def check(self, rows: Sequence[Row], split: str) -> None:  # noqa: B027 - as above
        """Raise unless another split fits what was learnt.

        Raises:
            Refusal: a label that the training rows do not have.
        """

    @abstractmethod
    def load(self, quantize: str | None, widen: str | None) -> Loaded:
        """Return the pre-trained model with this task's final layer."""

    @abstractmethod
    def examples(self, row: Row, train: bool) -> list[Example]:
        """Return what a row is for the model; more than one where it is long.

        Raises:
            BadRow: it can't be used.
        """

    @abstractmethod
    def collate(self, examples: Sequence[Example]) -> dict[str, Any]:
        """Return a batch for the model, labels included."""

    @abstractmethod
    def evaluate(
        self, model: nn.Module, examples: Sequence[Example], batch_size: int
    ) -> Evaluation:
        """Return the scores on examples, computed batch by batch without keeping logits."""

    @abstractmethod
    def ask(self, row: Row) -> Any:
        """Return what `predict` takes of a row, which need not have an answer.

        Raises:
            BadRow: it can't be used.
        """

    @abstractmethod
    def predict(self, model: nn.Module, asked: Sequence[Any], batch_size: int) -> list[Any]:
        """Return one answer, JSON-serialisable, for each of what `ask` returned."""

    def halves(self, row: Row, fraction: float) -> tuple[Row, Row] | None:
        """Return the only training row as one to learn from and one of this share to hold out.

        None: it can't be divided.
        """
        return None

    def measure(self, examples: Mapping[str, Sequence[Example]]) -> list[str]:
        """Learn from the examples, by split, how much the model is to write; return it in words."""
        return []

    def group(self, examples: list[Example]) -> list[Example]:
        """Return training examples as they are batched; a language model packs them."""
        return examples

    def audit(self, examples: Sequence[Example]) -> dict[str, Any]:
        """Return what is to be known of the training examples before the first step."""
        return {}

    def tokens_of(self, batch: dict[str, Any]) -> int:
        """Return how many tokens, patches or images a batch has, padding left out."""
        mask = batch.get("attention_mask")
        return int(mask.sum()) if mask is not None else len(batch["labels"])

    def save(self, directory: Any) -> None:  # noqa: B027 - a task may need nothing
        """Write what `predict` needs beside the model: tokenizer or image processor."""


def batches(task: Task, model: nn.Module, examples: Sequence[Example], batch_size: int) -> Any:
    """Yield (examples, inputs, outputs) of a model in inference, batch by batch.

    Examples of like length go together, so that little is padded; the order is not the given one.
    """
    device = next(model.parameters()).device
    order = sorted(range(len(examples)), key=lambda i: -len(examples[i].get("input_ids", ())))
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            for start in range(0, len(order), batch_size):
                chosen = order[start : start + batch_size]
                inputs = to_device(task.collate([examples[i] for i in chosen]), device)
                yield chosen, inputs, model(**inputs)
    finally:
        model.train(was_training)


def to_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Return a batch with its tensors on a device."""
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
