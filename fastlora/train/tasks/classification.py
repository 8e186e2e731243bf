"""Sequence classification: one class per text, or per pair of texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from fastlora.train import scores
from fastlora.train.data.rows import BadRow, Row
from fastlora.train.models import Loaded, load_model
from fastlora.train.tasks.base import Evaluation, Example, batches
from fastlora.train.tasks.labels import ClassLabels
from fastlora.train.tasks.text import TextTask


class Classification(ClassLabels, TextTask):
    """Give each text one of the classes that the training rows have."""

    name = "classification"
    required = ("text", "label")
    targets = ("label",)
    optional = ("text_pair",)
    metric = "accuracy"
    greater = True
    task_type = "SEQ_CLS"

    def inputs_of(self, row: Row) -> Any:
        """Return the text and its pair."""
        return [row.values.get(self.columns.get(r, "")) for r in ("text", "text_pair")]

    def load(self, quantize: str | None, wide: bool) -> Loaded:
        """Return the model with a final layer for the classes."""
        return load_model(
            self.config.model,
            "AutoModelForSequenceClassification",
            quantize=quantize,
            wide=wide,
            seed=self.config.seed,
            classes=self.classes,
            pad_token_id=self.tokenizer.pad_token_id,
            problem_type="single_label_classification",
        )

    def examples(self, row: Row, train: bool) -> list[Example]:
        """Return the text's tokens and the number of its class."""
        pair = self.text(row, "text_pair") if "text_pair" in self.columns else None
        return [{**self.encode(self.text(row, "text"), pair), "label": self.number_of(row)}]

    def collate(self, examples: Sequence[Example]) -> dict[str, Any]:
        """Return padded tokens, and labels (M,)."""
        return {**self.pad(examples), "labels": torch.tensor([e["label"] for e in examples])}

    def evaluate(
        self, model: nn.Module, examples: Sequence[Example], batch_size: int
    ) -> Evaluation:
        """Return accuracy, macro F1 and loss, and the confusion matrix."""
        return scores.evaluate_classes(self, model, examples, batch_size)

    def predict(self, model: nn.Module, rows: Sequence[Row], batch_size: int) -> list[Any]:
        """Return each text's class with its probability."""
        examples: list[Example] = []
        for row in rows:
            pair = self.text(row, "text_pair") if "text_pair" in self.columns else None
            examples.append({**self.encode(self.text(row, "text"), pair), "label": 0})
        return predict_classes(self, model, examples, batch_size)


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
__all__ = ["TASK", "BadRow", "Classification", "predict_classes"]
