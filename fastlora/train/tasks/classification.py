"""Sequence classification: one class per text, or per pair of texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from fastlora.train import scores
from fastlora.train.data.rows import Row
from fastlora.train.models import Loaded
from fastlora.train.tasks.base import Evaluation, Example, batches
from fastlora.train.tasks.labels import ClassLabels
from fastlora.train.tasks.text import PairTask


class Classification(ClassLabels, PairTask):
    """Give each text one of the classes that the training rows have."""

    name = "classification"
    metric = "accuracy"
    greater = True

    def load(self, quantize: str | None, widen: str | None) -> Loaded:
        """Return the model with a final layer for the classes."""
        return self.load_head(
            quantize, widen, classes=self.classes, problem_type="single_label_classification"
        )

    def examples(self, row: Row, train: bool) -> list[Example]:
        """Return the text's tokens and the number of its class."""
        return [{**self.tokens(row), "label": self.number_of(row)}]

    def evaluate(
        self, model: nn.Module, examples: Sequence[Example], batch_size: int
    ) -> Evaluation:
        """Return accuracy, macro F1 and loss, and the confusion matrix."""
        return scores.evaluate_classes(self, model, examples, batch_size)

    def ask(self, row: Row) -> Example:
        """Return the text's tokens."""
        return {**self.tokens(row), "label": 0}

    def predict(self, model: nn.Module, asked: Sequence[Any], batch_size: int) -> list[Any]:
        """Return each text's class with its probability."""
        return predict_classes(self, model, asked, batch_size)


def predict_classes(
    task: Any, model: nn.Module, examples: Sequence[Example], batch_size: int
) -> list[Any]:
    """Return the likeliest class of each example with its probability."""
    found: list[Any] = [None] * len(examples)
    for chosen, _, outputs in batches(task, model, examples, batch_size):
        shares = outputs.logits.float().softmax(-1)
        best = shares.argmax(-1)
        for i, index in enumerate(chosen):
            k = int(best[i])
            found[index] = {"label": task.classes[k], "probability": float(shares[i, k])}
    return found


TASK = Classification
