"""One run: data and model are checked first, then trained, scored and written."""

from __future__ import annotations

import dataclasses
import json
import logging
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers
from rich.console import Console

from fastlora.train import checkpoints, directory, memory, results, retention
from fastlora.train.arguments import (
    AUTO,
    BATCH,
    make_arguments,
    refused_options,
    resolve,
    split_arguments,
)
from fastlora.train.callbacks import Audit, Bar, Clock, Interruption
from fastlora.train.config import RunConfig
from fastlora.train.models import device_of, parameter_counts
from fastlora.train.precision import WHY_SLOW, slow_on_cpu, why_widen
from fastlora.train.prepare import SPLITS, prepare
from fastlora.train.refusal import Refusal
from fastlora.train.strategies import strategy
from fastlora.train.tasks import task
from fastlora.train.tasks.base import Evaluation
from fastlora.train.trainer import Tuner, learns_statistics


class Interrupted(Exception):
    """A signal stopped the run after a checkpoint; the message says how to resume.

    Attributes:
        status: the exit status that a shell expects.
    """

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class Run:
    """A run whose data and model are loaded and checked; nothing is written yet.

    Attributes:
        config: as it was read, with the defaults of its section `train`.
        model: the model, ready to train.
        trainer: with callbacks, optimizer and schedule that were made once to check the options.

    Raises:
        Refusal: bad input of any kind.
    """

    def __init__(self, config: RunConfig, console: Console) -> None:
        quiet()
        self.config, self.console = resolve(config), console
        self.resumes = directory.check_free(self.config)
        self.task = task(config.task)(self.config)
        self.strategy = strategy(config.method)(config.adapter)
        fields, self.extras = split_arguments(self.config.train)
        self._check_fit(fields)
        self._arguments(fields, BATCH)  # wrong values are found before anything is loaded
        self.data = prepare(self.task, config.data, self.config.seed)
        for line in self.data.report.lines():
            self.say(line)
        self._check_labels()
        begun = directory.read_json(config.output / directory.STATE) if self.resumes else {}
        self.rows = self._rows(begun.get("rows", {}))
        self._warn_of_slow_formats(fields)
        self._load(fields["per_device_eval_batch_size"])
        size = begun.get("batch_size") or self._batch_size(fields)
        self.arguments = self._arguments(fields, size)
        self.audit, self.interruption = Audit(self.say), Interruption()
        self.clock = Clock(config.output / directory.LOG)
        self.trainer = self._trainer()

    def _rows(self, begun: dict[str, str]) -> dict[str, str]:
        """Return a hash of the rows of each split, and of the classes.

        Raises:
            Refusal: they are not those that the run began with.
        """
        rows = {name: checkpoints.digest(getattr(self.data, name)) for name in SPLITS}
        rows["classes"] = checkpoints.digest([{"classes": self.task.classes}])
        differ = [name for name, found in begun.items() if rows.get(name) != found]
        if differ:
            raise Refusal(
                f"the data must be what the unfinished run in {self.config.output} began with, but"
                f" {', '.join(differ)} changed; put the old data back, or choose another output"
            )
        return rows

    def _load(self, batch_size: int) -> None:
        """Load the model, score it as it is, and apply the strategy."""
        widen = why_widen(not self.strategy.freezes, device_of())
        loaded = self.task.load(self.config.quantize, widen)
        self.head, budget = loaded.head, self.extras.memory_budget_gib
        memory.check_budget(loaded.model, budget)
        self.before = self._score_base(loaded.model, batch_size)
        self.old_texts = retention.old_texts(self.task, self.data.report, loaded.model)
        self.old_before = self._old_perplexity(loaded.model)
        self.body = retention.body_of(loaded.model)
        if self.body is not None:
            held_out = self.data.valid
            self.features = retention.features(self.task, loaded.model, self.body, held_out)
        model: Any = self.strategy.apply(loaded, self.task.task_type, self.config.seed)
        for note in loaded.notes:
            self.say(note)
        self.data.report.notes += loaded.notes
        self.model = model
        self.caches: bool | None = getattr(model.config, "use_cache", None)
        if self.caches is not None:
            model.config.use_cache = False
        memory.check_budget(model, budget)

    def _warn_of_slow_formats(self, fields: dict[str, Any]) -> None:
        for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
            if fields.get(name) and device_of().type == "cpu" and slow_on_cpu(dtype):
                self.say(f"train.{name} should be left out here: {WHY_SLOW}")

    def _batch_size(self, fields: dict[str, Any]) -> int:
        """Return the rows of a step on one device: the user's number, or what fits."""
        asked: Any = fields["per_device_train_batch_size"]
        if asked != AUTO:
            return int(asked)
        budget = self.extras.memory_budget_gib
        size = memory.fitting_batch_size(self.task, self.model, self.data.train, budget)
        self.say(f"batch size {size} fits")
        return size

    def _arguments(self, fields: dict[str, Any], size: int) -> Any:
        """Return TrainingArguments; those that depend on the data once it is there."""
        chosen = {**fields, "per_device_train_batch_size": size}
        rows = self.data.train if hasattr(self, "data") else []
        if len(rows) > size and len(rows) % size == 1 and learns_statistics(self.model):
            chosen.setdefault("dataloader_drop_last", True)
            self.say("one row is left out of each epoch: a batch norm can't learn from one alone")
        if rows and "input_ids" in rows[0] and "train_sampling_strategy" not in chosen:
            chosen["train_sampling_strategy"] = "group_by_length"
            self.say(
                "examples of like length are batched together, which saves padding"
                " (train.train_sampling_strategy: random does not)"
            )
        checkpoint_root = self.config.output / directory.CHECKPOINTS
        metric, greater = self.task.metric, self.task.greater
        return make_arguments(chosen, self.extras, checkpoint_root, metric, greater)

    def _trainer(self) -> Tuner:
        """Return the Trainer after a rehearsal of what it makes of the options.

        The Trainer makes the directory of its checkpoints, which must not be there yet.
        """
        patience = self.extras.early_stopping_patience
        stops = [transformers.EarlyStoppingCallback(patience)] if patience else []
        place = self.arguments.output_dir
        with TemporaryDirectory() as scratch, refused_options():
            self.arguments.output_dir = str(Path(scratch) / directory.CHECKPOINTS)
            trainer = Tuner(
                self.task,
                self.extras,
                self.head,
                self.clock.take,
                model=self.model,
                args=self.arguments,
                train_dataset=self.data.train,
                eval_dataset=self.data.valid,
                callbacks=[self.clock, self.audit, self.interruption, Bar(self.console), *stops],
            )
        self.arguments.output_dir = place
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.rehearse()
        return trainer

    def _check_labels(self) -> None:
        """Raise unless there is something to learn; say where the end of text is not learnt."""
        found = self.task.audit(self.data.train)
        if found.get("rows_with_labels") == 0:
            raise Refusal("the training rows must have labels, but all of them are masked")
        if found.get("end_of_text_in_loss") == 0:
            self.say("no training row ends within max_length: the model will not learn to stop")

    def say(self, line: str) -> None:
        """Tell the person at the terminal."""
        self.console.print(line, highlight=False, soft_wrap=True, markup=False)

    def _check_fit(self, fields: dict[str, Any]) -> None:
        """Raise unless method, task, storage and options go together."""
        method, task_type = self.strategy, self.task.task_type
        if self.task.vision and not method.vision:
            raise Refusal(
                f"method {method.name} works on tokens, which task {self.task.name} lacks"
            )
        if method.tasks is not None and task_type not in method.tasks:
            raise Refusal(f"method {method.name} can't do task {self.task.name}; choose another")
        if self.config.quantize and not method.freezes:
            raise Refusal(
                f"quantize must be left out for method {method.name}, which trains the base's own"
                " weights; 4-bit weights stay as they are"
            )
        if self.config.data.retain and self.task.vision:
            raise Refusal(f"data.retain is text, but task {self.task.name} has none; leave it out")
        if not method.packs and self.config.data.packing:
            raise Refusal(f"data.packing must be false for method {method.name}; leave it out")
        for key in ("gradient_checkpointing", "activation_checkpointing"):
            if fields.get(key) and not method.recomputes:
                raise Refusal(
                    f"train.{key} must be false for method {method.name}, which can't compute"
                    " activations again; choose another method, or leave it out"
                )

    def _score_base(self, base: Any, batch_size: int) -> Evaluation:
        stored = self.config.output / directory.BASE
        if self.resumes and stored.is_file():
            return Evaluation(**json.loads(stored.read_text(encoding="utf-8")))
        return self.task.evaluate(base, self.data.test, batch_size)

    def _old_perplexity(self, model: Any) -> float | None:
        if self.old_texts is None:
            return None
        scored, examples = self.old_texts
        return scored.evaluate(model, examples, 8).scores["perplexity"]

    def forgetting(self) -> dict[str, float | None] | None:
        """Return the perplexity of data.retain before and after; None: there is no such data."""
        if self.old_texts is None:
            return None
        return {"before": self.old_before, "after": self._old_perplexity(self.model)}

    def retained(self) -> float | None:
        """Return how like the base's features are to what they were; None: not known."""
        if self.body is None:
            return None
        now = retention.features(self.task, self.model, self.body, self.data.valid)
        return retention.similarity(self.features, now)

    def train(self) -> Path:
        """Train, score and write everything; return the run's directory.

        Raises:
            Refusal: the directory can't be used.
            Interrupted: a signal came.
            Diverged: loss or gradients stayed not finite.
        """
        with directory.claimed(self.config) as output:
            directory.write_json(output / directory.STATE, self._state())
            directory.write_json(output / directory.BASE, dataclasses.asdict(self.before))
            directory.write_json(output / directory.LABELS, self.task.classes)
            self._loop(output)
            after = self.trainer.scores_of(self.data.test)
            found = {**self.audit.as_dict(), **self.task.audit(self.data.train)}
            results.write(self, output, self.trainer, after, found)
        return output

    def _state(self) -> dict[str, Any]:
        """Return what a resumed run must find as it was."""
        return {"rows": self.rows, "batch_size": self.arguments.per_device_train_batch_size}

    def _loop(self, output: Path) -> None:
        """Take the steps that are left."""
        log, trainer = output / directory.LOG, self.trainer
        newest = checkpoints.newest(output / directory.CHECKPOINTS, self.say)
        step = 0 if newest is None else int(newest.name.removeprefix(checkpoints.PREFIX))
        if self.resumes:
            self.say(f"going on after step {step}")
        directory.cut_log(log, step)
        if newest is not None and trainer.take_ended(newest):
            return
        try:
            with self.interruption.listening():
                trainer.train(resume_from_checkpoint=None if newest is None else str(newest))
        finally:
            self.clock.write()  # of a step that was not finished
        signal, state = self.interruption.signal, trainer.state
        if signal is not None and state.global_step < state.max_steps:
            raise Interrupted(
                f"interrupted after step {state.global_step}, which is saved in {output};"
                " run the same command again to go on",
                128 + signal,
            )


def quiet() -> None:
    """Keep the libraries' warnings for people who ask for them; ours are in the report."""
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", "`past_key_values` is deprecated", FutureWarning)  # PEFT's


def describe(run: Run) -> str:
    """Return one line on what is trained."""
    trained, total = parameter_counts(run.model)
    stored = f", base in {run.config.quantize}" if run.config.quantize else ""
    return (
        f"{run.config.method} on {run.config.model}{stored}: {trained:,} of {total:,} parameters"
        f" are trained ({trained / total:.2%}), on {device_of()}"
    )
