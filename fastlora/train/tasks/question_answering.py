"""Extractive question answering: the answer is a span of the context."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from fastlora.train import spans
from fastlora.train.data.rows import BadRow, Row
from fastlora.train.models import Loaded, load_model
from fastlora.train.refusal import Refusal
from fastlora.train.tasks.base import Evaluation, Example, batches
from fastlora.train.tasks.text import TextTask

LONGEST = 30  # tokens of an answer


class QuestionAnswering(TextTask):
    """Find the answer in a context; one that is too long is read in overlapping windows."""

    name = "question-answering"
    required = ("question", "context", "answers")
    targets = ("answers",)
    metric = "f1"
    greater = True
    task_type = "QUESTION_ANS"

    def inputs_of(self, row: Row) -> Any:
        """Return question and context."""
        return [row.values.get(self.columns[r]) for r in ("question", "context")]

    def prepare(self) -> None:
        """Load the tokenizer, which must know where its tokens come from."""
        super().prepare()
        if not self.tokenizer.is_fast:
            raise Refusal(
                f"task {self.name} needs a fast tokenizer, but {self.config.model} has none"
            )

    def load(self, quantize: str | None, widen: str | None) -> Loaded:
        """Return the model with a final layer for start and end."""
        return load_model(
            self.config.model,
            "AutoModelForQuestionAnswering",
            quantize=quantize,
            widen=widen,
            seed=self.config.seed,
            outputs=2,
        )

    def examples(self, row: Row, train: bool) -> list[Example]:
        """Return the windows of a row, with the place of the answer in tokens."""
        question, context = self.text(row, "question"), self.text(row, "context")
        value = row.values.get(self.columns["answers"])
        answer, start = answer_of(value, context)
        found = self._windows(question, context)
        end = start + len(answer)
        made = []
        for window in found:
            window["start"], window["end"] = _tokens(window["offsets"], start, end)
            made.append({**window, "answers": texts_of(value), "context": context})
        if train:
            inside = [window for window in made if window["start"] > 0]
            return inside or made[:1]
        return made

    def _windows(self, question: str, context: str) -> list[Example]:
        asked = len(self.tokenizer(question, add_special_tokens=False, verbose=False)["input_ids"])
        room = self.max_length - asked - self.tokenizer.num_special_tokens_to_add(pair=True)
        if room < 2:
            raise BadRow(
                f"the question must leave room for the context in {self.max_length} tokens, but it"
                f" has {asked}; shorten it, or raise data.max_length"
            )
        found = self.tokenizer(
            question,
            context,
            truncation="only_second",
            max_length=self.max_length,
            stride=min(64, room // 2),
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
            verbose=False,
        )
        count = len(found["input_ids"])
        self.long += count > 1
        windows = []
        for i in range(count):
            kept = found.sequence_ids(i)
            names = [n for n in self.tokenizer.model_input_names if n in found]
            window: Example = {name: found[name][i] for name in names}
            window["offsets"] = [
                place if kept[k] == 1 else None
                for k, place in enumerate(found["offset_mapping"][i])
            ]
            windows.append(window)
        return windows

    def collate(self, examples: Sequence[Example]) -> dict[str, Any]:
        """Return padded tokens, and start_positions and end_positions (M,)."""
        starts = torch.tensor([e["start"] for e in examples])
        ends = torch.tensor([e["end"] for e in examples])
        return {**self.pad(examples), "start_positions": starts, "end_positions": ends}

    def tokens_of(self, batch: dict[str, Any]) -> int:
        """Return the tokens without padding."""
        mask = batch.get("attention_mask", batch["input_ids"])
        return int((mask != 0).sum())

    def evaluate(
        self, model: nn.Module, examples: Sequence[Example], batch_size: int
    ) -> Evaluation:
        """Return exact match and F1 of words: of each row's best window, with its best answer."""
        best: dict[str, tuple[float, str, Example]] = {}
        total = 0.0
        for chosen, _, outputs in batches(self, model, examples, batch_size):
            total += float(outputs.loss) * len(chosen)
            for index, score, text in _answers(outputs, [examples[i] for i in chosen], chosen):
                place = examples[index].get("place", str(index))
                if place not in best or score > best[place][0]:
                    best[place] = (score, text, examples[index])
        exact = [max(spans.same(a, t) for a in e["answers"]) for _, t, e in best.values()]
        shared = [max(spans.overlap(a, t) for a in e["answers"]) for _, t, e in best.values()]
        count = max(len(best), 1)
        samples = [(e["context"][:200], e["answers"][0], t) for _, t, e in list(best.values())[:5]]
        found = {
            "exact_match": sum(exact) / count,
            "f1": sum(shared) / count,
            "loss": total / max(len(examples), 1),
        }
        return Evaluation(found, samples=samples)

    def ask(self, row: Row) -> list[Example]:
        """Return the windows of a row."""
        context = self.text(row, "context")
        windows = self._windows(self.text(row, "question"), context)
        return [{**window, "start": 0, "end": 0, "context": context} for window in windows]

    def predict(self, model: nn.Module, asked: Sequence[Any], batch_size: int) -> list[Any]:
        """Return each row's answer."""
        examples: list[Example] = [window for windows in asked for window in windows]
        owners = [i for i, windows in enumerate(asked) for _ in windows]
        best: list[Any] = [(-1e9, "")] * len(asked)
        for chosen, _, outputs in batches(self, model, examples, batch_size):
            for index, score, text in _answers(outputs, [examples[i] for i in chosen], chosen):
                if score > best[owners[index]][0]:
                    best[owners[index]] = (score, text)
        return [{"answer": text, "score": score} for score, text in best]


