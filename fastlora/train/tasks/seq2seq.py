"""Sequence to sequence: translation, summarisation, and any other text from a text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from fastlora.train.data.rows import Row
from fastlora.train.models import Loaded, load_model
from fastlora.train.scores import perplexity
from fastlora.train.spans import overlap
from fastlora.train.tasks.base import Evaluation, Example, batches
from fastlora.train.tasks.text import IGNORED, TextTask, pad_right

SCORED = 64  # rows whose outputs are generated for exact match and overlap
NEW_TOKENS = 64


class Seq2Seq(TextTask):
    """Write the target text for the source text, with an encoder and a decoder."""

    name = "seq2seq"
    required = ("source", "target")
    targets = ("target",)
    task_type = "SEQ_2_SEQ_LM"

    def inputs_of(self, row: Row) -> Any:
        """Return the source."""
        return row.values.get(self.columns["source"])

    def load(self, quantize: str | None, widen: str | None) -> Loaded:
        """Return the model with its own output layer."""
        return load_model(
            self.config.model,
            "AutoModelForSeq2SeqLM",
            quantize=quantize,
            widen=widen,
            seed=self.config.seed,
        )

    def examples(self, row: Row, train: bool) -> list[Example]:
        """Return the tokens of source and target."""
        source, target = self.text(row, "source"), self.text(row, "target")
        labels = self.tokenizer(text_target=target, verbose=False)["input_ids"]
        inputs = self.encode(source)
        if len(labels) > self.max_length:
            self.long += 1
            labels = labels[: self.max_length]
        return [{**inputs, "labels": labels, "source": source, "target": target}]

    def collate(self, examples: Sequence[Example]) -> dict[str, Any]:
        """Return padded tokens and labels; the model shifts the labels itself."""
        return {**self.pad(examples), **pad_right(examples, ["labels"], {"labels": IGNORED})}

    def evaluate(
        self, model: nn.Module, examples: Sequence[Example], batch_size: int
    ) -> Evaluation:
        """Return the loss per token, and exact match and word F1 of generated outputs."""
        total, count = 0.0, 0
        for _, inputs, outputs in batches(self, model, examples, batch_size):
            learnt = int((inputs["labels"] != IGNORED).sum())
            total, count = total + float(outputs.loss) * learnt, count + learnt
        loss = total / max(count, 1)
        chosen = list(examples[:SCORED])
        written = self._write(model, [e["source"] for e in chosen], batch_size)
        pairs = list(zip((e["target"] for e in chosen), written, strict=True))
        found = {
            "loss": loss,
            "perplexity": perplexity(loss),
            "exact_match": sum(t.strip() == w.strip() for t, w in pairs) / max(len(pairs), 1),
            "f1": sum(overlap(t, w) for t, w in pairs) / max(len(pairs), 1),
        }
        samples = [(e["source"][:300], t, w) for e, (t, w) in zip(chosen[:5], pairs, strict=False)]
        return Evaluation(found, samples=samples)

    def _write(self, model: Any, sources: Sequence[str], batch_size: int) -> list[str]:
        found: list[str] = []
        device = next(model.parameters()).device
        was_training, cached = model.training, model.config.use_cache
        model.eval()
        model.config.use_cache = True
        try:
            for start in range(0, len(sources), batch_size):
                rows = [self.encode(text) for text in sources[start : start + batch_size]]
                inputs = {key: value.to(device) for key, value in self.pad(rows).items()}
                with torch.no_grad():
                    out = model.generate(
                        **inputs, max_new_tokens=NEW_TOKENS, do_sample=False, num_beams=1
                    )
                found += self.tokenizer.batch_decode(out, skip_special_tokens=True)
        finally:
            model.train(was_training)
            model.config.use_cache = cached
        return found

    def predict(self, model: nn.Module, rows: Sequence[Row], batch_size: int) -> list[Any]:
        """Return the text for each source."""
        sources = [self.text(row, "source") for row in rows]
        return [{"text": text} for text in self._write(model, sources, batch_size)]


TASK = Seq2Seq
