"""A transformers causal language model: load, measure, sample, and train with its Trainer."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Recipe:
    """What a training run needs beyond model and data.

    Attributes:
        steps: optimizer steps.
        batch_size: windows per step.
        learning_rate: peak; the schedule warms up over 5 % of the steps, then follows a cosine.
        seed: of the data order.
        device: "cpu" or "cuda".
        work: a directory that the Trainer may create; nothing is saved in it.
    """

    steps: int
    batch_size: int
    learning_rate: float
    seed: int
    device: str
    work: Path


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers' own progress bars and warnings off the terminal for a while."""
    from transformers.utils import logging

    level, shown = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()


def load(directory: Path, dtype: torch.dtype, device: str) -> tuple[Any, Any]:
    """Return (model, tokenizer) from a local directory; nothing is downloaded."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with _quiet():
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, local_files_only=True)
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    return model.to(device), tokenizer


def new_llama(**shape: Any) -> Any:
    """Return a randomly initialised `LlamaForCausalLM`; `shape`: fields of `LlamaConfig`."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**shape))


def tokenizer_of(path: Path, end: str, context: int) -> Any:
    """Return the tokenizer of a `tokenizer.json`; `end` begins, ends and pads a text."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_file=str(path),
        bos_token=end,
        eos_token=end,
        pad_token=end,
        model_max_length=context,
        clean_up_tokenization_spaces=False,
    )


def encode(tokenizer: Any, texts: list[str]) -> Tensor:
    """Return all texts as one int64 row, each begun by the tokenizer's bos token."""
    ids: list[int] = []
    for row in tokenizer(texts, verbose=False, add_special_tokens=False)["input_ids"]:
        ids.append(tokenizer.bos_token_id)
        ids.extend(row)
    return torch.tensor(ids)


@torch.no_grad()
def mean_loss(model: Any, ids: Tensor, length: int, batch_size: int = 8) -> float:
    """Return the mean negative log-likelihood of a row of tokens, in nats per token.

    The row is cut into windows of `length` tokens, the last one shorter; the first token of each
    is context only.
    """
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    whole = ids[: ids.numel() // length * length].view(-1, length)
    groups = [*torch.split(whole, batch_size), ids[whole.numel() :][None]]
    total, count = 0.0, 0
    for group in groups:
        tokens = group.shape[0] * (group.shape[1] - 1)
        if tokens > 0:
            window = group.to(device)
            total += float(model(input_ids=window, labels=window).loss) * tokens
            count += tokens
    model.train(was_training)
    return total / count


@torch.no_grad()
def sample(model: Any, tokenizer: Any, prompt: str, new_tokens: int, seed: int) -> str:
    """Return the model's continuation of `prompt`: temperature 0.7, top 50, drawn from `seed`."""
    was_training = model.training
    model.eval()
    inputs = encode(tokenizer, [prompt])[None].to(next(model.parameters()).device)
    torch.manual_seed(seed)
    with _quiet():
        row = model.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=new_tokens,
            do_sample=True,
            temperature=0.7,
            top_k=50,
            pad_token_id=tokenizer.pad_token_id,
        )[0]
    model.train(was_training)
    return str(tokenizer.decode(row[inputs.shape[1] :], skip_special_tokens=True))


def finetune(
    model: Any, windows: Tensor, recipe: Recipe, on_step: Callable[[int, float], None]
) -> float:
    """Train `model` in place with transformers' Trainer; return the seconds of the steps.

    Args:
        model: a causal language model; only parameters that require a gradient are trained.
        windows: int64 (rows, tokens); every token is an input and a label.
        recipe: steps, batch size, learning rate, seed, device.
        on_step: called after each step with (step, loss).
    """
    from transformers import Trainer, TrainerCallback, TrainingArguments
    from transformers.trainer_callback import PrinterCallback

    class Progress(TrainerCallback):  # type: ignore[misc]
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if logs and "loss" in logs:
                on_step(state.global_step, float(logs["loss"]))

    arguments = TrainingArguments(
        output_dir=str(recipe.work),
        max_steps=recipe.steps,
        per_device_train_batch_size=recipe.batch_size,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, recipe.steps // 20),
        seed=recipe.seed,
        use_cpu=recipe.device == "cpu",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=recipe.device != "cpu",
    )
    rows = [{"input_ids": row, "labels": row} for row in windows]
    with _quiet():
        trainer = Trainer(model, arguments, train_dataset=rows, callbacks=[Progress()])
        trainer.remove_callback(PrinterCallback)
        started = time.perf_counter()
        trainer.train()
    return time.perf_counter() - started
