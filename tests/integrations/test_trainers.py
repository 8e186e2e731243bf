"""Trainers over patched models: they train, and with PEFT they log what they log without us."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("trl")
import trl
from transformers import Trainer, TrainingArguments

import fastlora
from tests import offline

STEPS = 6
KINDS = ["peft dense", "peft bnb", "own nf4"]


def made(kind: str, cls: str = "LlamaForCausalLM", task: str = "CAUSAL_LM", **more: Any) -> Any:
    """A model with an adapter: PEFT's, accelerated in place, or ours."""
    model = offline.llama(cls=cls, **more)
    if kind == "own nf4":
        saved = None if task == "CAUSAL_LM" else ["score"]
        config = fastlora.LoraConfig(r=4, lora_alpha=8, modules_to_save=saved)
        return fastlora.patch_model(model, config, quantize="nf4")
    if kind == "peft bnb":
        model = offline.to_bnb(model, torch.float32)
    model = offline.peft_model(model, task_type=task)
    if task != "CAUSAL_LM":
        model.base_model.model.is_loaded_in_4bit = False  # else TRL makes the new head bfloat16
    return fastlora.patch_model(model)


def rows() -> Any:
    words = offline.tokenizer()
    tokens = [words(offline.sentence(i, 8))["input_ids"] for i in range(32)]
    return [{"input_ids": t, "labels": t, "attention_mask": [1] * len(t)} for t in tokens]


def trained(trainer: Any) -> list[float]:
    trainer.train()
    found = offline.losses(trainer)
    assert found and all(loss == loss for loss in found)
    return found


def hf(directory: Path, kind: str, **more: Any) -> Any:
    arguments = TrainingArguments(**offline.arguments(directory, STEPS, **more))
    data = rows()
    return Trainer(
        model=made(kind),
        args=arguments,
        train_dataset=data,
        eval_dataset=data[:8],
        processing_class=offline.tokenizer(),
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "options",
    [
        {"gradient_checkpointing": True},
        {"bf16": True},
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
        {"eval_strategy": "steps", "eval_steps": 3},
    ],
    ids=lambda options: next(iter(options)),
)
def test_trainer(kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    trainer = hf(tmp_path, kind, **options)
    losses = trained(trainer)
    assert losses[-1] < losses[0]
    if "eval_steps" in options:
        assert [1 for entry in trainer.state.log_history if "eval_loss" in entry] == [1, 1]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_trainer_compiles_the_model(kind: str, tmp_path: Path) -> None:
    eager, compiled = (
        trained(hf(tmp_path / str(c), kind, torch_compile=c, max_steps=2)) for c in (False, True)
    )
    assert compiled == pytest.approx(eager, rel=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_ends_as_the_whole_one(kind: str, tmp_path: Path) -> None:
    whole = trained(hf(tmp_path / "whole", kind))
    saving = {"save_strategy": "steps", "save_steps": 3}
    hf(tmp_path / "cut", kind, **saving).train()
    again = hf(tmp_path / "cut", kind)
    again.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-3"))
    assert offline.losses(again)[-3:] == whole[-3:]


def sft(model: Any, directory: Path, **more: Any) -> Any:
    chat = more.get("assistant_only_loss", False)
    return trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(**offline.arguments(directory, STEPS, max_length=32, **more)),
        train_dataset=offline.chats() if chat else offline.lines(),
        processing_class=offline.tokenizer(),
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("option", ["packing", "assistant_only_loss", "gradient_checkpointing"])
def test_sft(kind: str, option: str, tmp_path: Path) -> None:
    losses = trained(sft(made(kind), tmp_path, **{option: True}))
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("kind", KINDS[:2])
def test_dpo_begins_at_the_reference(kind: str, tmp_path: Path) -> None:
    """The reference is the model with its adapter disabled, so the first loss is log 2."""
    trainer = trl.DPOTrainer(
        model=made(kind),
        args=trl.DPOConfig(**offline.arguments(tmp_path, STEPS, max_length=32, beta=0.5)),
        train_dataset=offline.preferences(),
        processing_class=offline.tokenizer(),
    )
    losses = trained(trainer)
    assert losses[0] == pytest.approx(0.693147, abs=1e-5)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("kind", KINDS)
def test_reward(kind: str, tmp_path: Path) -> None:
    model = made(kind, "LlamaForSequenceClassification", "SEQ_CLS", num_labels=1)
    trainer = trl.RewardTrainer(
        model=model,
        args=trl.RewardConfig(**offline.arguments(tmp_path, STEPS, max_length=32)),
        train_dataset=offline.preferences(),
        processing_class=offline.tokenizer(),
    )
    losses = trained(trainer)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("kind", KINDS[:2])
def test_grpo(kind: str, tmp_path: Path) -> None:
    from datasets import Dataset

    def variety(completions: list[str], **_: object) -> list[float]:
        return [float(len(set(text.split()))) for text in completions]

    trainer = trl.GRPOTrainer(
        model=made(kind),
        args=trl.GRPOConfig(
            **offline.arguments(tmp_path, 2, num_generations=4, max_completion_length=6)
        ),
        train_dataset=Dataset.from_list([{"prompt": offline.sentence(i, 3)} for i in range(16)]),
        processing_class=offline.tokenizer(),
        reward_funcs=variety,
    )
    trained(trainer)


@pytest.mark.parametrize("kind", KINDS)
def test_accelerate(kind: str) -> None:
    from accelerate import Accelerator

    model = made(kind)
    accelerator = Accelerator(cpu=True)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    model, optimizer = accelerator.prepare(model, optimizer)
    tokens = torch.tensor([row["input_ids"] for row in rows()[:8]])
    losses = []
    for _ in range(STEPS):
        loss = model(input_ids=tokens, labels=tokens).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_generation_with_a_cache_is_that_without(kind: str, dtype: torch.dtype) -> None:
    model = made(kind).to(dtype).eval()
    tokens = torch.tensor([row["input_ids"][:5] for row in rows()[:3]])
    run: Callable[..., Any] = model.generate
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    cached, anew = (run(input_ids=tokens, use_cache=c, **options) for c in (True, False))
    assert cached.shape == (3, 13)
    if dtype == torch.float32:
        assert torch.equal(cached, anew)
