"""What tasks on text have in common: a tokenizer, and batches that are padded on the right."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from fastlora.train.data.rows import BadRow, Row
from fastlora.train.models import Loaded, load_model, place_of, places_of
from fastlora.train.refusal import Refusal
from fastlora.train.strategies import strategy
from fastlora.train.tasks.base import Example, Task

IGNORED = -100
"""The label of what is not learnt."""
SHORTEST = 64
"""What a model may write at least, where the user does not say."""
_NO_LIMIT = 10**9


class TextTask(Task):
    """A task whose inputs are text.

    Attributes:
        tokenizer: the model's.
        max_length: tokens of an example at most.
        places: tokens that the model has places for, virtual ones left out.
    """

    def prepare(self) -> None:
        """Load the tokenizer."""
        name = self.config.model
        if name.startswith("timm:"):
            raise Refusal(f"the model must read text for task {self.name}, but {name} sees images")
        try:
            self.tokenizer: Any = transformers.AutoTokenizer.from_pretrained(place_of(name))
            config = transformers.AutoConfig.from_pretrained(place_of(name))
        except (OSError, ValueError, KeyError) as error:
            said = " ".join(str(error).split())[:300]
            raise Refusal(f"the model {name} must have a tokenizer, but: {said}") from error
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token or self.tokenizer.unk_token
        self._limit(config)

    def _limit(self, config: Any) -> None:
        """Find how many tokens the model takes.

        Raises:
            Refusal: the virtual tokens of the method leave no place for others.
        """
        virtual = strategy(self.config.method)(self.config.adapter).virtual_tokens
        self.places = (places_of(config) or _NO_LIMIT) - virtual
        limit = getattr(self.tokenizer, "model_max_length", 0)
        most = min(self.places, (limit if limit > 0 else _NO_LIMIT) - virtual)
        if most < 2:
            raise Refusal(
                f"adapter.num_virtual_tokens must leave places for the input, but {virtual} of the"
                f" model's {most + virtual} were asked for; lower it"
            )
        self.virtual = virtual
        self.max_length = min(self.config.data.max_length, most)

    def notes(self) -> list[str]:
        """Return the columns, and whether the model takes less than was asked for."""
        asked = self.config.data.max_length
        if self.max_length < asked:
            beside = f" beside {self.virtual} virtual tokens" if self.virtual else ""
            most = f"the most that the model takes{beside}"
            return [*super().notes(), f"max_length is {self.max_length}, {most}, not {asked}"]
        return super().notes()

    def limit_output(self, longest: int) -> list[str]:
        """Set how much the model writes at most, and return that in words.

        Args:
            longest: tokens of the longest answer that is known.
        """
        asked = self.config.data.max_new_tokens
        self.new_tokens = min(asked or max(longest, SHORTEST), self.places)
        return [f"the model writes at most {self.new_tokens} tokens (data.max_new_tokens)"]

    def text(self, row: Row, role: str) -> str:
        """Return a column's text.

        Raises:
            BadRow: it is empty or no text.
        """
        value = row.values.get(self.columns[role])
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise BadRow(f"{self.columns[role]!r} must be text, got {value!r:.60}")
        if not str(value).strip():
            raise BadRow(f"{self.columns[role]!r} must not be empty")
        return str(value)

    def encode(self, text: str, pair: str | None = None) -> Example:
        """Return the model's inputs for a text, cut at max_length; cuts are counted."""
        found = self.tokenizer(text, pair, verbose=False)
        if len(found["input_ids"]) > self.max_length:
            self.long += 1
            found = self.tokenizer(text, pair, truncation=True, max_length=self.max_length)
        return dict(found)

    def pad(self, examples: Sequence[Example], keys: Sequence[str] = ()) -> dict[str, Any]:
        """Return the padded inputs of examples; `keys` are padded as labels are."""
        names = [n for n in self.tokenizer.model_input_names if n in examples[0]]
        fill = {"input_ids": self.tokenizer.pad_token_id or 0}
        fill.update(dict.fromkeys(keys, IGNORED))
        return pad_right(examples, [*names, *keys], fill)

    def save(self, directory: Path) -> None:
        """Write the tokenizer."""
        self.tokenizer.save_pretrained(directory)


class PairTask(TextTask):
    """A task with one label per text, or per pair of texts."""

    required = ("text", "label")
    targets = ("label",)
    optional = ("text_pair",)
    task_type = "SEQ_CLS"

    def inputs_of(self, row: Row) -> Any:
        """Return the text and its pair."""
        return [row.values.get(self.columns.get(r, "")) for r in ("text", "text_pair")]

    def tokens(self, row: Row) -> Example:
        """Return the model's inputs for the text and its pair."""
        pair = self.text(row, "text_pair") if "text_pair" in self.columns else None
        return self.encode(self.text(row, "text"), pair)

    def load_head(self, quantize: str | None, widen: str | None, **head: Any) -> Loaded:
        """Return the model with the final layer that `load_model` is asked for."""
        return load_model(
            self.config.model,
            "AutoModelForSequenceClassification",
            quantize=quantize,
            widen=widen,
            seed=self.config.seed,
            pad_token_id=self.tokenizer.pad_token_id,
            **head,
        )

    def collate(self, examples: Sequence[Example]) -> dict[str, Any]:
        """Return padded tokens, and labels (M,)."""
        return {**self.pad(examples), "labels": torch.tensor([e["label"] for e in examples])}


def pad_right(
    examples: Sequence[Example], names: Sequence[str], fill: dict[str, int]
) -> dict[str, Any]:
    """Return tensors of lists of numbers, as long as the longest."""
    batch = {}
    for name in names:
        rows = [example[name] for example in examples]
        length = max(len(row) for row in rows)
        value = fill.get(name, 0)
        batch[name] = torch.tensor([[*row, *[value] * (length - len(row))] for row in rows])
    return batch


def ends_of(tokenizer: Any, model: Any) -> set[int]:
    """Return the tokens with which a model ends what it writes."""
    found = model.generation_config.eos_token_id
    found = tokenizer.eos_token_id if found is None else found
    return set(found) if isinstance(found, list) else {found}
