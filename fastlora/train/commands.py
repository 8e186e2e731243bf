"""The subcommands about runs, as the command line calls them."""

from __future__ import annotations

import errno
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from rich.console import Console

from fastlora.train import directory
from fastlora.train.config import MOST_SEED, RunConfig, read_config
from fastlora.train.output import check_file, check_new
from fastlora.train.refusal import Refusal

_UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES)


def train(file: Path, overrides: Sequence[str], console: Console) -> None:
    """Run a YAML file.

    Raises:
        Refusal: bad input.
        SystemExit: a signal came, training diverged, or 1 after an unexpected error.
    """
    config = read_config(file, overrides)
    _check_alone()
    guarded(config.output, lambda: _train(config, console))


def _check_alone() -> None:
    """Raise when a launcher started several processes, which would all write one directory."""
    count = os.environ.get("WORLD_SIZE", "1")
    if count != "1":
        raise Refusal(
            f"fastlora train must run in one process, but WORLD_SIZE is {count}; start it without a"
            " launcher, or call patch_model in a script of your own, which may run in several"
        )


def _train(config: RunConfig, console: Console) -> None:
    from fastlora.train.run import Run, describe

    run = Run(config, console)
    run.say(describe(run))
    with _stops():
        output = run.train()
    metrics = output / directory.METRICS
    console.print(f"results: {metrics} and {output / directory.REPORT}", highlight=False)


def compare(
    file: Path, methods: str | None, seeds: str, overrides: Sequence[str], console: Console
) -> None:
    """Run several methods; None: all.

    Raises:
        Refusal: bad input.
        SystemExit: a signal came, or 1 after an unexpected error.
    """
    config = read_config(file, overrides)
    numbers = _seeds(seeds)
    guarded(config.output, lambda: _compare(config, methods, numbers, console))


def _compare(config: RunConfig, methods: str | None, seeds: list[int], console: Console) -> None:
    from fastlora.train.compare import compare as run
    from fastlora.train.strategies import strategies

    asked = list(strategies()) if methods is None else methods.split(",")
    names = list(dict.fromkeys(name.strip() for name in asked if name.strip()))
    if not names:
        raise Refusal("--methods must name at least one method")
    with _stops():
        run(config, names, seeds, console)


def _seeds(text: str) -> list[int]:
    try:
        found = [int(seed) for seed in text.split(",")]
    except ValueError:
        raise Refusal(f"--seeds must be whole numbers, as in 0,1,2, got {text!r}") from None
    wrong = [seed for seed in found if not 0 <= seed <= MOST_SEED]
    if wrong:
        raise Refusal(f"--seeds must be from 0 to {MOST_SEED}, got {wrong[0]}")
    return list(dict.fromkeys(found))


def evaluate(path: Path, data: str, console: Console) -> None:
    """Score a run's model on other data.

    Raises:
        Refusal: bad input.
        SystemExit: 1 after an unexpected error.
    """
    guarded(path, lambda: _finished().evaluate(path, data, console))


def predict(path: Path, data: str, output: Path | None, console: Console) -> None:
    """Print a run's answer for each row of a file, or write them to another.

    Raises:
        Refusal: bad input.
        SystemExit: 1 after an unexpected error.
    """
    if output is not None:
        check_file(output)
    guarded(
        path if output is None else output.parent,
        lambda: _finished().predict(path, data, output, console),
    )


def merge(path: Path, output: Path, console: Console) -> None:
    """Write a run's model as a plain checkpoint.

    Raises:
        Refusal: bad input.
        SystemExit: 1 after an unexpected error.
    """
    check_new(output)
    guarded(output.parent, lambda: _finished().merge(path, output, console))


def chat(path: Path, console: Console) -> None:
    """Talk with a run's language model.

    Raises:
        Refusal: bad input.
        SystemExit: 1 after an unexpected error.
    """
    guarded(path, lambda: _finished().chat(path, console))


def init(task: str, output: Path, console: Console) -> None:
    """Write the starter of a task.

    Raises:
        Refusal: bad input.
        SystemExit: 1 after an unexpected error.
    """

    def work() -> None:
        from fastlora.train import starters

        starters.write(task, output, console)

    check_file(output)
    guarded(output.parent, work)


def _finished() -> ModuleType:
    """Return what works on finished runs, imported when it is asked for."""
    from fastlora.train import finished

    return finished


@contextmanager
def _stops() -> Iterator[None]:
    """Say why training stopped, and exit."""
    from fastlora.train.nonfinite import Diverged
    from fastlora.train.run import Interrupted

    try:
        yield
    except (Interrupted, Diverged) as stop:
        print(f"fastlora: {stop}", file=sys.stderr)
        raise SystemExit(stop.status if isinstance(stop, Interrupted) else 1) from None


def guarded(output: Path, work: Callable[[], Any]) -> None:
    """Do something; an error that is no refusal is logged, and the log is named.

    Args:
        output: where the work writes; the log is put there, if it is a directory.
        work: what is done.

    Raises:
        Refusal: as the work does, and where the disk is full or read-only.
        SystemExit: as the work does; 1 after an unexpected error.
    """
    try:
        work()
    except (Refusal, BrokenPipeError):
        raise
    except Exception as error:
        from fastlora.train.data.rows import BadRow

        if isinstance(error, BadRow):
            raise Refusal(str(error)) from error
        if _is_full(error, output):
            place = getattr(error, "filename", None) or output
            reason = getattr(error, "strerror", None) or str(error)
            raise Refusal(
                f"the results must be writable, but {place} is not: {reason}; what was saved before"
                " is whole, so free some space and run the same command again"
            ) from error
        said = _logged(error, output)
        print(f"fastlora: unexpected error: {error}; {said}", file=sys.stderr)
        raise SystemExit(1) from error


def _is_full(error: Exception, output: Path) -> bool:
    """Return whether an error says that the output can't be written."""
    if not isinstance(error, OSError):
        return os.strerror(errno.ENOSPC) in str(error)  # as safetensors says it
    if error.errno not in _UNWRITABLE:
        return False
    if error.filename is None:  # a file that was opened before
        return True
    return Path(os.fsdecode(error.filename)).resolve().is_relative_to(output.resolve())


def _logged(error: Exception, output: Path) -> str:
    """Write the error where a person finds it, and say where."""
    text = "".join(traceback.format_exception(error))
    for place in (output, Path()):
        log = place / directory.ERROR_LOG
        try:
            log.write_text(text, encoding="utf-8")
        except OSError:
            continue
        return f"the log is {log}"
    print(text, file=sys.stderr)
    return "the log is above, for it could not be written"
