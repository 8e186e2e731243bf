"""How much of the base is left: are its features of the same inputs still what they were?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastlora.train.config import ROLES
from fastlora.train.data.cleaning import CleaningReport
from fastlora.train.data.columns import find_columns
from fastlora.train.data.rows import read_rows
from fastlora.train.masked import MaskedText, module_of
from fastlora.train.prepare import examples_of
from fastlora.train.tasks.base import Example, Task, to_device
from fastlora.train.tasks.causal_lm import CausalLM
from fastlora.train.tasks.language import LanguageTask
from fastlora.train.tasks.text import TextTask

LOOKED_AT = 32


def features(task: Task, model: nn.Module, body: str, examples: Sequence[Example]) -> Tensor:
    """Return what the pre-trained body gives for each input alone, averaged over places: (M, H).

    Args:
        task: makes batches of the examples.
        model: the whole model, adapters included.
        body: the name of the module in it that was pre-trained, without what wraps it.
        examples: the inputs; the first 32 are taken.
    """
    found: list[Tensor] = []
    module = module_of(model, body)

    def keep(_: nn.Module, __: Any, output: Any) -> None:
        first = output[0] if isinstance(output, tuple) else output
        hidden: Any = getattr(first, "last_hidden_state", first)
        hidden = hidden[0] if isinstance(hidden, tuple) else hidden
        wide: Tensor = hidden.detach().float()
        found.append(wide.mean(dim=1)[0] if wide.dim() == 3 else wide.flatten(2).mean(dim=2)[0])

    handle = module.register_forward_hook(keep)
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            for example in examples[:LOOKED_AT]:
                model(**to_device(task.collate([example]), device))
    finally:
        handle.remove()
        model.train(was_training)
    return torch.stack(found[:LOOKED_AT])


def old_texts(
    task: Task, report: CleaningReport, base: nn.Module
) -> tuple[LanguageTask, list[Example]] | None:
    """Return the examples of data.retain and the task that scores them; None: there are none.

    A language model is scored on the next word, another one on words that are masked.

    Args:
        task: of the run.
        report: what is found in the texts is added to it.
        base: the model as it was loaded.

    Raises:
        Refusal: the texts can't be read, or the model can't be scored on them.
    """
    source = task.config.data.retain
    if source is None or not isinstance(task, TextTask):
        return None
    plain = (CausalLM if isinstance(task, LanguageTask) else MaskedText)(task.config)
    plain.tokenizer, plain.max_length, plain.places = task.tokenizer, task.max_length, task.places
    if isinstance(plain, MaskedText):
        plain.take(base)
    rows = read_rows(source, "retain", task.config.data.bad_rows == "skip")
    roles = {name: None for name in ROLES}
    data = task.config.data.model_copy(update=roles)
    plain.columns = find_columns(data, rows.columns, ["text"], (), source)
    return plain, examples_of(plain, rows.rows, "retain", report)


def body_of(model: nn.Module) -> str | None:
    """Return the name of a model's pre-trained body; None: it is not known."""
    name = getattr(model, "base_model_prefix", None)
    return name if name and isinstance(getattr(model, name, None), nn.Module) else None


def similarity(before: Tensor, after: Tensor) -> float:
    """Return the mean cosine between features; 1: nothing was forgotten."""
    return float(functional.cosine_similarity(before, after, dim=-1).mean())
