"""Prefix and prompt tuning reach the model, in training and in generation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")
from rich.console import Console

from fastlora.train import results
from fastlora.train.config import read_config
from fastlora.train.models import Loaded
from fastlora.train.run import Run
from fastlora.train.strategies import strategy
from tests.train import world


def tuned(method: str, kind: str, task_type: str) -> Any:
    """A tiny model with virtual tokens whose values are far from zero."""
    import transformers

    config, name = world.config_of(kind)
    if task_type == "SEQ_CLS":
        name = "BertForSequenceClassification"
    torch.manual_seed(0)
    base = getattr(transformers, name)(config).eval()
    model = strategy(method)({"num_virtual_tokens": 3}).apply(Loaded(base, [], []), task_type, 0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=2.0)
    return model.eval()


def step_by_step(model: Any, tokens: torch.Tensor, count: int) -> torch.Tensor:
    """Greedy tokens, each from a forward over all before it."""
    for _ in range(count):
        logits = model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits
        tokens = torch.cat([tokens, logits[:, -1:].argmax(-1)], 1)
    return tokens


@pytest.mark.parametrize("method", ["prefix", "prompt"])
def test_generation_uses_the_virtual_tokens(method: str) -> None:
    model = tuned(method, "llama", "CAUSAL_LM")
    tokens = torch.randint(4, 20, (2, 6), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        want = step_by_step(model, tokens, 5)
        got = model.generate(
            input_ids=tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=5,
            do_sample=False, eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        with model.disable_adapter():
            without = step_by_step(model, tokens, 5)
    assert torch.equal(got, want)
    assert not torch.equal(want, without)


def test_the_report_finds_the_patched_base(tmp_path: Path) -> None:
    file = world.write_run(tmp_path, "classification", "prefix", quantize="nf4")
    rows = results.patch_rows(Run(read_config(file), Console(quiet=True)).model)
    assert rows is not None and {row["format"] for row in rows["modules"]} == {"nf4"}
    assert results.patch_rows(torch.nn.Linear(2, 2)) is None


def test_an_encoder_takes_the_prefix() -> None:
    model = tuned("prefix", "bert", "SEQ_CLS")
    tokens = torch.randint(4, 20, (2, 6), generator=torch.Generator().manual_seed(1))
    given = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    logits = model(**given).logits
    logits.sum().backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if "prompt_encoder" in n)
    with torch.no_grad():
        assert not torch.allclose(model.get_base_model()(**given).logits, logits)
