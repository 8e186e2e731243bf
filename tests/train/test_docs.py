"""Every YAML in the documentation runs, on tiny data; every task and method has its page."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("peft")
from rich.console import Console

from fastlora.train import starters
from fastlora.train.config import RunConfig, as_config, parse_yaml, read_config
from fastlora.train.data.rows import Row
from fastlora.train.refusal import Refusal
from fastlora.train.run import Run
from fastlora.train.strategies import strategies
from fastlora.train.tasks import tasks
from tests.train import world
from tests.train.test_runs import fits

QUIET = Console(quiet=True)
RENAMED = {"regression": ("label", "score")}  # the page's name of a column


def test_every_task_and_method_has_a_page() -> None:
    assert set(starters.pages("tasks")) == set(tasks())
    assert set(starters.pages("methods")) == set(strategies())


def prepared(directory: Path, task: str) -> list[str]:
    """Write tiny data under the names that the pages use; return overrides for a tiny model."""
    world.write_data(directory, task)
    if task in RENAMED:
        ours, page = RENAMED[task]
        for file in directory.glob("*.jsonl"):
            file.write_text(file.read_text().replace(f'"{ours}"', f'"{page}"'))
    return [f"model={world.save_model(directory, world.MODELS[task])}", "data.max_length=32"]


@pytest.mark.parametrize("task", sorted(tasks()))
def test_the_yaml_of_a_task(task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    starters.write(task, Path("run.yaml"), QUIET)
    overrides = [*prepared(tmp_path, task), "train.max_steps=2", "adapter.r=2"]
    if parse_yaml(Path("run.yaml").read_text(), "run.yaml")["model"] == "nano":
        overrides = ["train.max_steps=1", "data.max_length=64"]
    output = Run(read_config(Path("run.yaml"), overrides), QUIET).train()
    assert json.loads((output / "metrics.json").read_text())["task"] == task


@pytest.mark.parametrize("method", sorted(strategies()))
def test_the_yaml_of_a_method(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text(starters.yaml_of(starters.pages("methods")[method]))
    overrides = [*prepared(tmp_path, "classification"), "train.max_steps=2"]
    output = Run(read_config(Path("run.yaml"), overrides), QUIET).train()
    assert json.loads((output / "metrics.json").read_text())["method"] == method


@pytest.mark.parametrize("task", sorted(tasks()))
def test_the_rows_of_a_page_are_rows_of_the_task(task: str) -> None:
    page = starters.pages("tasks")[task]
    block = re.search(r"```json\n(.*?)```", page, re.DOTALL)
    assert block is not None
    rows = [Row(json.loads(line), "page") for line in block.group(1).splitlines()]
    config = read_config_of(page)
    columns = tasks()[task](config).find_columns(list(rows[0].values))
    assert set(columns.values()) <= set(rows[0].values)


def read_config_of(page: str) -> RunConfig:
    return as_config(parse_yaml(starters.yaml_of(page), "page"), "page")


@pytest.mark.parametrize("task", sorted(tasks()))
def test_the_page_of_a_task_names_the_methods_that_it_takes(task: str) -> None:
    line = re.search(r"^method: (\w+) +# or (.*)$", starters.pages("tasks")[task], re.MULTILINE)
    assert line is not None
    named = {line.group(1), *line.group(2).split(", ")}
    assert named == {method for method in strategies() if fits(task, method)}


def test_starters_are_refused_where_a_file_is(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("mine")
    with pytest.raises(Refusal, match="the file must be new"):
        starters.write("classification", tmp_path / "run.yaml", QUIET)
    with pytest.raises(Refusal, match="did you mean 'regression'"):
        starters.write("regresion", tmp_path / "other.yaml", QUIET)
    assert (tmp_path / "run.yaml").read_text() == "mine"
