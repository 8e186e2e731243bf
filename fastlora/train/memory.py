"""What a run needs of memory: a bound before it starts, and a batch size that fits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastlora.patch import tensor_bytes
from fastlora.train.refusal import Refusal
from fastlora.train.tasks.base import Example, Task, to_device

GIB = 2**30
MOST_ROWS = 64
_PER_TRAINED = 12  # bytes of a trained parameter beside its value: gradient and AdamW's two moments


def available_bytes(device: torch.device) -> int:
    """Return how many bytes of memory are free."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free)
    with open("/proc/meminfo", encoding="ascii") as file:
        for line in file:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return 2**62


def needed_bytes(model: nn.Module) -> int:
    """Return what weights, gradients and optimizer take, without activations."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return tensor_bytes(model) + trained * _PER_TRAINED


def check_budget(model: nn.Module, budget_gib: float | None) -> None:
    """Raise unless the weights, gradients and optimizer of a model fit.

    Raises:
        Refusal: they need more than the budget, or than there is.
    """
    needed = needed_bytes(model)
    device = next(model.parameters()).device
    beside = needed - tensor_bytes(model)  # the weights are there already
    if budget_gib is not None and needed > budget_gib * GIB:
        raise Refusal(
            f"the run must fit in train.memory_budget_gib={budget_gib:g}, but weights, gradients"
            f" and optimizer alone need {needed / GIB:.3f} GiB; use quantize, or a method that"
            " trains less"
        )
    if beside > available_bytes(device):
        raise Refusal(
            f"the run must fit in memory, but gradients and optimizer need {beside / GIB:.2f} GiB"
            f" and {available_bytes(device) / GIB:.2f} GiB are free; train less of the model"
        )


def fitting_batch_size(
    task: Task, model: nn.Module, examples: Sequence[Example], budget_gib: float | None
) -> int:
    """Return the largest power of two of rows, at most 64, whose activations fit.

    What autograd keeps is counted for one and for two of the longest rows, and extended.

    Raises:
        Refusal: not even one row fits.
    """
    longest = sorted(examples, key=lambda e: -len(e.get("input_ids", ())))[:2]
    one = _activation_bytes(task, model, longest[:1])
    per_row = max(one, 1)
    if len(longest) > 1:
        per_row = max(_activation_bytes(task, model, longest) - one, 1)
    device = next(model.parameters()).device
    free = available_bytes(device) - (needed_bytes(model) - tensor_bytes(model))
    if budget_gib is not None:
        free = min(free, int(budget_gib * GIB) - needed_bytes(model))
    fixed = max(one - per_row, 0)
    rows = int((free * 0.8 - fixed) // (2 * per_row))  # as much again for what is not kept
    if rows < 1:
        raise Refusal(
            f"one row must fit in memory, but its activations need {2 * one / GIB:.2f} GiB and"
            f" {max(free, 0) / GIB:.2f} GiB are free; lower data.max_length, or use"
            " gradient_checkpointing"
        )
    rows = min(rows, MOST_ROWS, len(examples))
    return int(2 ** (rows.bit_length() - 1))


def _activation_bytes(task: Task, model: nn.Module, examples: Sequence[Example]) -> int:
    """Return the bytes that autograd keeps for a batch, weights left out."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Any:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    device = next(model.parameters()).device
    was_training = model.training
    state = torch.get_rng_state()
    model.train()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = model(**to_device(task.collate(list(examples)), device))
    del outputs
    model.train(was_training)
    torch.set_rng_state(state)
    return sum(kept.values())
