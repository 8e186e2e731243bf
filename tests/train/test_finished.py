"""A finished run reads other data as it read its own, and says what it leaves out."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("peft")
from rich.console import Console

from fastlora.train import finished
from fastlora.train.config import RunConfig, read_config
from fastlora.train.data.rows import Row
from fastlora.train.prepare import prepare
from fastlora.train.refusal import Refusal
from fastlora.train.run import Run
from fastlora.train.tasks import task
from fastlora.train.tasks.seq2seq import spread
from tests.train import world

QUIET = Console(quiet=True)


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def config(directory: Path, name: str, **fields: Any) -> RunConfig:
    train = {"max_steps": 1, **fields.pop("train", {})}
    return read_config(world.write_run(directory, name, "lora", train=train, **fields))


def trained(directory: Path, name: str, **fields: Any) -> Path:
    return Run(config(directory, name, **fields), QUIET).train()


def heard() -> Console:
    return Console(record=True, file=io.StringIO(), width=200)


@pytest.fixture(scope="module")
def reviews(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose text stands in the column "review"."""
    directory = tmp_path_factory.mktemp("reviews")
    world.write_data(directory, "classification")
    for file in directory.glob("*.jsonl"):
        file.write_text(file.read_text().replace('"text"', '"review"'))
    return trained(directory, "classification")


def test_the_learnt_columns_are_read_whatever_else_there_is(reviews: Path, tmp_path: Path) -> None:
    rows = [
        {"text": "no", "hypothesis": "no", "review": f"{word} words", "label": label}
        for word, label in (("good", "plus"), ("bad", "minus"))
    ]
    data = write(tmp_path / "more.jsonl", rows)
    run = finished.Finished(reviews)
    for predict in (False, True):
        assert run.task.columns_in(list(rows[0]), data, predict)["text"] == "review"
        assert "text_pair" not in run.task.columns_in(list(rows[0]), data, predict)
    plain = write(tmp_path / "plain.jsonl", [{k: r[k] for k in ("review", "label")} for r in rows])
    assert finished.evaluate(reviews, data, QUIET) == finished.evaluate(reviews, plain, QUIET)
    other = write(tmp_path / "other.jsonl", [{"text": "good", "label": "plus"}])
    sentence = r"other.jsonl must have the .* but 'review' is missing"
    with pytest.raises(Refusal, match=sentence):
        finished.evaluate(reviews, other, QUIET)
    with pytest.raises(Refusal, match=sentence):
        finished.predict(reviews, other, None, QUIET)


def test_a_run_on_pairs_needs_the_pair(tmp_path: Path) -> None:
    made = task("classification")(config(tmp_path, "classification"))
    made.columns = {"text": "premise", "text_pair": "hypothesis", "label": "label"}
    with pytest.raises(Refusal, match=r"more.jsonl must have .* but 'hypothesis' is missing"):
        made.columns_in(["premise", "label"], "more.jsonl", True)
    found = made.columns_in(["premise", "hypothesis"], "more.jsonl", True)
    assert found == {"text": "premise", "text_pair": "hypothesis"}


def test_a_bad_row_is_named_or_left_out(reviews: Path, tmp_path: Path) -> None:
    rows = [{"review": text, "label": "plus"} for text in ("good", "", "yes")]
    data = write(tmp_path / "rows.jsonl", rows)
    sentence = r"rows.jsonl:2: 'review' must not be empty; mend it"
    with pytest.raises(Refusal, match=sentence):
        finished.predict(reviews, data, None, QUIET)
    with pytest.raises(Refusal, match=sentence):
        finished.evaluate(reviews, data, QUIET)
    file = reviews / "run.yaml"
    before = file.read_text()
    file.write_text(before.replace("bad_rows: stop", "bad_rows: skip"))
    try:
        console = heard()
        assert len(finished.predict(reviews, data, tmp_path / "answers.jsonl", console)) == 2
        found = [json.loads(x) for x in (tmp_path / "answers.jsonl").read_text().splitlines()]
        assert [row["review"] for row in found] == ["good", "yes"]
        assert "1 bad rows left out; the first:" in console.export_text()
        console = heard()
        finished.evaluate(reviews, data, console)
        assert "test: 1 bad rows left out" in console.export_text()
    finally:
        file.write_text(before)


