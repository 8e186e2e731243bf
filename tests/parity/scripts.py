"""The scripts that run with and without the line: each returns its losses and final adapters."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastlora
from tests import offline

STEPS = 50


@dataclass(frozen=True)
class Script:
    """One training script.

    Attributes:
        method: the adapter's.
        base: "dense" or "bnb".
        trainer: "plain" (a loop), "sft" or "dpo".
        dtype: of the model.
        checkpointing: recompute activations in the backward pass.
    """

    method: str = "lora"
    base: str = "dense"
    trainer: str = "plain"
    dtype: torch.dtype = torch.float32
    checkpointing: bool = False

    def __str__(self) -> str:
        parts = [self.method, self.base, self.trainer, str(self.dtype)[6:]]
        return "-".join(parts + ["checkpointing"] * self.checkpointing)


@dataclass(frozen=True)
class Outcome:
    """Losses of every step, and the adapter's parameters after the last."""

    losses: list[float]
    adapter: dict[str, Tensor]


def run(script: Script, with_the_line: bool, directory: Path) -> Outcome:
    """Train for `STEPS` steps."""
    model = offline.llama(script.dtype)
    if script.base == "bnb":
        model = offline.to_bnb(model, script.dtype)
    model = offline.peft_model(model, script.method, task_type="CAUSAL_LM")
    if script.dtype == torch.float32:
        model.base_model.model.is_loaded_in_4bit = False  # else TRL makes adapters bfloat16
    if with_the_line:
        fastlora.patch_model(model)
    if script.trainer == "plain":
        found = _loop(model, script.checkpointing)
    else:
        found = _trl(model, script, directory)
    adapter = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    return Outcome(found, adapter)


def _loop(model: Any, checkpointing: bool) -> list[float]:
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    tokens = torch.randint(4, 20, (8, 24), generator=torch.Generator().manual_seed(2))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    found = []
    for step in range(STEPS):
        batch = tokens[step % 4 :: 4]
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


def _trl(model: Any, script: Script, directory: Path) -> list[float]:
    import trl

    common = offline.arguments(
        directory, STEPS, max_length=32, gradient_checkpointing=script.checkpointing
    )
    shared = {"model": model, "processing_class": offline.tokenizer()}
    if script.trainer == "sft":
        config = trl.SFTConfig(**common)
        trainer: Any = trl.SFTTrainer(args=config, train_dataset=offline.lines(), **shared)
    else:
        config = trl.DPOConfig(beta=0.1, **common)
        trainer = trl.DPOTrainer(args=config, train_dataset=offline.preferences(), **shared)
    trainer.train()
    return offline.losses(trainer)
