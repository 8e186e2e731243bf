"""A finished run, loaded again: to score, predict, chat, and merge."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from fastlora.train import directory
from fastlora.train.arguments import EVAL_BATCH
from fastlora.train.config import RunConfig, as_config, parse_yaml
from fastlora.train.data.cleaning import CleaningReport
from fastlora.train.data.rows import BadRow, Rows, read_rows
from fastlora.train.directory import CONFIG, LABELS, METRICS, WEIGHTS
from fastlora.train.models import device_of
from fastlora.train.precision import why_widen
from fastlora.train.prepare import examples_of, usable
from fastlora.train.refusal import Refusal
from fastlora.train.strategies import strategy
from fastlora.train.tasks import task
from fastlora.train.tasks.base import Task

CHAT_TOKENS = 256  # of an answer at least, before it is cut


class Finished:
    """The model of a finished run, with its task.

    Attributes:
        config: the run's.
        task: with the classes that it learnt.
        strategy: by which it was trained.
        model: with the trained weights, in inference.

    Raises:
        Refusal: the directory holds no finished run.
    """

    def __init__(self, path: Path, dense: bool = False) -> None:
        from fastlora.train.run import quiet

        quiet()
        self.path, self.config = path, read_run(path)
        learnt = json.loads((path / METRICS).read_text(encoding="utf-8"))["data"]
        self.task = task(self.config.task)(self.config)
        self.strategy = strategy(self.config.method)(self.config.adapter)
        self.task.classes = json.loads((path / LABELS).read_text(encoding="utf-8"))
        self.task.columns = learnt["columns"]
        self.task.new_tokens = self.config.data.max_new_tokens or learnt["new_tokens"]
        self.task.prepare()
        quantize = None if dense else self.config.quantize
        widen = why_widen(not self.strategy.freezes, None if dense else device_of())
        loaded = self.task.load(quantize, widen)
        self.model: Any = self.strategy.apply(loaded, self.task.task_type, self.config.seed)
        self.strategy.load(self.model, path / WEIGHTS)
        self.model.eval()

    def read(self, data: str, predict: bool) -> Rows:
        """Return the rows of other data; `predict`: they may lack the answer.

        Raises:
            Refusal: they can't be read, or lack a column that the run learnt.
        """
        rows = read_rows(data, "test", self.config.data.bad_rows == "skip")
        self.task.columns = self.task.columns_in(rows.columns, data, predict)
        return rows


def read_run(path: Path) -> RunConfig:
    """Return the config of a finished run.

    Raises:
        Refusal: there is none.
    """
    if not (path / CONFIG).is_file():
        raise Refusal(f"the directory must hold a run, but there is no {path / CONFIG}")
    if not (path / METRICS).is_file():
        raise Refusal(
            f"the run must be finished, but {path} has no {METRICS}; go on with"
            f" fastlora train {path / CONFIG}"
        )
    text = (path / CONFIG).read_text(encoding="utf-8")
    return as_config(parse_yaml(text, str(path / CONFIG)), str(path / CONFIG))


def evaluate(path: Path, data: str, console: Console) -> dict[str, float]:
    """Print and return the scores of a run's model on other data.

    Raises:
        Refusal: the run or the data can't be used.
    """
    run = Finished(path)
    rows = run.read(data, predict=False)
    run.task.check(rows.rows, data)
    report = CleaningReport(bad={"test": rows.bad})
    examples = examples_of(run.task, rows.rows, "test", report)
    found = run.task.evaluate(run.model, examples, EVAL_BATCH)
    for line in [*report.lines(), *found.notes]:
        console.print(line, highlight=False, soft_wrap=True, markup=False)
    for name, value in found.scores.items():
        console.print(f"{name}: {value:.4f}", highlight=False)
    return found.scores


def predict(path: Path, data: str, output: Path | None, console: Console) -> list[Any]:
    """Write one JSON line per row of a file: the row, and the model's answer as "prediction".

    What else is to be said goes to standard error where the lines go to standard output.

    Raises:
        Refusal: the run or the data can't be used.
    """
    run = Finished(path)
    rows = run.read(data, predict=True)
    report = CleaningReport(bad={"test": rows.bad})
    asked = usable(rows.rows, run.task.ask, "test", run.task, report)
    answers = run.task.predict(run.model, [question for _, question in asked], EVAL_BATCH)
    lines = [
        json.dumps({**row.values, "prediction": answer}, ensure_ascii=False, default=str)
        for (row, _), answer in zip(asked, answers, strict=True)
    ]
    said = _shortfalls(run.task, report.bad["test"], answers)
    if output is None:
        for line in lines:
            print(line)
        for line in said:
            print(f"fastlora: {line}", file=sys.stderr)
    else:
        directory.write_whole(output, "".join(f"{line}\n" for line in lines))
        for line in [f"{len(lines)} predictions written to {output}", *said]:
            console.print(line, highlight=False, soft_wrap=True, markup=False)
    return answers


def _shortfalls(task: Task, bad: list[str], answers: list[Any]) -> list[str]:
    """Return sentences on the rows that have no answer, and on answers that were cut."""
    said = []
    if bad:
        said.append(f"{len(bad)} bad rows left out; the first: {bad[0]}")
    cut = sum(answer.get("cut", False) for answer in answers)
    if cut:
        said.append(
            f"{cut} of {len(answers)} answers were cut at {task.new_tokens} tokens or the end of"
            " the model's places; data.max_new_tokens in the run's run.yaml changes the former"
        )
    return said


def merge(path: Path, output: Path, console: Console) -> None:
    """Write a run's model as a plain checkpoint that transformers loads.

    The update is folded into the dense weights of the base as it was before 4 bits.

    Raises:
        Refusal: the run can't be merged, or the directory is in use.
    """
    from fastlora.train.output import staged_directory

    run = Finished(path, dense=True)
    merged: Any = run.strategy.merged(run.model)
    if not hasattr(merged, "save_pretrained"):
        raise Refusal("the model must be one of transformers to be merged, but it is timm's")
    with staged_directory(output) as work:
        merged.save_pretrained(work)
        run.task.save(work)
    console.print(f"merged into {output}", highlight=False)


def chat(path: Path, console: Console) -> None:
    """Talk with a run's language model, line by line, until an empty line or the end of input.

    Raises:
        Refusal: the run is of another task.
    """
    from fastlora.train.tasks.instruction import Instruction
    from fastlora.train.tasks.language import LanguageTask

    config = read_run(path)
    if not issubclass(task(config.task), LanguageTask):
        raise Refusal(f"chat needs a run of task instruction or causal-lm, got {config.task}")
    run = Finished(path)
    writer: Any = run.task
    tokens = max(writer.new_tokens, CHAT_TOKENS)
    messages: list[dict[str, str]] = []
    while True:
        try:
            said = console.input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            said = ""
        if not said:
            return
        messages.append({"role": "user", "content": said})
        try:
            ids = writer.begin(messages if isinstance(writer, Instruction) else said)
        except BadRow as error:
            raise Refusal(f"the conversation can't go on: {error}") from None
        answer, cut = writer.write(run.model, ids, tokens)
        messages.append({"role": "assistant", "content": answer or " "})
        console.print(f"{answer} ..." if cut else answer, markup=False, highlight=False)
