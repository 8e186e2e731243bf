"""What is done around the Trainer's steps: progress, interruption, the audit of step 1."""

from __future__ import annotations

import json
import signal
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn
from transformers import TrainerCallback

from fastlora.train.directory import finite


class Interruption(TrainerCallback):  # type: ignore[misc]
    """Turns SIGINT and SIGTERM into a checkpoint and a stop.

    Attributes:
        signal: the number of the signal that came; None: none.
    """

    def __init__(self) -> None:
        self.signal: int | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take the signals while the block runs; a second one is taken as usual."""
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

        def take(number: int, _: Any) -> None:
            self.signal = number
            for each, handler in before.items():
                signal.signal(each, handler)

        for number in before:
            signal.signal(number, take)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        """Ask for a checkpoint, if a signal came."""
        if self.signal is not None:
            control.should_save = True
        return control

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        """Stop, once the checkpoint is written: it must not remember the stop."""
        if self.signal is not None:
            control.should_training_stop = True
        return control


class Clock(TrainerCallback):  # type: ignore[misc]
    """Writes each step's row with the time that it took, its optimizer included.

    Attributes:
        file: the log.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self._row: dict[str, Any] | None = None
        self._start = time.perf_counter()

    def take(self, row: dict[str, Any]) -> None:
        """Take the row of the present step."""
        self._row = row

    def write(self) -> None:
        """Append the row that was taken last, once."""
        if self._row is not None:
            row = {**self._row, "seconds": time.perf_counter() - self._start}
            with self.file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(finite(row)) + "\n")
            self._row = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Start."""
        self._start = time.perf_counter()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Stop."""
        self.write()


class Bar(TrainerCallback):  # type: ignore[misc]
    """A progress bar for people; nothing where the output is no terminal."""

    def __init__(self, console: Console) -> None:
        columns = (
            TextColumn("training"),
            BarColumn(),
            TextColumn("step {task.completed:.0f}/{task.total:.0f}  loss {task.fields[loss]}"),
            TimeRemainingColumn(),
        )
        self.progress = Progress(*columns, console=console, disable=not console.is_terminal)
        self.task: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Show it."""
        self.progress.start()
        self.task = self.progress.add_task("", total=state.max_steps, loss="-")

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Move it."""
        loss = (logs or {}).get("loss")
        fields: dict[str, Any] = {} if loss is None else {"loss": f"{loss:.3f}"}
        self.progress.update(self.task, completed=state.global_step, **fields)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Remove it."""
        self.progress.stop()


class Audit(TrainerCallback):  # type: ignore[misc]
    """Looks at step 1: everything trainable got a gradient, and the base did not change.

    Attributes:
        without_gradient: names of the trained parameters that got none.
        base_unchanged: whether the frozen parameters are as before; None: not looked at yet.
    """

    def __init__(self, tell: Callable[[str], None]) -> None:
        self.tell = tell
        self.without_gradient: list[str] = []
        self.base_unchanged: bool | None = None
        self._before: int | None = None

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, **_: Any
    ) -> None:
        """Remember the base."""
        self._before = checksum(model)

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, model: Any = None, **_: Any
    ) -> None:
        """Look at the gradients of the first step."""
        if self.base_unchanged is not None or self._before is None:
            return
        trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self.without_gradient = [name for name, p in trained if p.grad is None]
        if len(self.without_gradient) == len(trained):
            return  # a step that was skipped
        if self.without_gradient:
            names = ", ".join(self.without_gradient[:4])
            self.tell(f"{len(self.without_gradient)} trained tensors got no gradient: {names}")

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Look at the base after the first step.

        Raises:
            RuntimeError: it changed.
        """
        if self.base_unchanged is not None:
            return
        self.base_unchanged = checksum(model) == self._before
        if not self.base_unchanged:
            raise RuntimeError("the frozen base must not change, but step 1 changed it")

    def as_dict(self) -> dict[str, Any]:
        """Return what was found."""
        return {"without_gradient": self.without_gradient, "base_unchanged": self.base_unchanged}


def checksum(model: nn.Module) -> int:
    """Return a checksum of the frozen parameters' bytes."""
    total = 0
    for parameter in model.parameters():
        if not parameter.requires_grad:
            flat = parameter.detach().cpu().contiguous().view(-1).view(torch.uint8)
            total = zlib.crc32(flat.numpy().data, total)
    return total
