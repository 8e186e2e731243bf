"""An output directory that appears whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

from fastlora.train.refusal import Refusal

DEFAULT_ROOT = Path("runs")


def free_directory(name: str) -> Path:
    """Return `runs/NAME`, or the first of `runs/NAME-2`, `runs/NAME-3`, ... that does not exist."""
    names = (name if i == 1 else f"{name}-{i}" for i in count(1))
    return next(p for p in (DEFAULT_ROOT / n for n in names) if not os.path.lexists(p))


def check_new(target: Path) -> None:
    """Raise unless a directory can be new: it is not there, or empty.

    Raises:
        Refusal: it is a file or holds something.
    """
    if target.is_file() or (target.is_dir() and any(target.iterdir())):
        kind = "holds files" if target.is_dir() else "is a file"
        raise Refusal(
            f"the output directory must be new or empty, but {target} {kind}; choose another"
        )


def check_file(target: Path) -> None:
    """Raise unless a file can be written, before the work whose result it is to hold.

    Raises:
        Refusal: it is a directory, or the directory where it is to be can't be written.
    """
    if target.is_dir():
        raise Refusal(f"the output must be a file, but {target} is a directory; name another")
    if not target.parent.is_dir():
        raise Refusal(
            f"the output's directory must exist, but there is no {target.parent}; make it, or name"
            " another file"
        )
    try:
        tempfile.TemporaryFile(dir=target.parent).close()
    except OSError as error:
        raise Refusal(
            f"the output must be writable, but {target} cannot be created ({error.strerror}); name"
            " another file"
        ) from error


@contextmanager
def staged_directory(target: Path) -> Iterator[Path]:
    """Yield a hidden directory beside `target` that becomes `target` when the block succeeds.

    Entering writes to the disk, so a directory that cannot be written is known before the work.
    On an exception the hidden directory is removed and `target` is as it was.

    Raises:
        Refusal: `target` is a file or a directory that holds something, or cannot be created.
    """
    check_new(target)
    place = target.resolve()
    made: list[Path] = []
    try:
        made = _make_parents(place.parent)
        staging = Path(tempfile.mkdtemp(prefix=f".{place.name}-", dir=place.parent))
    except OSError as error:
        _remove_empty(made)
        raise Refusal(
            f"the output directory must be writable, but {target} cannot be created"
            f" ({error.strerror}); choose another"
        ) from error
    try:
        yield staging
        staging.chmod(0o777 & ~_umask())
        staging.replace(place)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        _remove_empty(made)
        raise


def _make_parents(directory: Path) -> list[Path]:
    """Create `directory` and its parents; return the ones that are new, deepest first."""
    new = [p for p in (directory, *directory.parents) if not p.exists()]
    directory.mkdir(parents=True, exist_ok=True)
    return new


def _remove_empty(directories: list[Path]) -> None:
    for directory in directories:
        if directory.is_dir() and not any(directory.iterdir()):
            directory.rmdir()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
