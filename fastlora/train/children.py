"""Processes that are run one after the other and end when this one is told to."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any


class Children:
    """Runs processes one after the other, and passes signals on to the present one.

    Attributes:
        signal: the number of the first signal that came; None: none.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._child: subprocess.Popen[str] | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take the signals that end a process while the block runs, unless they are ignored."""
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        before = {number: signal.getsignal(number) for number in numbers}
        heard = [number for number in numbers if before[number] is not signal.SIG_IGN]
        for number in heard:
            signal.signal(number, self._take)
        try:
            yield
        finally:
            for number in heard:
                signal.signal(number, before[number])

    def _take(self, number: int, _: Any) -> None:
        self.signal = number if self.signal is None else self.signal
        if self._child is not None:
            self._child.terminate()

    def run(self, command: Sequence[str]) -> tuple[int, str]:
        """Return a process's exit status and what it wrote to standard error.

        It is in a session of its own, so that the terminal's signals reach it through here alone.
        """
        with subprocess.Popen(
            command,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        ) as child:
            self._child = child
            if self.signal is not None:  # it came before there was a child
                child.terminate()
            _, errors = child.communicate()
            self._child = None
        return child.returncode, errors
