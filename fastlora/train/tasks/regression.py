"""Sequence regression: one number per text, or per pair of texts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import nn

from fastlora.train.data.rows import BadRow, Row
from fastlora.train.models import Loaded
from fastlora.train.refusal import Refusal
from fastlora.train.tasks.base import Evaluation, Example, batches
from fastlora.train.tasks.text import PairTask


class Regression(PairTask):
    """Give each text a number; scores are mean squared and absolute error and R squared."""

    name = "regression"

    def load(self, quantize: str | None, widen: str | None) -> Loaded:
        """Return the model with a final layer for one number."""
        return self.load_head(quantize, widen, outputs=1, problem_type="regression")

    def examples(self, row: Row, train: bool) -> list[Example]:
        """Return the text's tokens and its number."""
        value = row.values.get(self.columns["label"])
        try:
            number = float(value)  # type: ignore[arg-type]
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise BadRow(f"{self.columns['label']!r} must be a finite number, got {value!r}")
        return [{**self.tokens(row), "label": number}]

    def evaluate(
        self, model: nn.Module, examples: Sequence[Example], batch_size: int
    ) -> Evaluation:
        """Return the errors; loss is the mean squared one.

        Raises:
            Refusal: the model's numbers are not finite.
        """
        from sklearn.metrics import mean_absolute_error, mean_squared_error, r2_score

        truth, given = [], []
        for _, inputs, outputs in batches(self, model, examples, batch_size):
            truth += inputs["labels"].tolist()
            given += outputs.logits.float().view(-1).tolist()
        wrong = sum(not math.isfinite(value) for value in given)
        if wrong:
            raise Refusal(
                f"the model must give finite numbers, but for {wrong} of {len(given)} rows it gives"
                " NaN or infinity, as weights do that diverged; lower train.learning_rate, or take"
                " another checkpoint"
            )
        squared = float(mean_squared_error(truth, given))
        found = {"loss": squared, "mse": squared, "mae": float(mean_absolute_error(truth, given))}
        if len(truth) > 1:
            found["r2"] = float(r2_score(truth, given))
        return Evaluation(found)

    def ask(self, row: Row) -> Example:
        """Return the text's tokens."""
        return {**self.tokens(row), "label": 0.0}

    def predict(self, model: nn.Module, asked: Sequence[Any], batch_size: int) -> list[Any]:
        """Return each text's number."""
        found: list[Any] = [None] * len(asked)
        for chosen, _, outputs in batches(self, model, asked, batch_size):
            for index, value in zip(chosen, outputs.logits.float().view(-1).tolist(), strict=True):
                found[index] = {"value": value}
        return found


TASK = Regression