def test_a_conversation_is_answered_and_cuts_are_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    world.write_data(tmp_path, "instruction")
    for file in tmp_path.glob("*.jsonl"):
        file.write_text(file.read_text().replace('"messages"', '"dialog"'))
    fields = {"messages": "dialog", "max_new_tokens": 1}
    output = trained(tmp_path, "instruction", data=fields, train={"learning_rate": 0.0})
    assert "base: " in (output / "report.html").read_text()
    assert " ...\n" in (output / "report.html").read_text()  # the samples are cut, and say so
    turns = [{"role": "user", "content": "a small model"}]
    data = write(tmp_path / "open.jsonl", [{"dialog": turns}])
    console = heard()
    answers = finished.predict(output, data, tmp_path / "answers.jsonl", console)
    assert len(answers) == 1 and answers[0]["cut"]
    assert "1 of 1 answers were cut at 1 tokens" in console.export_text()
    finished.predict(output, data, None, QUIET)
    said = capsys.readouterr()
    assert json.loads(said.out)["prediction"] == answers[0] and "were cut" in said.err
    with pytest.raises(Refusal, match=r"open.jsonl:1: a conversation must have an answer"):
        finished.evaluate(output, data, QUIET)
    other = write(tmp_path / "prompts.jsonl", [{"prompt": "a small model"}])
    with pytest.raises(Refusal, match=r"must have .* but 'dialog' is missing"):
        finished.predict(output, other, None, QUIET)


def test_alpaca_is_asked_with_its_input(tmp_path: Path) -> None:
    row = {"instruction": "a small", "input": "model reads", "output": "yes", "system": "good"}
    for split in world.COUNTS:
        write(tmp_path / f"{split}.jsonl", [row, {**row, "output": "no"}])
    made: Any = task("instruction")(config(tmp_path, "instruction"))
    prepare(made, made.config.data, 0)
    learnt = made.examples(Row(row, "x"), True)[0]["input_ids"]
    open_row = {key: value for key, value in row.items() if key != "output"}
    made.columns = made.columns_in(list(open_row), "rows", True)
    asked = made.ask(Row(open_row, "x"))
    assert asked == learnt[: len(asked)] and len(learnt) - len(asked) == 2  # the answer, its end
    # other forms of conversations are answered too
    assert made.columns_in(["prompt"], "rows", True) == {"prompt": "prompt"}
    assert made.columns_in(["messages"], "rows", True) == {"messages": "messages"}
    with pytest.raises(Refusal, match="the rows must have messages"):
        made.columns_in(["a"], "rows", True)


def test_generated_scores_say_of_how_many_rows_they_are(tmp_path: Path) -> None:
    output = trained(tmp_path, "seq2seq", data={"max_new_tokens": 1})
    metrics = json.loads((output / "metrics.json").read_text())
    assert metrics["data"]["new_tokens"] == 1
    sentence = "are of the outputs for 8 of 8 rows, of which 8 were cut at 1 tokens"
    assert sentence in metrics["notes"][0]
    assert sentence in (output / "report.html").read_text()
    assert "the model writes at most 1 tokens" in (output / "report.html").read_text()
    console = heard()
    finished.evaluate(output, str(tmp_path / "test.jsonl"), console)
    assert sentence in console.export_text()


def test_the_longest_answer_bounds_what_is_written(tmp_path: Path) -> None:
    made = task("seq2seq")(config(tmp_path, "seq2seq"))
    prepare(made, made.config.data, 0)
    for length, most in ((91, 91), (5, 64)):
        made.measure({"train": [{"labels": [1] * length}], "valid": [{"labels": [1] * 3}]})
        assert made.new_tokens == most
    (tmp_path / "talk").mkdir()
    talk = task("instruction")(config(tmp_path / "talk", "instruction"))
    prepare(talk, talk.config.data, 0)
    answers = [-100, *[1] * 60, -100, *[1] * 3]
    talk.measure({"train": [{"labels": answers}], "valid": [{"labels": [1] * 3}]})
    assert talk.new_tokens == 64  # the model has no place for more


def test_outputs_are_scored_on_rows_from_everywhere() -> None:
    rows = [{"n": i} for i in range(1000)]
    chosen = [row["n"] for row in spread(rows, 4)]
    assert chosen == [0, 250, 500, 750] and spread(rows[:3], 4) == rows[:3]
