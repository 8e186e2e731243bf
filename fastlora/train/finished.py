"""A finished run, loaded again: to score, predict, chat, and merge."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console

from fastlora.train import directory
from fastlora.train.config import RunConfig, as_config, parse_yaml
from fastlora.train.data.rows import read_rows
from fastlora.train.directory import CONFIG, LABELS, METRICS, WEIGHTS
from fastlora.train.models import device_of
from fastlora.train.precision import why_widen
from fastlora.train.refusal import Refusal
from fastlora.train.strategies import strategy
from fastlora.train.tasks import task

BATCH = 32


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
        self.task = task(self.config.task)(self.config)
        self.strategy = strategy(self.config.method)(self.config.adapter)
        self.task.classes = json.loads((path / LABELS).read_text(encoding="utf-8"))
        self.task.prepare()
        quantize = None if dense else self.config.quantize
        widen = why_widen(not self.strategy.freezes, None if dense else device_of())
        loaded = self.task.load(quantize, widen)
        self.model: Any = self.strategy.apply(loaded, self.task.task_type, self.config.seed)
        self.strategy.load(self.model, path / WEIGHTS)
        self.model.eval()


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
    rows = read_rows(data, "test", skip_bad=False)
    run.task.columns = run.task.find_columns(rows.columns)
    run.task.check(rows.rows, data)
    examples = [e | {"place": r.place} for r in rows.rows for e in run.task.examples(r, False)]
    found = run.task.evaluate(run.model, examples, BATCH)
    for name, value in found.scores.items():
        console.print(f"{name}: {value:.4f}", highlight=False)
    return found.scores


def predict(path: Path, data: str, output: Path | None, console: Console) -> list[Any]:
    """Write one JSON line per row of a file: the row, and the model's answer as "prediction".

    Raises:
        Refusal: the run or the data can't be used.
    """
    run = Finished(path)
    rows = read_rows(data, "test", skip_bad=False)
    run.task.columns = run.task.find_columns(rows.columns, predict=True)
    answers = run.task.predict(run.model, rows.rows, BATCH)
    lines = [
        json.dumps({**row.values, "prediction": answer}, ensure_ascii=False, default=str)
        for row, answer in zip(rows.rows, answers, strict=True)
    ]
    if output is None:
        for line in lines:
            print(line)
    else:
        directory.write_whole(output, "\n".join(lines) + "\n")
        console.print(f"{len(lines)} predictions written to {output}", highlight=False)
    return answers


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
    messages: list[dict[str, str]] = []
    while True:
        try:
            said = console.input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            said = ""
        if not said:
            return
        if isinstance(run.task, Instruction):
            messages.append({"role": "user", "content": said})
            answer = run.task.answer(run.model, messages, 256)
            messages.append({"role": "assistant", "content": answer or " "})
        else:
            assert isinstance(run.task, LanguageTask)
            answer = run.task.continue_text(run.model, said, 256)
        console.print(answer, markup=False, highlight=False)
