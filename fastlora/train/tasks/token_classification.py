"""Token classification: a tag per word, as in named-entity recognition."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from fastlora.train import scores, spans
from fastlora.train.data.rows import BadRow, Row
from fastlora.train.models import Loaded, load_model
from fastlora.train.refusal import Refusal
from fastlora.train.tasks.base import Evaluation, Example, batches
from fastlora.train.tasks.labels import sort_classes
from fastlora.train.tasks.text import IGNORED, TextTask


class TokenClassification(TextTask):
    """Give each word a tag; a word's first token carries it, the others are not learnt."""

    name = "token-classification"
    required = ("tokens", "tags")
    targets = ("tags",)
    metric = "accuracy"
    greater = True
    task_type = "TOKEN_CLS"

    def inputs_of(self, row: Row) -> Any:
        """Return the words."""
        return row.values.get(self.columns["tokens"])

    def prepare(self) -> None:
        """Load the tokenizer, which must know where words end."""
        super().prepare()
        if not self.tokenizer.is_fast:
            raise Refusal(
                f"task {self.name} needs a fast tokenizer, but {self.config.model} has none"
            )

    def learn(self, rows: Sequence[Row]) -> None:
        """Take the tags of the training rows."""
        found = {tag for row in rows for tag in _texts(row.values.get(self.columns["tags"]))}
        if len(found) < 2:
            raise Refusal(f"the training rows must have at least 2 tags, got {sorted(found)}")
        self.classes = sort_classes(found)

    def check(self, rows: Sequence[Row], split: str) -> None:
        """Raise unless every tag was seen in training."""
        assert self.classes is not None
        for row in rows:
            for tag in _texts(row.values.get(self.columns["tags"])):
                if tag not in self.classes:
                    raise Refusal(
                        f"every tag of {split} must occur in train, but {row.place} has {tag!r}"
                    )

    def load(self, quantize: str | None, widen: str | None) -> Loaded:
        """Return the model with a final layer for the tags."""
        return load_model(
            self.config.model,
            "AutoModelForTokenClassification",
            quantize=quantize,
            widen=widen,
            seed=self.config.seed,
            classes=self.classes,
            pad_token_id=self.tokenizer.pad_token_id,
        )

    def _words(self, row: Row) -> list[str]:
        words = _texts(row.values.get(self.columns["tokens"]))
        if not words:
            raise BadRow(f"{self.columns['tokens']!r} must be a list of words, got none")
        return words

    def _inputs(self, words: list[str]) -> tuple[Example, list[int | None]]:
        found = self.tokenizer(words, is_split_into_words=True, verbose=False)
        if len(found["input_ids"]) > self.max_length:
            self.long += 1
            found = self.tokenizer(
                words, is_split_into_words=True, truncation=True, max_length=self.max_length
            )
        return dict(found), spans.first_tokens(found.word_ids())

    def examples(self, row: Row, train: bool) -> list[Example]:
        """Return the words' tokens and the tags of their first ones."""
        words, tags = self._words(row), _texts(row.values.get(self.columns["tags"]))
        if len(words) != len(tags):
            raise BadRow(
                f"there must be a tag for each word, got {len(words)} words, {len(tags)} tags"
            )
        assert self.classes is not None
        inputs, places = self._inputs(words)
        labels = [IGNORED if i is None else self.classes.index(tags[i]) for i in places]
        return [{**inputs, "labels": labels}]

    def collate(self, examples: Sequence[Example]) -> dict[str, Any]:
        """Return padded tokens, and labels (M, T)."""
        return self.pad(examples, ["labels"])

    def evaluate(
        self, model: nn.Module, examples: Sequence[Example], batch_size: int
    ) -> Evaluation:
        """Return the scores per word, and F1 of the entities where tags are B-, I- and O."""
        truth: list[int] = []
        given: list[int] = []
        entities = spans.EntityCounts()
        total = 0.0
        for chosen, inputs, outputs in batches(self, model, examples, batch_size):
            total += float(outputs.loss) * len(chosen)
            best = outputs.logits.argmax(-1)
            for labels, answers in zip(inputs["labels"], best, strict=True):
                kept = labels != IGNORED
                right, mine = labels[kept].tolist(), answers[kept].tolist()
                truth, given = truth + right, given + mine
                names = self.classes or []
                entities.add([names[k] for k in right], [names[k] for k in mine])
        assert self.classes is not None
        found = scores.class_scores(truth, given, self.classes, total / max(len(examples), 1))
        if any(name.startswith("B-") for name in self.classes):
            found.scores["entity_f1"] = entities.f1()
        return found

    def ask(self, row: Row) -> Example:
        """Return the words' tokens, which of them begin a word, and how many words there are."""
        words = self._words(row)
        inputs, places = self._inputs(words)
        ignored = [IGNORED] * len(places)
        return {**inputs, "labels": ignored, "places": places, "words": len(words)}

    def predict(self, model: nn.Module, asked: Sequence[Any], batch_size: int) -> list[Any]:
        """Return each row's tags, one per word; None for words that were cut off."""
        found: list[Any] = [None] * len(asked)
        assert self.classes is not None
        for chosen, _, outputs in batches(self, model, asked, batch_size):
            for index, best in zip(chosen, outputs.logits.argmax(-1).tolist(), strict=True):
                tags: list[str | None] = [None] * asked[index]["words"]
                for place, word in enumerate(asked[index]["places"]):
                    if word is not None:
                        tags[word] = self.classes[best[place]]
                found[index] = {"tags": tags}
        return found


def _texts(value: Any) -> list[str]:
    if isinstance(value, str):
        return value.split()
    return [str(part) for part in value] if isinstance(value, list | tuple) else []


TASK = TokenClassification
