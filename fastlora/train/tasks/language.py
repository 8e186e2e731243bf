"""What language models have in common: next-token loss, packing, perplexity, sampling."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from fastlora.train.models import Loaded, load_model
from fastlora.train.scores import perplexity
from fastlora.train.tasks.base import Evaluation, Example, batches
from fastlora.train.tasks.text import IGNORED, TextTask, pad_right

SAMPLE_TOKENS = 64


class LanguageTask(TextTask):
    """A task of a causal language model; its examples have input_ids and labels."""

    task_type = "CAUSAL_LM"

    def load(self, quantize: str | None, widen: str | None) -> Loaded:
        """Return the model with its own output layer."""
        return load_model(
            self.config.model,
            "AutoModelForCausalLM",
            quantize=quantize,
            widen=widen,
            seed=self.config.seed,
        )

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
            given = self.generate(model, ids[:cut])
            texts = (ids[:cut], ids[cut:], given)
            prompt, truth, answer = (
                self.tokenizer.decode(part, skip_special_tokens=True) for part in texts
            )
            found.append((prompt[-400:], truth[:400], answer))
        return found

    def generate(self, model: Any, ids: list[int], tokens: int = SAMPLE_TOKENS) -> list[int]:
        """Return the likeliest tokens after these."""
        device = next(model.parameters()).device
        limit = getattr(model.config, "max_position_embeddings", 10**9)
        tokens = max(1, min(tokens, limit - len(ids)))
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

    def continue_text(self, model: Any, text: str, tokens: int) -> str:
        """Return what the model writes after a text."""
        ids = self.tokenizer(text)["input_ids"]
        if ids and ids[-1] == self.tokenizer.eos_token_id and len(ids) > 1:
            ids = ids[:-1]
        answer: str = self.tokenizer.decode(
            self.generate(model, ids, tokens), skip_special_tokens=True
        )
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
