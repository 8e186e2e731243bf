"""What rows, columns and texts become, and what is said of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from torch import nn

pytest.importorskip("transformers")
pytest.importorskip("peft")
from rich.console import Console

from fastlora.train import retention
from fastlora.train.config import read_config
from fastlora.train.data import rows as rows_module
from fastlora.train.data.rows import BadRow, Row, read_rows
from fastlora.train.prepare import Prepared, prepare
from fastlora.train.refusal import Refusal
from fastlora.train.run import Run
from fastlora.train.spans import overlap
from fastlora.train.tasks import task
from fastlora.train.tasks.base import Evaluation
from fastlora.train.tasks.labels import sort_classes
from tests import offline
from tests.train import world

QUIET = Console(quiet=True)


def prepared(directory: Path, name: str, *overrides: str, method: str = "lora") -> Any:
    """Return a task that has read its data, and the data; no model is loaded."""
    config = read_config(world.write_run(directory, name, method), overrides)
    made = task(name)(config)
    return made, prepare(made, config.data, config.seed)


def test_a_cell_of_any_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "rows.csv"
    long = "word " * 40_000
    file.write_text(f'text,label\n"{long}",a\nshort,b\n')
    found = read_rows(str(file), "train", skip_bad=False)
    assert [row.values["text"] for row in found.rows] == [long, "short"]
    monkeypatch.setattr(rows_module, "_LONGEST_CELL", 100)
    with pytest.raises(Refusal, match=r"rows.csv:2 must be a row of a table, got: .*; mend it"):
        read_rows(str(file), "train", skip_bad=False)
    found = read_rows(str(file), "train", skip_bad=True)
    assert [row.place for row in found.rows] == [f"{file}:3"] and len(found.bad) == 1


def test_classes_in_order() -> None:
    assert sort_classes({"10", "9", "-1"}) == ["-1", "9", "10"]
    assert sort_classes({"²", "1"}) == ["1", "²"]
    assert sort_classes({"--1", "2"}) == ["--1", "2"]
    assert sort_classes({"05", "5", "3"}) == ["3", "05", "5"]


def test_the_only_text_is_divided(tmp_path: Path) -> None:
    lines = "\n".join(offline.sentence(i, 7) for i in range(40))
    (tmp_path / "book.txt").write_text(lines)
    options = [f"data.train={tmp_path / 'book.txt'}", "data.valid=null", "data.test=null"]
    made, data = prepared(tmp_path, "causal-lm", *options, "data.valid_fraction=0.25")
    counts = [sum(len(e["input_ids"]) for e in part) for part in (data.train, data.valid)]
    assert counts[0] == pytest.approx(3 * counts[1], rel=0.15)
    first, second = made.halves(Row({"text": lines}, "x"), 0.25)
    assert first.values["text"] + second.values["text"] == lines
    assert second.values["text"].startswith("\n")
    said = "the last 25% of the only training row"
    assert any(said in note for note in data.report.notes)


@pytest.mark.parametrize("text", ["word", "one  "])
def test_what_cannot_be_divided_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "book.txt").write_text(text)
    with pytest.raises(Refusal, match="must be at least 2, so that one can be held out"):
        prepared(tmp_path, "causal-lm", f"data.train={tmp_path / 'book.txt'}", "data.valid=null")


def test_a_single_row_of_another_task_is_not_its_own_validation(tmp_path: Path) -> None:
    world.write_data(tmp_path, "seq2seq")
    file = tmp_path / "train.jsonl"
    file.write_text(file.read_text().splitlines()[0])
    with pytest.raises(Refusal, match=r"but .*train.jsonl:1 is the only one; add rows"):
        prepared(tmp_path, "seq2seq", "data.valid=null")


def without_limit(directory: Path) -> None:
    """Remove what the tokenizer says of the model's places."""
    file = directory / "tokenizer_config.json"
    said = json.loads(file.read_text())
    del said["model_max_length"]
    file.write_text(json.dumps(said))


