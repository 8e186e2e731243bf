"""Sequence to sequence: translation, summarisation, and any other text from a text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from fastlora.train.data.rows import Row
from fastlora.train.models import Loaded, load_model
from fastlora.train.scores import perplexity
from fastlora.train.spans import overlap
from fastlora.train.tasks.base import Evaluation, Example, batches, to_device
from fastlora.train.tasks.text import IGNORED, TextTask, ends_of, pad_right

SCORED = 256  # rows whose outputs are generated for exact match and overlap, at most


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
        chosen = spread(examples, SCORED)
        written = self._write(model, chosen, batch_size)
        pairs = [(e["target"], text) for e, (text, _) in zip(chosen, written, strict=True)]
        found = {
            "loss": loss,
            "perplexity": perplexity(loss),
            "exact_match": sum(t.strip() == w.strip() for t, w in pairs) / max(len(pairs), 1),
            "f1": sum(overlap(t, w) for t, w in pairs) / max(len(pairs), 1),
        }
        samples = [(e["source"][:300], t, w) for e, (t, w) in zip(chosen[:5], pairs, strict=False)]
        cut = sum(short for _, short in written)
        notes = [
            f"exact_match and f1 are of the outputs for {len(chosen)} of {len(examples)} rows, of"
            f" which {cut} were cut at {self.new_tokens} tokens (data.max_new_tokens)"
        ]
        return Evaluation(found, samples=samples, notes=notes)

    def measure(self, examples: Mapping[str, Sequence[Example]]) -> list[str]:
        """Let the model write as much as the longest target has; return that in words."""
        known = [*examples["train"], *examples["valid"]]
        return self.limit_output(max(len(example["labels"]) for example in known))

    def _write(
        self, model: Any, examples: Sequence[Example], batch_size: int
    ) -> list[tuple[str, bool]]:
        """Return the text for each example, and whether it was cut."""
        found: list[tuple[str, bool]] = []
        device = next(model.parameters()).device
        was_training, cached = model.training, model.config.use_cache
        ends = ends_of(self.tokenizer, model)
        model.eval()
        model.config.use_cache = True
        try:
            for start in range(0, len(examples), batch_size):
                inputs = to_device(self.pad(examples[start : start + batch_size]), device)
                with torch.no_grad():
                    out = model.generate(
                        **inputs, max_new_tokens=self.new_tokens, do_sample=False, num_beams=1
                    )
                texts = self.tokenizer.batch_decode(out, skip_special_tokens=True)
                short = [not ends & set(row[1:]) for row in out.tolist()]
                found += zip(texts, short, strict=True)
        finally:
            model.train(was_training)
            model.config.use_cache = cached
        return found

    def ask(self, row: Row) -> Example:
        """Return the source's tokens."""
        return self.encode(self.text(row, "source"))

    def predict(self, model: nn.Module, asked: Sequence[Any], batch_size: int) -> list[Any]:
        """Return the text for each source, and whether it was cut."""
        found = self._write(model, asked, batch_size)
        return [{"text": text, "cut": short} for text, short in found]


def spread(examples: Sequence[Example], most: int) -> list[Example]:
    """Return at most so many examples, evenly spaced."""
    count = min(len(examples), most)
    return [examples[i * len(examples) // count] for i in range(count)]


TASK = Seq2Seq
