"""Runs that are interrupted, killed or damaged go on, and end with the same bits."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")
from rich.console import Console
from safetensors.torch import load_file

from fastlora.train import checkpoints, directory, memory
from fastlora.train.arguments import resolve
from fastlora.train.callbacks import Clock
from fastlora.train.config import parse_yaml, read_config
from fastlora.train.refusal import Refusal
from fastlora.train.run import Interrupted, Run
from tests.train import world

QUIET = Console(quiet=True)
DROPOUT: dict[str, Any] = {
    "adapter": {"r": 2, "lora_dropout": 0.2},
    "train": {"max_steps": 9, "gradient_accumulation_steps": 2, "warmup_ratio": 0.2},
}


def losses(output: Path) -> list[Any]:
    return [
        (r["step"], r["loss"], r["grad_norm"]) for r in directory.read_log(output / "log.jsonl")
    ]


def weights(output: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = load_file(next((output / "model").glob("*.safetensors")))
    return found


def whole(tmp_path: Path, method: str = "lora", **fields: Any) -> tuple[Path, Path]:
    """An uninterrupted run; returns its YAML and its output."""
    file = world.write_run(tmp_path, "classification", method, **fields)
    Run(read_config(file), QUIET).train()
    return file, tmp_path / "out"


def check_equal(first: Path, second: Path) -> None:
    assert losses(first) == losses(second)
    ours, theirs = weights(first), weights(second)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)
    scores = [json.loads((p / "metrics.json").read_text())["tuned"] for p in (first, second)]
    assert scores[0] == scores[1]


@pytest.mark.parametrize("step", [1, 4, 5])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_the_same_command_goes_on(
    tmp_path: Path, step: int, number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, first = whole(tmp_path, **DROPOUT)
    output = tmp_path / "again"
    config = read_config(file, [f"output={output}"])
    stopped = Run(config, QUIET)

    def send(self: Clock, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == step:
            os.kill(os.getpid(), number)

    with monkeypatch.context() as patch:
        patch.setattr(Clock, "on_step_begin", send)
        with pytest.raises(Interrupted, match=f"after step {step + 1}, which is saved") as stop:
            stopped.train()
    assert stop.value.status == 128 + number
    assert not (output / "metrics.json").exists()
    resumed = Run(config, QUIET)
    assert resumed.resumes
    resumed.train()
    check_equal(first, output)


def test_full_fine_tuning_with_early_stopping_resumes(tmp_path: Path) -> None:
    extra = {
        "train": {"max_steps": 12, "early_stopping_patience": 2, "eval_steps": 2, "save_steps": 2}
    }
    file, first = whole(tmp_path, "full", **extra)
    output = tmp_path / "again"
    config = read_config(file, [f"output={output}"])
    run = Run(config, QUIET)
    run.train()
    kept = sorted(checkpoints.steps(output / "checkpoints"))
    (output / "metrics.json").unlink()  # as if it was killed just before the end
    Run(config, QUIET).train()
    check_equal(first, output)
    assert json.loads((output / "metrics.json").read_text())["best_step"] in kept


@pytest.mark.parametrize("stopping", [{}, {"early_stopping_patience": 5, "eval_steps": 1}])
def test_a_run_killed_after_its_last_step_only_ends(
    tmp_path: Path, stopping: dict[str, int]
) -> None:
    steps = {"max_steps": 5, "save_steps": 1, "lr_scheduler_type": "constant"}
    _, first = whole(tmp_path, train={**steps, "learning_rate": 3.0, **stopping})
    output = tmp_path / "moved"
    shutil.copytree(first, output)
    (output / "metrics.json").unlink()
    text = (output / "run.yaml").read_text().replace(str(first), str(output))
    (output / "run.yaml").write_text(text)
    Run(read_config(output / "run.yaml"), QUIET).train()
    check_equal(first, output)
    found = [json.loads((p / "metrics.json").read_text()) for p in (first, output)]
    assert [run["steps"] for run in found] == [5, 5]
    assert found[0]["seconds"] > found[1]["seconds"] > 0  # without what came after the checkpoint
    assert found[0]["best_step"] == found[1]["best_step"]


@pytest.mark.parametrize("name", ["adamw_bnb_8bit", "paged_adamw_8bit", "paged_adamw_32bit"])
def test_an_optimizer_of_bitsandbytes_resumes(tmp_path: Path, name: str) -> None:
    pytest.importorskip("bitsandbytes")
    file, first = whole(tmp_path, "full", train={"optim": name})
    output = tmp_path / "again"
    config = read_config(file, [f"output={output}"])
    Run(config, QUIET).train()
    (output / "metrics.json").unlink()
    shutil.rmtree(output / "checkpoints" / "checkpoint-6")
    Run(config, QUIET).train()
    check_equal(first, output)
    kept = output / "checkpoints" / "checkpoint-4" / "optimizer.safetensors"
    assert any("state1" in key for key in load_file(kept))


def test_a_resumed_run_counts_all_its_seconds(tmp_path: Path) -> None:
    file, output = whole(tmp_path)
    first = json.loads((output / "metrics.json").read_text())["seconds"]
    (output / "metrics.json").unlink()
    shutil.rmtree(output / "checkpoints" / "checkpoint-6")
    place = output / "checkpoints" / "checkpoint-4"
    files = checkpoints.read(place)
    checkpoints.write(place.parent, 4, {**files, "seconds.json": b"1000.0"})
    Run(read_config(file), QUIET).train()
    again = json.loads((output / "metrics.json").read_text())["seconds"]
    assert first < 1000 < again < 1000 + 60


def test_a_run_whose_data_changed_does_not_go_on(tmp_path: Path) -> None:
    file, output = whole(tmp_path)
    (output / "metrics.json").unlink()
    data = tmp_path / "test.jsonl"
    before = data.read_text()
    data.write_text(before.replace("good", "bad"))
    with pytest.raises(Refusal, match=r"the data must be what .* but test changed; put"):
        Run(read_config(file), QUIET)
    data.write_text(before + "\n")  # the same rows
    Run(read_config(file), QUIET)


def test_a_resumed_run_keeps_the_batch_size_that_it_chose(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, output = whole(tmp_path, train={"per_device_train_batch_size": "auto"})
    (output / "metrics.json").unlink()
    monkeypatch.setattr(memory, "fitting_batch_size", lambda *_: 2)
    assert Run(read_config(file), QUIET).arguments.per_device_train_batch_size == 16


def test_the_written_file_is_resolved_and_is_the_run_s_too(tmp_path: Path) -> None:
    unset = ["train={max_steps: 2}", "method=loha"]
    config = read_config(world.write_run(tmp_path, "classification", "lora"), unset)
    output = Run(config, QUIET).train()
    written = parse_yaml((output / "run.yaml").read_text(), "run.yaml")["train"]
    assert written["learning_rate"] == 5e-4 and written["lr_scheduler_type"] == "linear"
    assert written["weight_decay"] == 0.01 and written["seed"] == 0
    assert written["per_device_train_batch_size"] == 8 and "num_train_epochs" not in written
    (output / "metrics.json").unlink()
    assert Run(config, QUIET).resumes
    assert Run(read_config(output / "run.yaml"), QUIET).resumes


# Each attempt is a process of its own, forked from one that has imported everything.
KILLER = """
import json, os, signal, sys, threading, time
from pathlib import Path
import peft, transformers.trainer, transformers.models.bert.modeling_bert
from rich.console import Console
from fastlora.train import checkpoints, trainer
from fastlora.train.config import read_config
from fastlora.train.run import Run
real, count = checkpoints.write_file, 0
def attempt(kill_at, seconds):
    def counted(path, data):
        global count
        count += 1
        if count == kill_at:
            path.write_bytes(data[: len(data) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        real(path, data)
    def kill():
        time.sleep(seconds)
        os.kill(os.getpid(), signal.SIGKILL)
    checkpoints.write_file = counted
    run = Run(read_config(Path(sys.argv[1]), [f"output={sys.argv[2]}"]), Console(quiet=True))
    threading.Thread(target=kill, daemon=True).start()
    run.train()
    os._exit(0)
killed = 0
for kill_at, seconds in json.loads(sys.argv[3]):
    child = os.fork()
    if child == 0:
        try:
            attempt(kill_at, seconds)
        finally:
            os._exit(1)
    status = os.waitpid(child, 0)[1]
    if status == 0:
        break  # the run was over before
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, status
    killed += 1
print(killed, flush=True)
"""


def test_sigkill_at_ten_moments(tmp_path: Path) -> None:
    fields = {**DROPOUT, "train": {**DROPOUT["train"], "max_steps": 30}}
    file, first = whole(tmp_path, **fields)
    output, draw = tmp_path / "again", random.Random(0)
    moments = [  # five at any time, five while a checkpoint is written
        (draw.randint(1, 20), 60.0) if attempt % 2 else (10**6, draw.uniform(0, 0.4))
        for attempt in range(10)
    ]
    command = [sys.executable, "-c", KILLER, str(file), str(output), json.dumps(moments)]
    done = subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True)
    assert done.returncode == 0 and int(done.stdout.split()[-1]) >= 5
    if not (output / "metrics.json").exists():
        assert directory.read_log(output / "log.jsonl")
        Run(read_config(file, [f"output={output}"]), QUIET).train()
    check_equal(first, output)
    assert not list((output / "checkpoints").glob(".*"))


@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(
    tmp_path: Path, damage: str
) -> None:
    file, first = whole(tmp_path, **DROPOUT)
    output = tmp_path / "again"
    config = read_config(file, [f"output={output}"])
    Run(config, QUIET).train()
    (output / "metrics.json").unlink()
    newest = checkpoints.steps(output / "checkpoints")[0]
    victim = output / "checkpoints" / f"checkpoint-{newest}" / "optimizer.safetensors"
    data = bytearray(victim.read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 1
        victim.write_bytes(data)
    elif damage == "cut":
        victim.write_bytes(data[:-1])
    else:
        victim.unlink()
    console = Console(record=True, width=200, file=open(os.devnull, "w"))  # noqa: SIM115
    Run(config, console).train()
    text = console.export_text()
    assert f"the checkpoint of step {newest} is damaged" in text and "going on after step" in text
    check_equal(first, output)


def test_every_flipped_byte_and_every_cut_is_found(tmp_path: Path) -> None:
    files = {"a.safetensors": b"0123456789" * 3, "b.json": b"{}"}
    path = checkpoints.write(tmp_path, 3, files)
    assert checkpoints.read(path) == files
    for name in (*files, checkpoints.MANIFEST):
        good = (path / name).read_bytes()
        for i in range(len(good)):
            (path / name).write_bytes(good[:i] + bytes([good[i] ^ 4]) + good[i + 1 :])
            with pytest.raises(checkpoints.DamagedCheckpoint):
                checkpoints.read(path)
            (path / name).write_bytes(good[:i])
            with pytest.raises(checkpoints.DamagedCheckpoint):
                checkpoints.read(path)
        (path / name).write_bytes(good)


def test_a_full_disk_keeps_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints.write(tmp_path, 1, {"a": b"old"})
    real, left = vars(checkpoints)["write_file"], [1]

    def full(path: Path, data: bytes) -> None:
        if not left[0]:
            raise OSError(28, "No space left on device", str(path))
        left[0] -= 1
        real(path, data)

    monkeypatch.setattr(checkpoints, "write_file", full)
    for step in (1, 2):
        left[0] = 1
        with pytest.raises(OSError, match="No space left"):
            checkpoints.write(tmp_path, step, {"a": b"new", "b": b"more"})
    assert checkpoints.read(tmp_path / "checkpoint-1") == {"a": b"old"}
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-1"]


def test_a_replaced_checkpoint_survives_a_kill_between_the_renames(tmp_path: Path) -> None:
    checkpoints.write(tmp_path, 1, {"a": b"old"})
    (tmp_path / "checkpoint-1").rename(tmp_path / ".checkpoint-old-1-99")
    checkpoints.clean(tmp_path)
    assert checkpoints.read(tmp_path / "checkpoint-1") == {"a": b"old"}


def test_an_unfinished_run_of_another_config_is_left_alone(tmp_path: Path) -> None:
    file, output = whole(tmp_path)
    with pytest.raises(Refusal, match="holds a finished run"):
        Run(read_config(file), QUIET)
    (output / "metrics.json").unlink()
    with pytest.raises(Refusal, match="unfinished run that differs in train"):
        Run(read_config(file, ["train.learning_rate=1e-4"]), QUIET)
    with (
        directory.claimed(resolve(read_config(file))),
        pytest.raises(Refusal, match="another run writes"),
    ):
        Run(read_config(file), QUIET).train()