@pytest.mark.parametrize(
    ("method", "limited"), [("lora", False), ("prefix", True), ("prompt", False)]
)
def test_texts_at_full_length_fit_the_model(tmp_path: Path, method: str, limited: bool) -> None:
    world.write_data(tmp_path, "classification")
    for file in tmp_path.glob("*.jsonl"):
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        long = [json.dumps({**row, "text": row["text"] + " word" * 90}) for row in rows]
        file.write_text("\n".join(long))
    file = world.write_run(tmp_path, "classification", method, data={"max_length": 512})
    if not limited:
        without_limit(tmp_path / "bert")
    run = Run(read_config(file, ["train.max_steps=1"]), QUIET)
    most = 64 if method == "lora" else 61
    assert {len(example["input_ids"]) for example in run.data.train} == {most}
    beside = "" if method == "lora" else " beside 3 virtual tokens"
    said = f"max_length is {most}, the most that the model takes{beside}, not 512"
    assert said in run.data.report.notes
    run.train()


def test_virtual_tokens_must_leave_places(tmp_path: Path) -> None:
    with pytest.raises(Refusal, match=r"num_virtual_tokens must leave places .* 63 of the .* 64"):
        prepared(tmp_path, "classification", "adapter.num_virtual_tokens=63", method="prompt")


def test_a_prompt_must_leave_room(tmp_path: Path) -> None:
    made, _ = prepared(tmp_path, "causal-lm")
    assert len(made.ask(Row({"text": "word " * 60}, "x"))) == 60
    with pytest.raises(BadRow, match="must leave room in the model's 64 tokens, but it has 70"):
        made.ask(Row({"text": "word " * 70}, "x"))


def test_a_question_must_leave_room_for_the_context(tmp_path: Path) -> None:
    made, _ = prepared(tmp_path, "question-answering")
    row = {"question": "which word", "context": "good " * 50, "answers": "good"}
    assert len(made.examples(Row(row, "x"), False)) > 1
    for count in (29, 30, 31, 40):
        asked = {**row, "question": "which " * count}
        if count < 31:
            assert made.examples(Row(asked, "x"), False)
        else:
            with pytest.raises(BadRow, match=r"the question must leave room .* in 32 tokens"):
                made.examples(Row(asked, "x"), False)


def test_any_right_answer_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastlora.train.tasks import question_answering

    made, _ = prepared(tmp_path, "question-answering")
    context = "many small words"
    golds = {"text": ["many", "small words"], "answer_start": [0, 5]}
    rows = [golds, ["many", "small words"], "many"]
    asked = [Row({"question": "which", "context": context, "answers": gold}, "x") for gold in rows]
    examples = [{**made.examples(row, False)[0], "place": str(i)} for i, row in enumerate(asked)]

    class Out:
        loss = 0.0

    monkeypatch.setattr(question_answering, "batches", lambda *_: [([0, 1, 2], {}, Out())])
    given = [(0, 1.0, "the small words"), (1, 1.0, "small"), (2, 1.0, "small words")]
    monkeypatch.setattr(question_answering, "_answers", lambda *_: given)
    found: Evaluation = made.evaluate(None, examples, 3)
    assert found.scores["exact_match"] == pytest.approx(1 / 3)
    assert found.scores["f1"] == pytest.approx((1 + overlap("small words", "small") + 0) / 3)


def test_an_empty_text_to_remember_is_named_or_left_out(tmp_path: Path) -> None:
    (tmp_path / "old.jsonl").write_text('{"text": "yes no good"}\n{"text": ""}\n')
    option = f"data.retain={tmp_path / 'old.jsonl'}"
    made, data = prepared(tmp_path, "causal-lm", option)
    with pytest.raises(Refusal, match=r"old.jsonl:2: 'text' must not be empty; mend it"):
        retention.old_texts(made, data.report, nn.Identity())
    made, data = prepared(tmp_path, "causal-lm", option, "data.bad_rows=skip")
    found = retention.old_texts(made, data.report, nn.Identity())
    assert found is not None and len(found[1]) == 1
    assert data.report.rows["retain"] == 1 and len(data.report.bad["retain"]) == 1


def test_what_was_found_is_stored_with_the_columns(tmp_path: Path) -> None:
    data: Prepared = prepared(tmp_path, "classification")[1]
    assert data.report.columns == {"text": "text", "label": "label"}
    assert data.report.new_tokens is None
