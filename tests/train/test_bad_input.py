"""Bad input of `fastlora train`: one sentence, exit status 2, and nothing written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("peft")
import torch
from rich.console import Console

from fastlora.train import finished
from fastlora.train.config import parse_yaml, read_config
from fastlora.train.nonfinite import Diverged
from fastlora.train.refusal import Refusal
from fastlora.train.run import Run
from tests.train import world

QUIET = Console(quiet=True)

BAD: list[tuple[list[str], str]] = [
    (["model=nowhere/at/all"], "model must be a directory, a hub id, timm:NAME or nano"),
    (["task=clasification"], "task must be known, got 'clasification'; did you mean 'classific"),
    (["task=seq2seq", "data.source=text", "data.target=label"], "must be able to do the task"),
    (["method=lorra"], "method must be known, got 'lorra'; did you mean 'lora'"),
    (["data.train=none.jsonl"], "data.train must exist, but there is no file or folder none.jsonl"),
    (["data.text=txt"], "data.text must name a column of the data, got 'txt'; did you mean 'text'"),
    (["data.question=text"], "data.question must be a column that the task reads"),
    (["data.lable=label"], r"must have known keys, got 'data.lable'; did you mean 'label'"),
    (["data.max_length=1"], "the value of data.max_length is wrong"),
    (["trian={}"], "must have known keys, got 'trian'; did you mean 'train'"),
    (["train.learning_rat=1"], "a key of train must be known, got 'learning_rat'; did you mean"),
    (["train.learning_rate=fast"], "train.learning_rate must be a number"),
    (["train.learning_rate=.inf"], "train.learning_rate must be finite"),
    (["train.max_steps=1.5"], "train.max_steps must be a whole number"),
    (["train.lr_scheduler_type=zigzag"], "train: .*zigzag"),
    (["train.warmup_ratio=2"], "train.warmup_ratio must be at least 0 and below 1"),
    (["train.memory_budget_gib=0.00001"], "must fit in train.memory_budget_gib=1e-05, but"),
    (["train.layerwise_lr_decay=0"], "train.layerwise_lr_decay must be a number above 0"),
    (["train.seed=abc"], "train.seed must be a whole number, got 'abc'"),
    (["train.seed=-1"], "train.seed must be a whole number of at least 0, got -1"),
    (["train.seed=1.5"], "train.seed must be a whole number, got 1.5"),
    (["train.seed=4294967296"], "train.seed must be at most 4294967295"),
    (["train.per_device_train_batch_size=-1"], "train_batch_size must be a whole number of at lea"),
    (["train.per_device_eval_batch_size=-1"], "eval_batch_size must be a whole number of at least"),
    (["train.weight_decay=abc"], "train.weight_decay must be a number, got 'abc'"),
    (["train.bf16=1"], "train.bf16 must be true or false, got 1"),
    (["train.num_train_epochs=0"], "train.num_train_epochs must be above 0"),
    (["train.max_steps=0"], "train.max_steps must be a whole number of at least 1, or -1"),
    (["train.early_stopping_patience=2", "train.eval_strategy=no"], "train.eval_strategy is 'no'"),
    (["train.report_to=tensorboard"], "train: .*tensorboard"),
    (["train.lr_scheduler_type=warmup_stable_decay"], "train: .*num_decay_steps"),
    (["train.optim=adamw_nope"], "train: .*adamw_nope"),
    (["train.optim_args=betas"], "train: "),
    (
        ["train.dataloader_drop_last=true", "train.per_device_train_batch_size=25"],
        "train.per_device_train_batch_size must be at most the number of training rows, 24",
    ),
    (["train.max_length=7", "data.max_length=8"], "train.max_length must be what data.max_length"),
    (["adapter.rank=3"], "a key of adapter, for method lora, must be known, got 'rank'"),
    (["adapter.r=0"], "adapter: r must be between 1 and 4096"),
    (["adapter.r=4000"], "the rank of .* must be at most 32"),
    (["adapter.target_modules=[nope]"], "must match an nn.Linear"),
    (["method=partial", "adapter={blocks: 9}"], "adapter.blocks must be at most 3"),
    (["method=full", "adapter={}", "quantize=nf4"], "quantize must be left out for method full"),
    (["quantize=int4"], "the value of quantize is wrong"),
    (["method=prefix", "adapter={}", "data.packing=true"], "data.packing must be false"),
    (["method=prefix", "adapter={}", "train.gradient_checkpointing=true"], "for method prefix, wh"),
    (["no-equals"], "an override must be key=value"),
    (["model.x=3"], "in 'model.x' 'model' is a value"),
    (["model=timm:resnet18"], "must read text"),
]


def made(directory: Path, *overrides: str) -> Run:
    return Run(read_config(world.write_run(directory, "classification", "lora"), overrides), QUIET)


@pytest.mark.parametrize(("overrides", "sentence"), BAD, ids=[b[0][0] for b in BAD])
def test_bad_values(tmp_path: Path, overrides: list[str], sentence: str) -> None:
    with pytest.raises(Refusal, match=sentence) as refused:
        made(tmp_path, *overrides)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "out").exists()


ROWS: list[tuple[str, list[Any], str]] = [
    ("train", [], "data.train must hold at least one row"),
    ("train", ["{broken"], r"train.jsonl:1 must be a JSON object"),
    ("train", [{"text": "a", "label": "x"}, [1]], r"train.jsonl:2 must be a JSON object, got list"),
    ("train", [{"text": "a", "label": "x"}] * 3, "must have at least 2 classes"),
    ("train", [{"text": t, "label": "plus" if t else "minus"} for t in ("a", "")], "not be empty"),
    ("train", [{"body": "a", "kind": "x"}], "must have a column of kind 'label'"),
    ("test", [{"text": "a", "label": "never"}], "test must occur in train, but .*'never'"),
    (
        "test",
        [{"txt": "a", "label": "plus"}],
        "must have the columns of the training rows, but 'te",
    ),
]


@pytest.mark.parametrize(("split", "rows", "sentence"), ROWS, ids=[r[2][:30] for r in ROWS])
def test_bad_rows(tmp_path: Path, split: str, rows: list[Any], sentence: str) -> None:
    world.write_data(tmp_path, "classification")
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (tmp_path / f"{split}.jsonl").write_text("\n".join(lines))
    with pytest.raises(Refusal, match=sentence):
        made(tmp_path)
    assert not (tmp_path / "out").exists()


def test_bad_rows_are_skipped_and_counted_when_asked(tmp_path: Path) -> None:
    world.write_data(tmp_path, "classification")
    file = tmp_path / "train.jsonl"
    lines = file.read_text().splitlines()
    file.write_text(
        "\n".join([lines[0], "{", *lines[1:], '{"text": "", "label": "plus"}', lines[0]])
    )
    run = made(tmp_path, "data.bad_rows=skip", "data.duplicates=drop")
    report = run.data.report
    assert report.rows["train"] == world.COUNTS["train"]
    assert len(report.bad["train"]) == 2 and ":2 " in report.bad["train"][0]
    assert report.duplicates["train"] == 1 and report.dropped
    text = " ".join(report.lines())
    assert "train: 2 bad rows left out" in text and "1 rows repeat" in text


def test_leaks_and_labels_are_reported(tmp_path: Path) -> None:
    world.write_data(tmp_path, "classification")
    (tmp_path / "test.jsonl").write_text(
        "\n".join((tmp_path / "train.jsonl").read_text().splitlines()[:3])
    )
    report = made(tmp_path).data.report
    assert report.leaked["test"] == 3 and report.labels == {"minus": 12, "plus": 12}
    assert any("3 rows are in train too" in line for line in report.lines())


def test_a_held_out_share_keeps_the_classes_and_the_seed_decides(tmp_path: Path) -> None:
    world.write_run(tmp_path, "classification", "lora")
    drop = ["data.valid=null", "data.valid_fraction=0.25"]
    places = []
    for seed in (0, 0, 1):
        run = made(tmp_path, *drop, f"train.seed={seed}")
        assert sorted(e["label"] for e in run.data.valid) == [0, 0, 0, 1, 1, 1]
        places.append([e["place"] for e in run.data.valid])
    assert places[0] == places[1] != places[2]


def test_other_files_in_the_output_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep")
    with pytest.raises(Refusal, match="output must be new or empty"):
        made(tmp_path)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["mine.txt"]


def test_a_log_of_an_error_before_the_start_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "fastlora-error.log").write_text("Traceback")
    assert not made(tmp_path).resumes


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("a: [1", "must be YAML"),
        ("a: &x 1\nb: *x", "must not use aliases"),
        ("a: 1\na: 2", "the key 'a' appears twice"),
        ("a: !!python/object/apply:os.system [ls]", "must be YAML"),
    ],
)
def test_yaml_that_is_refused(text: str, sentence: str) -> None:
    with pytest.raises(Refusal, match=sentence):
        parse_yaml(text, "run.yaml")


def test_numbers_are_numbers() -> None:
    found = parse_yaml("{a: 1e-3, b: 2.5, c: -3E4, d: 12, e: 1e5, f: no, g: true, h: null}", "x")
    values = [0.001, 2.5, -30000.0, 12, 1e5, "no", True, None]
    assert found == dict(zip("abcdefgh", values, strict=True))


def _poison(run: Run, steps: set[int]) -> None:
    calls = [0]
    forward = run.model.classifier.forward

    def poisoned(x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = forward(x)
        if run.model.training:
            calls[0] += 1
            if calls[0] in steps:
                return y * float("nan")
        return y

    run.model.classifier.forward = poisoned


def test_steps_that_are_not_finite_are_skipped_and_never_logged_as_zero(tmp_path: Path) -> None:
    run = made(tmp_path)
    _poison(run, {2, 4})
    run.train()
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["skipped_steps"] == 2
    log = [json.loads(x) for x in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    assert [row["loss"] is None for row in log] == [False, True, False, True, False, False]
    assert all(row["loss"] != 0 for row in log)
    assert all(torch.isfinite(p).all() for p in run.model.parameters())


def test_a_run_that_diverges_stops_and_says_where(tmp_path: Path) -> None:
    run = made(tmp_path, "train.max_bad_steps=3")
    with torch.no_grad():
        run.model.get_submodule("bert.encoder.layer.1.output.LayerNorm").weight.fill_(float("inf"))
    layer = r"bert\.encoder\.layer\.1\.output\.LayerNorm"
    sentence = rf"at step 3 after 3 steps .* first in the output of {layer} .*jsonl:\d+.* rate"
    with pytest.raises(Diverged, match=sentence):
        run.train()


def test_a_finished_run_must_be_one(tmp_path: Path) -> None:
    with pytest.raises(Refusal, match="must hold a run"):
        finished.Finished(tmp_path)


def test_the_command_exits_with_2_and_one_sentence(tmp_path: Path) -> None:
    file = world.write_run(tmp_path, "classification", "lora")
    command = [sys.executable, "-m", "fastlora", "train", str(file), "data.text=txt"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=dict(os.environ)
    )
    said = [line for line in done.stderr.splitlines() if "gemm_4bit" not in line]
    assert (
        done.returncode == 2 and len(said) == 1 and said[0].startswith("fastlora: data.text must")
    )
    assert not (tmp_path / "out").exists()


FULL_DISK = """
import resource, sys
from pathlib import Path
from rich.console import Console
from fastlora.train import commands
from fastlora.train.refusal import Refusal
import signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]),) * 2)
try:
    commands.train(Path(sys.argv[1]), [], Console(quiet=True))
except Refusal as refusal:
    print("REFUSED", refusal)
"""


@pytest.mark.parametrize(("method", "limit"), [("full", 40_000), ("lora", 6_000)])
def test_a_file_that_cannot_be_written_is_named(tmp_path: Path, method: str, limit: int) -> None:
    file = world.write_run(tmp_path, "classification", method)
    command = [sys.executable, "-c", FULL_DISK, str(file), str(limit)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "REFUSED the results must be writable" in done.stdout, done.stderr[-2000:]
    assert "File too large" in done.stdout
    assert not (tmp_path / "out" / "metrics.json").exists()
    assert not list((tmp_path / "out").rglob("checkpoint-*"))


def test_an_unexpected_error_says_where_its_log_is(tmp_path: Path) -> None:
    from fastlora.train.commands import guarded

    def broken() -> None:
        raise KeyError("what")

    with pytest.raises(SystemExit) as stop:
        guarded(tmp_path, broken)
    assert stop.value.code == 1
    assert "KeyError: 'what'" in (tmp_path / "fastlora-error.log").read_text()
