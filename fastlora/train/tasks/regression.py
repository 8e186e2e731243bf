"""Sequence regression: one number per text, or per pair of texts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from fastlora.train.data.rows import BadRow, Row
from fastlora.train.models import Loaded, load_model
from fastlora.train.tasks.base import Evaluation, Example, batches
from fastlora.train.tasks.text import TextTask


class Regression(TextTask):
    """Give each text a number; scores are mean squared and absolute error and R squared."""

    name = "regression"
    required = ("text", "label")
    targets = ("label",)
    optional = ("text_pair",)
    task_type = "SEQ_CLS"

    def inputs_of(self, row: Row) -> Any:
        """Return the text and its pair."""
        return [row.values.get(self.columns.get(r, "")) for r in ("text", "text_pair")]

    def load(self, quantize: str | None, wide: bool) -> Loaded:
        """Return the model with a final layer for one number."""
        return load_model(
            self.config.model,
            "AutoModelForSequenceClassification",
            quantize=quantize,
            wide=wide,
            seed=self.config.seed,
            outputs=1,
            pad_token_id=self.tokenizer.pad_token_id,
            problem_type="regression",
        )

    def _inputs(self, row: Row) -> Example:
        pair = self.text(row, "text_pair") if "text_pair" in self.columns else None
        return self.encode(self.text(row, "text"), pair)

    def examples(self, row: Row, train: bool) -> list[Example]:
        """Return the text's tokens and its number."""
        value = row.values.get(self.columns["label"])
        try:
            number = float(value)  # type: ignore[arg-type]
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise BadRow(f"{self.columns['label']!r} must be a finite number, got {value!r}")
        return [{**self._inputs(row), "label": number}]

    def collate(self, examples: Sequence[Example]) -> dict[str, Any]:
        """Return padded tokens, and labels (M,) float32."""
        return {**self.pad(examples), "labels": torch.tensor([e["label"] for e in examples])}

    def evaluate(
        self, model: nn.Module, examples: Sequence[Example], batch_size: int
    ) -> Evaluation:
        """Return the errors; loss is the mean squared one."""
        from sklearn.metrics import mean_absolute_error, mean_squared_error, r2_score

        truth, given = [], []
        for _, inputs, outputs in batches(self, model, examples, batch_size):
            truth += inputs["labels"].tolist()
            given += outputs.logits.float().view(-1).tolist()
        squared = float(mean_squared_error(truth, given))
        found = {"loss": squared, "mse": squared, "mae": float(mean_absolute_error(truth, given))}
        if len(truth) > 1:
            found["r2"] = float(r2_score(truth, given))
        return Evaluation(found)

    def predict(self, model: nn.Module, rows: Sequence[Row], batch_size: int) -> list[Any]:
        """Return each text's number."""
        examples = [{**self._inputs(row), "label": 0.0} for row in rows]
        found: list[Any] = [None] * len(rows)
        for chosen, _, outputs in batches(self, model, examples, batch_size):
            for index, value in zip(chosen, outputs.logits.float().view(-1).tolist(), strict=True):
                found[index] = {"value": value}
        return found


TASK = Regression
