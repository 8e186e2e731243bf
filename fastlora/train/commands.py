"""The subcommands about runs, as the command line calls them."""

from __future__ import annotations

import errno
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from fastlora.train import directory
from fastlora.train.config import RunConfig, read_config
from fastlora.train.refusal import Refusal

ERROR_LOG = "error.log"


def train(file: Path, overrides: Sequence[str], console: Console) -> None:
    """Run a YAML file.

    Raises:
        Refusal: bad input.
        SystemExit: a signal came, or training diverged.
    """
    config = read_config(file, overrides)
    guarded(config.output, lambda: _train(config, console))


def _train(config: RunConfig, console: Console) -> None:
    from fastlora.train.nonfinite import Diverged
    from fastlora.train.run import Interrupted, Run, describe

    run = Run(config, console)
    run.say(describe(run))
    try:
        output = run.train()
    except Interrupted as stop:
        print(f"fastlora: {stop}", file=sys.stderr)
        raise SystemExit(stop.status) from None
    except Diverged as error:
        print(f"fastlora: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    metrics = output / directory.METRICS
    console.print(f"results: {metrics} and {output / directory.REPORT}", highlight=False)


def guarded(output: Path, work: Callable[[], Any]) -> None:
    """Do something; an error that is no refusal is logged, and the log is named.

    Raises:
        Refusal: as the work does, and where the disk is full.
        SystemExit: as the work does; 1 after an unexpected error.
    """
    try:
        work()
    except Refusal:
        raise
    except OSError as error:
        raise _not_written(error.filename or output, error.strerror or str(error)) from error
    except Exception as error:
        if os.strerror(errno.ENOSPC) in str(error):  # as safetensors says it
            raise _not_written(output, os.strerror(errno.ENOSPC)) from error
        log = (output if output.is_dir() else Path()) / f"fastlora-{ERROR_LOG}"
        try:
            log.write_text(traceback.format_exc(), encoding="utf-8")
        except OSError:
            traceback.print_exc()
        print(f"fastlora: unexpected error: {error}; the log is {log}", file=sys.stderr)
        raise SystemExit(1) from error


def _not_written(place: object, reason: str) -> Refusal:
    return Refusal(
        f"the results must be writable, but {place} is not: {reason}; what was saved before is"
        " whole, so free some space and run the same command again"
    )


def compare(
    file: Path, methods: str, seeds: str, overrides: Sequence[str], console: Console
) -> None:
    """Run several methods.

    Raises:
        Refusal: bad input.
    """
    from fastlora.train.compare import compare as run

    config = read_config(file, overrides)
    names = [name.strip() for name in methods.split(",") if name.strip()]
    try:
        numbers = [int(seed) for seed in seeds.split(",")]
    except ValueError:
        raise Refusal(f"--seeds must be whole numbers, as in 0,1,2, got {seeds!r}") from None
    if not names:
        raise Refusal("--methods must name at least one method")
    run(config, names, numbers, console)
