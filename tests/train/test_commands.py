"""The commands refuse with one sentence, and `compare` goes on, stops and counts as it should."""

from __future__ import annotations

import errno
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("peft")
from rich.console import Console

from fastlora.train import commands, directory, finished
from fastlora.train import compare as comparing
from fastlora.train.config import read_config
from fastlora.train.data.rows import BadRow
from fastlora.train.refusal import Refusal
from fastlora.train.run import Run
from fastlora.train.strategies import strategies
from tests.train import world

QUIET = Console(quiet=True)


def raises(error: Exception) -> Any:
    def work() -> None:
        raise error

    return work


def test_a_second_merge_is_refused(tmp_path: Path) -> None:
    file = world.write_run(tmp_path, "classification", "lora", train={"max_steps": 1})
    output = Run(read_config(file), QUIET).train()
    commands.merge(output, output / "merged", QUIET)
    with pytest.raises(Refusal, match=r"must be new or empty, but .*merged holds files; choose"):
        commands.merge(output, output / "merged", QUIET)
    with pytest.raises(Refusal, match="must be writable, but /proc/x/y cannot be created"):
        commands.merge(output, Path("/proc/x/y"), QUIET)


def test_where_predictions_go_is_checked_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(finished, "predict", lambda *_: pytest.fail("too late"))
    with pytest.raises(Refusal, match=r"there is no .*such; make it, or name another file"):
        commands.predict(tmp_path, "x.jsonl", tmp_path / "no" / "such" / "p.jsonl", QUIET)
    with pytest.raises(Refusal, match=r"must be a file, but .* is a directory"):
        commands.predict(tmp_path, "x.jsonl", tmp_path, QUIET)
    with pytest.raises(Refusal, match=r"but /proc/p\.jsonl cannot be created"):
        commands.predict(tmp_path, "x.jsonl", Path("/proc/p.jsonl"), QUIET)


def test_a_starter_needs_a_place(tmp_path: Path) -> None:
    with pytest.raises(Refusal, match=r"there is no .*such; make it"):
        commands.init("classification", tmp_path / "no" / "such" / "x.yaml", QUIET)
    commands.init("classification", tmp_path / "x.yaml", QUIET)
    with pytest.raises(Refusal, match="the file must be new"):
        commands.init("classification", tmp_path / "x.yaml", QUIET)


def test_only_errors_of_the_output_are_said_to_be_its(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    inside, outside = str(tmp_path / "out" / "x"), str(tmp_path / "data.jsonl")
    for error in (
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EROFS, "Read-only file system", inside),
        OSError(errno.EACCES, "Permission denied", inside),
    ):
        with pytest.raises(Refusal, match="the results must be writable"):
            commands.guarded(Path("out"), raises(error))
    for error in (
        OSError(errno.EACCES, "Permission denied", outside),
        OSError(errno.ENOENT, "No such file or directory", inside),
        ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"),
    ):
        with pytest.raises(SystemExit) as stop:
            commands.guarded(Path("out"), raises(error))
        assert stop.value.code == 1
        log = tmp_path / "fastlora-error.log"
        assert str(error.strerror) in log.read_text()
        log.unlink()


@pytest.mark.parametrize("name", ["evaluate", "predict", "chat", "merge"])
def test_every_command_is_guarded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments: dict[str, list[Any]] = {"predict": ["x", None], "merge": [tmp_path / "new"]}
    arguments |= {"evaluate": ["x"], "chat": []}
    found = [tmp_path, *arguments[name], QUIET]

    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(finished, name, fail)
    error: Exception = BadRow("the text must not be empty")
    with pytest.raises(Refusal, match="the text must not be empty"):
        getattr(commands, name)(*found)
    error = ZeroDivisionError("what")
    with pytest.raises(SystemExit):
        getattr(commands, name)(*found)
    assert f"the log is {tmp_path / 'fastlora-error.log'}" in capsys.readouterr().err


def finish(file: Path, place: Path, score: float | None) -> None:
    """Write what a finished run leaves, in short."""
    place.mkdir(parents=True, exist_ok=True)
    config = comparing.config_of(read_config(file), "head", 0, place)
    directory.write_json(place / "run.yaml", config.as_dict())  # JSON is YAML
    numbers = dict.fromkeys(
        ("trainable_parameters", "checkpoint_bytes", "peak_memory_bytes", "train_seconds"), 1
    )
    metrics = {"tuned": {"accuracy": score}, "base": {"accuracy": None}, **numbers}
    directory.write_json(place / "metrics.json", metrics)


def compared(file: Path, *overrides: str, seeds: str = "0") -> float:
    output = file.parent / "cmp"
    commands.compare(file, "head", seeds, [f"output={output}", *overrides], QUIET)
    found: float = json.loads((output / "comparison.json").read_text())["methods"][0]["score"]
    return found


def test_finished_runs_are_taken_if_they_are_of_this_config(tmp_path: Path) -> None:
    file = world.write_run(tmp_path, "classification", "head")
    finish(file, tmp_path / "cmp" / "head-0", 0.5)
    assert compared(file) == 0.5
    with pytest.raises(Refusal, match=r"head-0 differs in train\.max_steps; choose another outp"):
        compared(file, "train.max_steps=2")
    finish(file, tmp_path / "cmp" / "head-0", None)
    with pytest.raises(Refusal, match="could not be scored: accuracy of seed 0 is not finite"):
        compared(file)
    with (
        directory.locked(tmp_path / "cmp"),
        pytest.raises(Refusal, match="output must not be in use"),
    ):
        compared(file)


def test_all_methods_are_compared_unless_some_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[Any] = []
    monkeypatch.setattr(comparing, "compare", lambda *asked: found.append(asked[1]))
    file = world.write_run(tmp_path, "classification", "head")
    commands.compare(file, None, "0", [], QUIET)
    commands.compare(file, "lora, head,lora", "0", [], QUIET)
    assert found == [list(strategies()), ["lora", "head"]]
    assert found[0][:3] == ["full", "head", "partial"]


def test_what_compare_refuses(tmp_path: Path) -> None:
    file = world.write_run(tmp_path, "classification", "head")
    with pytest.raises(Refusal, match="--seeds must be from 0 to 4294967295, got -1"):
        compared(file, seeds="-1")
    with pytest.raises(Refusal, match="output must be writable, but /proc/foo can't be made"):
        compared(file, "output=/proc/foo")


def test_a_signal_ends_the_present_run_too(tmp_path: Path) -> None:
    endless = {"max_steps": 10**6, "eval_strategy": "no", "save_strategy": "no"}
    file = world.write_run(tmp_path, "classification", "head", train=endless)
    output = tmp_path / "cmp"
    command = [sys.executable, "-m", "fastlora", "compare", str(file), f"output={output}"]
    process = subprocess.Popen(
        [*command, "--methods", "head,lora"], stderr=subprocess.PIPE, text=True
    )
    log = output / "head-0" / "log.jsonl"
    while not log.is_file() or not log.stat().st_size:
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert "run the same command again to go on" in said
    with directory.locked(output / "head-0"):  # nobody has it
        assert list((output / "head-0" / "checkpoints").glob("checkpoint-*"))
    assert not (output / "lora-0").exists()


def test_several_processes_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = world.write_run(tmp_path, "classification", "lora")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(Refusal, match="must run in one process, but WORLD_SIZE is 2; start it"):
        commands.train(file, [], QUIET)
    assert not read_config(file).output.exists()
