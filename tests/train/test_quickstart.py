"""`fastlora quickstart`: one short run, and one sentence and status 2 for each bad input."""

from __future__ import annotations

import io
import json
import os
import sys
import tempfile
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from fastlora import cli
from fastlora.adapters import method_of
from fastlora.integrations import causal_lm
from fastlora.nano import MODEL_DIR, corpus
from fastlora.train import quickstart
from fastlora.train.options import METHODS, QuickstartOptions
from fastlora.train.output import free_directory, staged_directory

SHORT = ["--steps", "8", "--batch-size", "2", "--sequence-length", "64", "--rank", "4"]


class Run(NamedTuple):
    directory: Path
    printed: str


def _status(patch: pytest.MonkeyPatch, *arguments: str) -> int:
    patch.setattr(sys, "argv", ["fastlora", *arguments])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    return int(exit_.value.code or 0)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    directory = tmp_path_factory.mktemp("quickstart") / "new" / "run"
    printed = io.StringIO()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(printed):
        patch.setattr(quickstart, "SAMPLE_TOKENS", 8)
        assert _status(patch, "quickstart", *SHORT, "--output", str(directory)) == 0
    torch.set_num_threads(threads)
    return Run(directory, printed.getvalue())


def test_writes_the_adapter_and_a_record(run: Run) -> None:
    names = {p.name for p in run.directory.iterdir()}
    assert names == {"adapter_config.json", "adapter_model.safetensors", "run.json"}
    assert [p.name for p in run.directory.parent.iterdir()] == [run.directory.name]
    record = json.loads((run.directory / "run.json").read_text(encoding="utf-8"))
    assert record["options"]["steps"] == 8
    assert record["peak_memory_bytes"] > 50e6
    assert record["held_out_loss"]["tuned"] < record["held_out_loss"]["base"]


def test_prints_what_happened(run: Run) -> None:
    text = " ".join(run.printed.split())
    for part in ("q_proj", "nf4", "8/8", "perplexity", "tokens per second", "MiB", "PeftModel"):
        assert part in text, part
    assert str(run.directory) in run.printed.replace("\n", "")


def test_peft_loads_the_adapter(run: Run) -> None:
    from peft import PeftModel

    model, tokenizer = causal_lm.load(MODEL_DIR, torch.float32, "cpu")
    ids = causal_lm.encode(tokenizer, [d.text for d in corpus.reference().held_out])[:2048]
    base = causal_lm.mean_loss(model, ids, 64)
    tuned = causal_lm.mean_loss(PeftModel.from_pretrained(model, str(run.directory)), ids, 64)
    assert tuned < base


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_a_config(method: str) -> None:
    config = quickstart.config_of(QuickstartOptions(method=method, rank=6))
    spec = method_of(config).spec(config, "layer", 64, 32)
    assert (spec.label, spec.r, spec.scaling) == (method, 6, 2.0)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--steps", "0"], "steps must be at least 1, got 0"),
        (["--rank", "-1"], "rank must be at least 1, got -1"),
        (["--rank", "1000"], "got 1000"),
        (["--batch-size", "0"], "batch_size must be at least 1, got 0"),
        (["--sequence-length", "1"], "sequence_length must be at least 2, got 1"),
        (["--sequence-length", "513"], "the model's context of 512 tokens, got 513"),
        (["--threads", "-1"], "threads must be at least 0, got -1"),
        (["--seed", "-1"], "seed must be between 0 and 2**32 - 1, got -1"),
        (["--learning-rate", "nan"], "learning_rate must be finite and > 0, got nan"),
        (["--method", "magic"], "method must be one of lora, dora, loha, lokr, got 'magic'"),
        (["--quantize", "int3"], "quantize must be one of nf4, fp4, none, got 'int3'"),
        (["--device", "tpu"], "device must be one of cpu, cuda, got 'tpu'"),
        (["--backend", "slow"], "got 'slow'"),
    ],
)
def test_bad_option(
    arguments: list[str],
    sentence: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "new" / "run"
    assert _status(monkeypatch, "quickstart", *arguments, "--output", str(output)) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert error.startswith("fastlora: ") and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_cuda_without_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--device", "cuda", "--output", str(tmp_path / "run")]
    assert _status(monkeypatch, "quickstart", *arguments) == 2
    assert "use --device cpu" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def _refused(
    output: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> str:
    """Return the sentence; fail where the model was loaded before the refusal."""

    def load(*_: Any) -> None:
        pytest.fail("the model was loaded before the output directory was checked")

    monkeypatch.setattr(causal_lm, "load", load)
    assert _status(monkeypatch, "quickstart", *SHORT, "--output", str(output)) == 2
    error = capsys.readouterr().err
    assert error.startswith("fastlora: the output directory must be ")
    assert error.count("\n") == 1 and error.endswith("; choose another\n")
    return error


def test_output_holds_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.json").write_text("{}", encoding="utf-8")
    assert "holds files" in _refused(tmp_path, monkeypatch, capsys)
    assert [p.name for p in tmp_path.iterdir()] == ["run.json"]


def test_output_is_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").write_text("kept", encoding="utf-8")
    assert "is a file" in _refused(tmp_path / "run", monkeypatch, capsys)
    assert "cannot be created" in _refused(tmp_path / "run" / "below", monkeypatch, capsys)
    assert (tmp_path / "run").read_text(encoding="utf-8") == "kept"


def test_output_without_permission(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(**_: Any) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(tempfile, "mkdtemp", refuse)
    error = _refused(tmp_path / "new" / "run", monkeypatch, capsys)
    assert "cannot be created (Permission denied)" in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_output_in_a_read_only_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tmp_path.chmod(0o500)
    assert "Permission denied" in _refused(tmp_path / "run", monkeypatch, capsys)


def test_interrupted_training_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any) -> float:
        raise KeyboardInterrupt

    monkeypatch.setattr(causal_lm, "finetune", interrupt)
    monkeypatch.setattr(causal_lm, "sample", lambda *_: "")
    monkeypatch.setattr(causal_lm, "mean_loss", lambda *_: 1.0)
    output = tmp_path / "new" / "run"
    assert _status(monkeypatch, "quickstart", *SHORT, "--output", str(output)) == 130
    assert list(tmp_path.iterdir()) == []


def test_missing_extra(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def absent(name: str) -> None:
        return None

    monkeypatch.setattr(cli, "find_spec", absent)
    assert _status(monkeypatch, "quickstart") == 2
    assert 'pip install "fastlora[train]"' in capsys.readouterr().err


def test_help_names_every_option(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _status(monkeypatch, "quickstart", "--help") == 0
    text = capsys.readouterr().out
    for option in ("steps", "rank", "method", "quantize", "output", "device", "seed", "backend"):
        assert f"--{option}" in text


def test_staged_directory_fills_an_empty_one(tmp_path: Path) -> None:
    target = tmp_path / "run"
    target.mkdir()
    with staged_directory(target) as staging:
        (staging / "a").write_text("1", encoding="utf-8")
        assert list(target.iterdir()) == []
    assert [p.name for p in tmp_path.iterdir()] == ["run"]
    assert (target / "a").read_text(encoding="utf-8") == "1"


def test_free_directory_counts_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert free_directory("quickstart") == Path("runs/quickstart")
    Path("runs/quickstart").mkdir(parents=True)
    Path("runs/quickstart-2").mkdir()
    assert free_directory("quickstart") == Path("runs/quickstart-3")