def answer_of(value: Any, context: str) -> tuple[str, int]:
    """Return the first answer's text and where it starts in the context.

    Raises:
        BadRow: there is none, or it does not stand in the context.
    """
    answer = texts_of(value)[0]
    start = value.get("answer_start") if isinstance(value, dict) else None
    start = start[0] if isinstance(start, list) and start else start
    if not isinstance(start, int) or context[start : start + len(answer)] != answer:
        start = context.find(answer)
    if start < 0:
        raise BadRow(f"the answer must stand in the context, but {answer!r:.60} does not")
    return answer, start


def texts_of(value: Any) -> list[str]:
    """Return the answers that count as right: a text, a list, or SQuAD's {"text": [...]}.

    Raises:
        BadRow: there is none.
    """
    found = value.get("text") if isinstance(value, dict) else value
    found = found if isinstance(found, list) else [found]
    if not found or not all(isinstance(text, str) and text for text in found):
        raise BadRow(f"the answer must be text, got {value!r:.60}")
    return found


def _tokens(offsets: list[Any], start: int, end: int) -> tuple[int, int]:
    """Return the first and last token of a span of characters; 0, 0: it is not in the window."""
    inside = [i for i, place in enumerate(offsets) if place and place[1] > start and place[0] < end]
    kept = [place for place in offsets if place]
    if not inside or kept[0][0] > start or kept[-1][1] < end:
        return 0, 0
    return inside[0], inside[-1]


def _answers(outputs: Any, examples: list[Example], chosen: Sequence[int]) -> Any:
    """Yield (index, score, text) of the likeliest span of each window."""
    starts, ends = outputs.start_logits.float(), outputs.end_logits.float()
    for k, example in enumerate(examples):
        offsets = example["offsets"]
        inside = [i for i, place in enumerate(offsets) if place]
        best = (-1e9, 0, 0)
        top = sorted(inside, key=lambda i: -float(starts[k, i]))[:10]
        for i in top:
            for j in range(i, min(i + LONGEST, len(offsets))):
                score = float(starts[k, i] + ends[k, j])
                if offsets[j] and score > best[0]:
                    best = (score, i, j)
        text = ""
        if inside:
            text = example["context"][offsets[best[1]][0] : offsets[best[2]][1]]
        yield chosen[k], best[0], text


TASK = QuestionAnswering
