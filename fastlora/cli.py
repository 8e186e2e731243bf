"""The `fastlora` command: `fastlora quickstart --help`."""

import sys
from importlib.util import find_spec

_NEEDED = ("typer", "rich", "yaml", "pydantic", "transformers", "accelerate", "peft", "sklearn")


def main() -> None:
    """Run the command line.

    Bad input is one sentence on standard error and exit status 2.
    """
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        _refuse(f'{", ".join(missing)} not installed; run: pip install "fastlora[train]"')
    from fastlora.train.app import app
    from fastlora.train.refusal import Refusal

    try:
        app()
    except Refusal as refusal:
        _refuse(str(refusal))


def _refuse(sentence: str) -> None:
    print(f"fastlora: {sentence}", file=sys.stderr)
    raise SystemExit(2)
