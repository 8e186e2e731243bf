"""Learning rates of groups, batch sizes that fit, and options that go to the Trainer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")
from rich.console import Console

import fastlora
from fastlora.train import memory
from fastlora.train.arguments import Extras, split_arguments
from fastlora.train.config import read_config
from fastlora.train.groups import depths, parameter_groups
from fastlora.train.refusal import Refusal
from fastlora.train.run import Run
from tests import offline
from tests.train import world

QUIET = Console(quiet=True)


def made(
    directory: Path, *overrides: str, method: str = "lora", task: str = "classification"
) -> Run:
    return Run(read_config(world.write_run(directory, task, method), overrides), QUIET)


def test_lower_blocks_learn_more_slowly(tmp_path: Path) -> None:
    run = made(tmp_path, method="full")
    groups = parameter_groups(
        run.model, 1.0, 0.1, Extras(layerwise_lr_decay=0.5), run.head, {"classifier.weight"}
    )
    rates = {id(p): (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}
    found = {n: rates[id(p)] for n, p in run.model.named_parameters()}
    assert found["classifier.weight"] == (1.0, 0.1) and found["classifier.bias"] == (1.0, 0.0)
    for block, rate in ((2, 0.5), (1, 0.25), (0, 0.125)):
        assert found[f"bert.encoder.layer.{block}.output.dense.weight"] == (rate, 0.0)
    assert found["bert.embeddings.word_embeddings.weight"] == (0.0625, 0.0)
    assert found["bert.pooler.dense.weight"] == (1.0, 0.0)
    assert sum(len(g["params"]) for g in groups) == len(found)


def test_lora_plus() -> None:
    model = fastlora.patch_model(offline.llama(), fastlora.LoraConfig(r=2))
    groups = parameter_groups(model, 1e-3, 0.0, Extras(loraplus_lr_ratio=16.0), [], set())
    names = {id(p): n for n, p in model.named_parameters()}
    rates = {names[id(p)]: g["lr"] for g in groups for p in g["params"]}
    assert {r for n, r in rates.items() if n.endswith("lora_B")} == {16e-3}
    assert {r for n, r in rates.items() if n.endswith("lora_A")} == {1e-3}


def test_a_model_without_blocks_has_no_depths() -> None:
    assert depths(torch.nn.Linear(2, 2), []) == {}


def test_the_batch_size_that_fits(tmp_path: Path) -> None:
    run = made(tmp_path, "train.per_device_train_batch_size=auto")
    assert run.arguments.per_device_train_batch_size == 16  # of 24 rows, as much as there is
    free = memory.needed_bytes(run.model)
    one = memory._activation_bytes(run.task, run.model, run.data.train[:1])
    assert one > 10_000
    longest = sorted(run.data.train, key=lambda e: -len(e["input_ids"]))
    two = memory._activation_bytes(run.task, run.model, longest[:2])
    budget = (free + 2 * 5 * two) / memory.GIB
    small = memory.fitting_batch_size(run.task, run.model, run.data.train, budget)
    assert small in (4, 8)
    with pytest.raises(Refusal, match="one row must fit in memory"):
        memory.fitting_batch_size(run.task, run.model, run.data.train, free / memory.GIB)


def test_early_stopping_takes_the_best_weights(tmp_path: Path) -> None:
    overrides = [
        "train.early_stopping_patience=1",
        "train.learning_rate=10.0",
        "train.max_steps=30",
    ]
    run = made(tmp_path, *overrides, "train.eval_steps=2", "train.save_steps=2")
    run.train()
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["steps"] < 30 and metrics["best_step"] < metrics["steps"]


@pytest.mark.parametrize(
    "option",
    [
        "bf16=true",
        "gradient_checkpointing=true",
        "neftune_noise_alpha=5",
        "label_smoothing_factor=0.1",
        "lr_scheduler_type=cosine",
        "optim=adafactor",
        "train_sampling_strategy=random",
        "max_grad_norm=0.0",
        "layerwise_lr_decay=0.9",
    ],
)
def test_options_of_the_trainer(tmp_path: Path, option: str) -> None:
    made(tmp_path, f"train.{option}").train()
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["steps"] == 6 and metrics["skipped_steps"] == 0


@pytest.mark.parametrize("task", ["causal-lm", "instruction"])
def test_packing_keeps_texts_apart(tmp_path: Path, task: str) -> None:
    packed = made(tmp_path, "data.packing=true", task=task)
    apart = made(tmp_path, task=task)
    assert len(packed.data.train) < len(apart.data.train)
    tokens = [sum(len(e["input_ids"]) for e in r.data.train) for r in (packed, apart)]
    assert tokens[0] == tokens[1]
    row = packed.data.train[0]
    starts = [i for i, p in enumerate(row["position_ids"]) if p == 0]
    assert len(starts) > 1
    model = packed.model.eval()
    with torch.no_grad():
        whole = model(**packed.task.collate([row])).logits[0]
        for start, end in zip(starts, [*starts[1:], len(row["input_ids"])], strict=True):
            alone = {"input_ids": row["input_ids"][start:end], "labels": row["labels"][start:end]}
            logits = model(**packed.task.collate([alone])).logits[0]
            torch.testing.assert_close(whole[start:end], logits, rtol=1e-4, atol=1e-4)


def test_unknown_and_wrong_fields() -> None:
    with pytest.raises(Refusal, match="did you mean 'num_train_epochs'"):
        split_arguments({"num_train_epoch": 3})
    with pytest.raises(Refusal, match="early_stopping_patience must be at least 1"):
        split_arguments({"early_stopping_patience": 0})
    fields, extras = split_arguments({"num_train_epochs": 2, "max_bad_steps": 3})
    assert fields == {"num_train_epochs": 2} and extras.max_bad_steps == 3


def test_fields_of_trl_are_those_of_data(tmp_path: Path) -> None:
    fields = ["packing=true", "max_length=24", "assistant_only_loss=false"]
    file = world.write_run(tmp_path, "instruction", "lora", data={"max_length": 24})
    data = read_config(file, [f"train.{field}" for field in fields]).data
    assert data.packing and data.max_length == 24 and not data.assistant_only
