"""How well an encoder still fills in masked words, with the output layer of its pre-training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from fastlora.train.data.rows import Row
from fastlora.train.models import load_model
from fastlora.train.refusal import Refusal
from fastlora.train.scores import perplexity
from fastlora.train.tasks.base import Evaluation, Example, batches
from fastlora.train.tasks.causal_lm import CausalLM
from fastlora.train.tasks.text import IGNORED

EVERY = 7  # one token of so many is masked, about as many as in pre-training


class MaskedText(CausalLM):
    """Scores the pre-trained body of a model on masked words of plain text.

    Attributes:
        whole: the pre-trained model with its own output layer; its body is exchanged.
    """

    def take(self, base: Any) -> None:
        """Load the output layer of the pre-training.

        Args:
            base: the model of the run, as it was loaded.

        Raises:
            Refusal: there is none, or the tokenizer masks nothing.
        """
        name = self.config.model
        loaded = load_model(name, "AutoModelForMaskedLM", quantize=None, widen=None)
        if loaded.fresh or not hasattr(base, loaded.model.base_model_prefix):
            raise Refusal(
                "data.retain measures an encoder by the masked words of its pre-training, but"
                f" {name} does not have the layer for them; leave it out"
            )
        if self.tokenizer.mask_token_id is None or not self.tokenizer.is_fast:
            raise Refusal(
                f"data.retain needs a fast tokenizer with a mask token, but {name} has none;"
                " leave it out"
            )
        self.whole: Any = loaded.model.to(base.get_input_embeddings().weight.dtype)

    def examples(self, row: Row, train: bool) -> list[Example]:
        """Return the windows of a text; every seventh token is masked and asked for."""
        found = self.tokenizer(
            self.text(row, "text"),
            truncation=True,
            max_length=self.max_length,
            return_overflowing_tokens=True,
            return_special_tokens_mask=True,
            verbose=False,
        )
        windows = zip(found["input_ids"], found["special_tokens_mask"], strict=True)
        return [self._masked(ids, special) for ids, special in windows if not all(special)]

    def _masked(self, ids: list[int], special: list[int]) -> Example:
        words = [place for place, is_special in enumerate(special) if not is_special]
        asked = set(words[EVERY // 2 :: EVERY] or words[:1])
        mask = self.tokenizer.mask_token_id
        return {
            "input_ids": [mask if i in asked else token for i, token in enumerate(ids)],
            "labels": [token if i in asked else IGNORED for i, token in enumerate(ids)],
        }

    def evaluate(
        self, model: nn.Module, examples: Sequence[Example], batch_size: int
    ) -> Evaluation:
        """Return the loss per masked token and its exponential, of the model's body."""
        name = self.whole.base_model_prefix
        setattr(self.whole, name, module_of(model, name))
        total, count = 0.0, 0
        for _, inputs, outputs in batches(self, self.whole, examples, batch_size):
            asked = int((inputs["labels"] != IGNORED).sum())
            total, count = total + float(outputs.loss) * asked, count + asked
        loss = total / max(count, 1)
        return Evaluation({"loss": loss, "perplexity": perplexity(loss)})


def module_of(model: nn.Module, body: str) -> nn.Module:
    """Return the module of this name in a model, whatever wraps it."""
    named: Iterator[tuple[str, nn.Module]] = model.named_modules()
    return next(module for name, module in named if f".{name}".endswith(f".{body}"))
