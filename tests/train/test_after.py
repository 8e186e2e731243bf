"""What comes after training: merge, eval, predict, chat, compare, doctor."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")
from rich.console import Console

from fastlora.train import commands, doctor, finished
from fastlora.train import compare as comparing
from fastlora.train.config import read_config
from fastlora.train.refusal import Refusal
from fastlora.train.run import Run
from tests import offline
from tests.train import world

QUIET = Console(quiet=True)


def trained(directory: Path, task: str, method: str, **fields: Any) -> Path:
    return Run(read_config(world.write_run(directory, task, method, **fields)), QUIET).train()


@pytest.mark.parametrize("method", ["full", "partial", "lora", "dora", "loha", "lokr"])
def test_a_merged_model_is_plain_and_scores_the_same(tmp_path: Path, method: str) -> None:
    import transformers

    output = trained(tmp_path, "classification", method)
    finished.merge(output, tmp_path / "merged", QUIET)
    plain = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    words = transformers.AutoTokenizer.from_pretrained(tmp_path / "merged")
    run = finished.Finished(output)
    assert plain.config.id2label == {0: "minus", 1: "plus"}
    rows = [json.loads(line) for line in (tmp_path / "test.jsonl").read_text().splitlines()]
    for row in rows[:3]:
        inputs = words(row["text"], return_tensors="pt")
        with torch.no_grad():
            torch.testing.assert_close(
                plain.eval()(**inputs).logits, run.model(**inputs).logits, rtol=1e-4, atol=1e-5
            )


def test_merging_folds_into_the_dense_base(tmp_path: Path) -> None:
    import transformers

    output = trained(tmp_path, "causal-lm", "lora", quantize="nf4")
    finished.merge(output, tmp_path / "merged", QUIET)
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "llama")
    norm = "model.layers.0.input_layernorm.weight"
    assert torch.equal(plain.get_parameter(norm), base.get_parameter(norm))
    far = plain.model.layers[0].mlp.up_proj.weight - base.model.layers[0].mlp.up_proj.weight
    assert torch.linalg.matrix_rank(far.detach(), atol=1e-5) <= 2
    assert "quantization_config" not in json.loads((tmp_path / "merged/config.json").read_text())


def test_what_cannot_be_merged_is_refused(tmp_path: Path) -> None:
    output = trained(tmp_path, "classification", "adapter")
    with pytest.raises(Refusal, match="must change only weights to be merged, but adapter adds"):
        finished.merge(output, tmp_path / "merged", QUIET)
    assert not (tmp_path / "merged").exists()


def test_predictions_need_no_answers(tmp_path: Path) -> None:
    output = trained(tmp_path, "classification", "lora")
    (tmp_path / "new.jsonl").write_text('{"text": "good words"}\n{"text": "bad words"}\n')
    finished.predict(output, str(tmp_path / "new.jsonl"), tmp_path / "answers.jsonl", QUIET)
    found = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert [row["text"] for row in found] == ["good words", "bad words"]
    assert all(row["prediction"]["label"] in ("plus", "minus") for row in found)
    with pytest.raises(Refusal, match="but 'label' is missing"):
        finished.evaluate(output, str(tmp_path / "new.jsonl"), QUIET)


@pytest.mark.parametrize("task", ["instruction", "causal-lm"])
def test_chat(tmp_path: Path, task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    output = trained(tmp_path, task, "lora")
    monkeypatch.setattr("sys.stdin", io.StringIO("a small model\nreads many\n\n"))
    console = Console(record=True, file=io.StringIO(), width=100)
    finished.chat(output, console)
    assert console.export_text().count(">") == 3


def test_chat_needs_a_language_model(tmp_path: Path) -> None:
    output = trained(tmp_path, "classification", "head")
    with pytest.raises(Refusal, match="chat needs a run of task instruction or causal-lm"):
        finished.chat(output, QUIET)


def test_methods_are_compared_and_one_is_recommended(tmp_path: Path) -> None:
    file = world.write_run(tmp_path, "classification", "lora", quantize="nf4")
    commands.compare(file, "head,full", "0,1", [f"output={tmp_path / 'cmp'}"], QUIET)
    found = json.loads((tmp_path / "cmp" / "comparison.json").read_text())
    assert [line["method"] for line in found["methods"]] == ["head", "full"]
    assert all(line["seeds"] == 2 and not line["refused"] for line in found["methods"])
    assert found["methods"][0]["retained"] == pytest.approx(1.0, abs=1e-5)
    assert found["methods"][1]["retained"] < 0.99999
    assert found["recommended"].split(":")[0] in ("head", "full")
    page = (tmp_path / "cmp" / "comparison.html").read_text()
    assert page.count("<svg") == 3 and "http" not in page
    with pytest.raises(Refusal, match="method must be known, got 'lorra'"):
        commands.compare(file, "lorra", "0", [], QUIET)
    with pytest.raises(Refusal, match="--seeds must be whole numbers"):
        commands.compare(file, "lora", "a", [], QUIET)


def test_a_method_that_a_task_cannot_take_is_listed_with_the_reason(tmp_path: Path) -> None:
    file = world.write_run(tmp_path, "image-classification", "head")
    lines = comparing.compare(
        read_config(file, [f"output={tmp_path / 'cmp'}"]), ["prompt", "head"], [0], QUIET
    )
    assert "works on tokens" in lines[0].refused and not lines[1].refused


def test_what_a_language_model_forgets_is_measured(tmp_path: Path) -> None:
    (tmp_path / "old.txt").write_text("yes no good bad question answer " * 20)
    old: dict[str, Any] = {"data": {"retain": str(tmp_path / "old.txt")}}
    output = trained(tmp_path, "instruction", "full", **old)
    metrics = json.loads((output / "metrics.json").read_text())
    found = metrics["retain_perplexity"]
    assert found["after"] != found["before"] > 1
    (tmp_path / "images").mkdir()
    file = world.write_run(tmp_path / "images", "image-classification", "lora", **old)
    with pytest.raises(Refusal, match=r"data\.retain is text, but task image-classification"):
        Run(read_config(file), QUIET)


@pytest.mark.parametrize(
    ("method", "quantize"), [("full", None), ("lora", "nf4"), ("prompt", None)]
)
def test_what_an_encoder_forgets_is_measured(
    tmp_path: Path, method: str, quantize: str | None
) -> None:
    import transformers

    config, _ = world.config_of("bert")
    torch.manual_seed(0)
    transformers.BertForMaskedLM(config).save_pretrained(tmp_path / "bert")
    words = offline.tokenizer()
    words.mask_token = "<unk>"
    words.save_pretrained(tmp_path / "bert")
    (tmp_path / "old.txt").write_text("yes no good bad question answer " * 20)
    old: dict[str, Any] = {"data": {"retain": str(tmp_path / "old.txt")}}
    output = trained(tmp_path, "classification", method, quantize=quantize, **old)
    found = json.loads((output / "metrics.json").read_text())["retain_perplexity"]
    assert found["before"] > 1
    # virtual tokens leave the base as it is
    assert (found["after"] == found["before"]) == (method == "prompt")


def test_an_encoder_without_the_layer_of_its_pre_training_is_refused(tmp_path: Path) -> None:
    (tmp_path / "old.txt").write_text("yes no good bad")
    old: dict[str, Any] = {"data": {"retain": str(tmp_path / "old.txt")}}
    file = world.write_run(tmp_path, "classification", "lora", **old)
    with pytest.raises(Refusal, match=r"but .*bert does not have the layer for them; leave it out"):
        Run(read_config(file), QUIET)


def test_recommendation_is_the_cheapest_that_is_as_good() -> None:
    lines = [
        comparing.Line("full", score=0.90, spread=0.01, bytes=100),
        comparing.Line("lora", score=0.895, bytes=10),
        comparing.Line("head", score=0.5, bytes=1),
    ]
    assert comparing.recommend(lines, True, "accuracy").startswith("lora: its accuracy of 0.895")
    lines[1].score = 0.8
    assert comparing.recommend(lines, True, "accuracy").startswith("full: it has the best accuracy")
    losses = [comparing.Line("a", score=1.0, bytes=5), comparing.Line("b", score=2.0, bytes=1)]
    assert comparing.recommend(losses, False, "loss").startswith("a:")


def test_doctor_says_what_runs_here() -> None:
    console = Console(record=True, file=io.StringIO(), width=160)
    doctor.run(console)
    text = console.export_text()
    assert "native" in text and "C++ kernels" in text and "LoKr on nf4 by" in text
