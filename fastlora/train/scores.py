"""Scores of a model, by scikit-learn."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import nn

from fastlora.train.tasks.base import Evaluation, Example, batches


def evaluate_classes(
    task: Any, model: nn.Module, examples: Sequence[Example], batch_size: int
) -> Evaluation:
    """Return the scores of a task that gives each example one of `task.classes`."""
    truth, given, total = [], [], 0.0
    for chosen, inputs, outputs in batches(task, model, examples, batch_size):
        total += float(outputs.loss) * len(chosen)
        truth += inputs["labels"].tolist()
        given += outputs.logits.argmax(-1).tolist()
    return class_scores(truth, given, task.classes, total / max(len(examples), 1))


def class_scores(truth: list[int], given: list[int], classes: list[str], loss: float) -> Evaluation:
    """Return accuracy, macro F1 and loss, and the confusion matrix."""
    from sklearn.metrics import accuracy_score, confusion_matrix, f1_score

    numbers = list(range(len(classes)))
    return Evaluation(
        {
            "accuracy": float(accuracy_score(truth, given)),
            "macro_f1": float(f1_score(truth, given, average="macro", zero_division=0.0)),
            "loss": loss,
        },
        confusion_matrix(truth, given, labels=numbers).tolist(),
        list(classes),
    )


def perplexity(loss: float) -> float:
    """Return e to the loss, infinity where that overflows."""
    return math.exp(loss) if loss < 700 else math.inf
