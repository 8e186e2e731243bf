"""The contract of `fastlora train`: every task with every method, from file to scores."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")
from rich.console import Console

from fastlora.train import finished
from fastlora.train.config import read_config
from fastlora.train.refusal import Refusal
from fastlora.train.run import Run
from fastlora.train.strategies import strategies
from fastlora.train.tasks import tasks
from tests.train import world

QUIET = Console(quiet=True)
HEADED = {"classification", "regression", "token-classification", "question-answering",
          "image-classification"}  # fmt: skip


def fits(task: str, method: str) -> bool:
    kind = strategies()[method]
    if method == "head":
        return task in HEADED
    if tasks()[task].vision and not kind.vision:
        return False
    return kind.tasks is None or tasks()[task].task_type in kind.tasks


def stored(task: str, method: str) -> list[str | None]:
    frozen = strategies()[method].freezes and task in ("classification", "causal-lm")
    return [None, "nf4"] if frozen else [None]


PAIRS = [(t, m, q) for t in tasks() for m in strategies() if fits(t, m) for q in stored(t, m)]


def run(file: Path, *overrides: str) -> tuple[Run, dict[str, Any]]:
    made = Run(read_config(file, overrides), QUIET)
    output = made.train()
    return made, json.loads((output / "metrics.json").read_text())


@pytest.mark.parametrize(("task", "method", "quantize"), PAIRS)
def test_every_task_with_every_method(
    tmp_path: Path, task: str, method: str, quantize: str | None
) -> None:
    file = world.write_run(tmp_path, task, method, quantize=quantize)
    _, metrics = run(file)
    assert metrics["steps"] == 6 and metrics["skipped_steps"] == 0
    audit = metrics["audit"]
    assert audit.pop("without_gradient") == [] and audit.pop("base_unchanged") is True
    assert all(value == 1.0 for value in audit.values())
    assert set(metrics["base"]) == set(metrics["tuned"])
    assert all(math.isfinite(value) for value in metrics["tuned"].values())
    if method not in ("prefix", "prompt"):  # these begin with a random prompt
        assert metrics["tuned"]["loss"] < metrics["base"]["loss"]
    assert 0 < metrics["trainable_parameters"] <= metrics["total_parameters"]
    assert metrics["checkpoint_bytes"] > 0
    output = tmp_path / "out"
    page = (output / "report.html").read_text()
    assert "http" not in page.replace("http-equiv", "") and "<svg" in page
    log = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in log] == [1, 2, 3, 4, 5, 6]
    # what was saved gives the same scores again
    again = finished.evaluate(output, str(tmp_path / "test.jsonl"), QUIET)
    for name, value in metrics["tuned"].items():
        assert again[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name
    answers = finished.predict(output, str(tmp_path / "test.jsonl"), None, QUIET)
    assert len(answers) == world.COUNTS["test"] and None not in answers


@pytest.mark.parametrize("method", ["full", "head", "partial", "lora", "dora", "loha", "lokr"])
def test_a_convolutional_network(tmp_path: Path, method: str) -> None:
    file = world.write_run(tmp_path, "image-classification", method, model="resnet")
    made, metrics = run(file)
    assert metrics["tuned"]["loss"] < metrics["base"]["loss"]
    assert metrics["audit"] == {"without_gradient": [], "base_unchanged": True}
    if method == "lora":
        adapted = [n for n, p in made.model.named_parameters() if n.endswith("lora_A")]
        assert len(adapted) >= 5
    again = finished.evaluate(tmp_path / "out", str(tmp_path / "test.jsonl"), QUIET)
    assert again["loss"] == pytest.approx(metrics["tuned"]["loss"], rel=1e-4)


def test_a_batch_norm_never_learns_from_one_row(tmp_path: Path) -> None:
    file = world.write_run(tmp_path, "image-classification", "full", model="resnet")
    made, metrics = run(file, "train.per_device_train_batch_size=23", "train.max_steps=4")
    assert made.arguments.dataloader_drop_last and metrics["steps"] == 4
    kept = Run(read_config(file, ["output=" + str(tmp_path / "b")]), QUIET)
    assert not kept.arguments.dataloader_drop_last


def test_frozen_batch_norms_keep_their_statistics(tmp_path: Path) -> None:
    made, _ = run(world.write_run(tmp_path, "image-classification", "lora", model="resnet"))
    fresh = made.task.load(None, widen=None).model
    for (name, ours), (_, theirs) in zip(
        made.model.named_buffers(), fresh.named_buffers(), strict=True
    ):
        assert torch.equal(ours, theirs), name


MISFITS = [(t, m) for t in tasks() for m in strategies() if not fits(t, m)]


@pytest.mark.parametrize(("task", "method"), MISFITS)
def test_methods_that_a_task_cannot_take(tmp_path: Path, task: str, method: str) -> None:
    with pytest.raises(Refusal, match=f"method {method} (works on|can't do|trains the final)"):
        Run(read_config(world.write_run(tmp_path, task, method)), QUIET)
    assert not (tmp_path / "out").exists()
