"""What language models have in common: next-token loss, packing, perplexity, sampling."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import nn

from fastlora.train.data.rows import BadRow
from fastlora.train.models import Loaded, check_causal, load_model
from fastlora.train.scores import perplexity
from fastlora.train.tasks.base import Evaluation, Example, batches
from fastlora.train.tasks.text import IGNORED, TextTask, ends_of, pad_right

SAMPLE_TOKENS = 64  # of the few answers that a report shows


class LanguageTask(TextTask):
    """A task of a causal language model; its examples have input_ids and labels.

    Attributes:
        output: what the text that is written is called in predictions.
    """

    task_type = "CAUSAL_LM"
    output: ClassVar[str] = "text"

    def load(self, quantize: str | None, widen: str | None) -> Loaded:
        """Return the model with its own output layer.

        Raises:
            Refusal: it can't be loaded, or sees the tokens that it should predict.
        """
        loaded = load_model(
            self.config.model,
            "AutoModelForCausalLM",
            quantize=quantize,
            widen=widen,
            seed=self.config.seed,
        )
        check_causal(loaded.model, self.config.model)
        return loaded

    def group(self, examples: list[Example]) -> list[Example]:
        """Return examples packed into rows of max_length tokens, where data.packing asks for it."""
        return pack(examples, self.max_length) if self.config.data.packing else examples

    def audit(self, examples: Sequence[Example]) -> dict[str, Any]:
        """Return in what share of the rows the end of text is learnt, and some label at all."""
        end, count = self.tokenizer.eos_token_id, max(len(examples), 1)
        learnt = sum(any(label != IGNORED for label in e["labels"][1:]) for e in examples)
        ended = sum(end in e["labels"][1:] for e in examples)
        return {"rows_with_labels": learnt / count, "end_of_text_in_loss": ended / count}

    def collate(self, examples: Sequence[Example]) -> dict[str, Any]:
        """Return padded tokens and labels; packed rows have positions instead of a mask."""
        fill = {"input_ids": self.tokenizer.pad_token_id or 0, "labels": IGNORED}
        if "position_ids" in examples[0]:
            return pad_right(examples, ["input_ids", "labels", "position_ids"], fill)
        rows = [{**e, "attention_mask": [1] * len(e["input_ids"])} for e in examples]
        return pad_right(rows, ["input_ids", "labels", "attention_mask"], fill)

    def tokens_of(self, batch: dict[str, Any]) -> int:
        """Return the tokens without padding."""
        mask = batch.get("attention_mask")
        return int(batch["input_ids"].numel() if mask is None else mask.sum())

    def evaluate(
        self, model: nn.Module, examples: Sequence[Example], batch_size: int
    ) -> Evaluation:
        """Return the loss per learnt token and its exponential; a few samples beside."""
        total, count = 0.0, 0
        for _, inputs, outputs in batches(self, model, examples, batch_size):
            learnt = int((inputs["labels"][:, 1:] != IGNORED).sum())
            total, count = total + float(outputs.loss) * learnt, count + learnt
        loss = total / max(count, 1)
        return Evaluation(
            {"loss": loss, "perplexity": perplexity(loss)},
            samples=self.samples(model, examples[:3]),
        )

    def samples(self, model: nn.Module, examples: Sequence[Example]) -> list[tuple[str, str, str]]:
        """Return (prompt, text, continuation) of a few examples, decoded greedily."""
        found = []
        for example in examples:
            ids, labels = example["input_ids"], example["labels"]
            first = next((i for i, label in enumerate(labels) if label != IGNORED), 0)
            cut = first if first > 1 else max(1, len(ids) // 2)
            tokens = min(self.new_tokens or SAMPLE_TOKENS, SAMPLE_TOKENS)
            text, short = self.write(model, ids[:cut], tokens)
            prompt, truth = (
                self.tokenizer.decode(part, skip_special_tokens=True)
                for part in (ids[:cut], ids[cut:])
            )
            found.append((prompt[-400:], truth[:400], f"{text} ..." if short else text))
        return found

    def predict(self, model: nn.Module, asked: Sequence[Any], batch_size: int) -> list[Any]:
        """Return the text that the model writes after each row's tokens, and whether it was cut."""
        assert self.new_tokens is not None
        found = [self.write(model, ids, self.new_tokens) for ids in asked]
        return [{self.output: text, "cut": short} for text, short in found]

    def write(self, model: Any, ids: list[int], tokens: int) -> tuple[str, bool]:
        """Return the text that a model writes after these tokens, and whether it was cut."""
        given = self._generate(model, ids, tokens)
        text: str = self.tokenizer.decode(given, skip_special_tokens=True)
        return text, not ends_of(self.tokenizer, model) & set(given)

    def with_room(self, ids: list[int]) -> list[int]:
        """Return the tokens of a prompt.

        Raises:
            BadRow: the model has no place for more.
        """
        if len(ids) >= self.places:
            raise BadRow(
                f"the prompt must leave room in the model's {self.places} tokens, but it has"
                f" {len(ids)}; shorten it"
            )
        return ids

    def _generate(self, model: Any, ids: list[int], tokens: int) -> list[int]:
        """Return the likeliest tokens after these."""
        device = next(model.parameters()).device
        tokens = max(1, min(tokens, self.places - len(ids)))
        was_training, cached = model.training, model.config.use_cache
        model.eval()
        model.config.use_cache = True
        prompt = torch.tensor([ids], device=device)
        try:
            with torch.no_grad():
                out = model.generate(
                    input_ids=prompt,
                    attention_mask=torch.ones_like(prompt),
                    do_sample=False,
                    max_new_tokens=tokens,
                    pad_token_id=self.tokenizer.pad_token_id,
                )
        finally:
            model.train(was_training)
            model.config.use_cache = cached
        answer: list[int] = out[0, len(ids) :].tolist()
        return answer


def pack(examples: Sequence[Example], length: int) -> list[Example]:
    """Return rows of up to `length` tokens that hold whole examples, the longest placed first.

    Positions start anew with each example, so that attention stays within it.
    """
    rows: list[Example] = []
    room: list[int] = []
    for example in sorted(examples, key=lambda e: -len(e["input_ids"])):
        size = len(example["input_ids"])
        index = next((i for i, free in enumerate(room) if free >= size), None)
        if index is None:
            rows.append({"input_ids": [], "labels": [], "position_ids": [], "place": ""})
            room.append(length)
            index = len(rows) - 1
        row = rows[index]
        room[index] -= size
        row["input_ids"] += example["input_ids"]
        row["labels"] += [IGNORED, *example["labels"][1:]]  # nothing is learnt across a border
        row["position_ids"] += list(range(size))
        row["place"] = ", ".join(part for part in (row["place"], example.get("place", "")) if part)
    return rows
