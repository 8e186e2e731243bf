"""What a way of fine-tuning is: what it adds, what it trains, what it saves."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fastlora.train.models import Loaded
from fastlora.train.refusal import Refusal, check_known

WEIGHTS = "trained.safetensors"


class Strategy(ABC):
    """One way of fine-tuning. A file of this folder that has a `STRATEGY` is one.

    Attributes:
        name: as in `RunConfig.method`.
        learning_rate: what it is when the user names none.
        freezes: whether the base's weights stay, so that they may be in 4 bits.
        mergeable: whether the result can be folded into plain weights.
        tasks: PEFT's names of the tasks that it can do; None: every one.
        vision: whether it can do images.
        packs: whether one row may hold several examples, kept apart by their positions.
        recomputes: whether activations may be computed again in the backward pass.
        virtual_tokens: how many of the model's places it takes before those of the input.
    """

    name: ClassVar[str]
    learning_rate: ClassVar[float]
    freezes: ClassVar[bool] = True
    mergeable: ClassVar[bool] = False
    tasks: ClassVar[tuple[str, ...] | None] = None
    vision: ClassVar[bool] = True
    packs: ClassVar[bool] = True
    recomputes: ClassVar[bool] = True
    virtual_tokens: int = 0

    def __init__(self, adapter: Mapping[str, Any]) -> None:
        """Check the fields of the config's `adapter` section.

        Raises:
            Refusal: one is unknown or wrong.
        """
        self.adapter = dict(adapter)

    def take(self, *known: str) -> dict[str, Any]:
        """Return the adapter section after checking that it has no other keys."""
        check_known(f"a key of adapter, for method {self.name},", self.adapter, sorted(known))
        return self.adapter

    @abstractmethod
    def apply(self, loaded: Loaded, task_type: str, seed: int) -> nn.Module:
        """Return the model ready to train: only what is to be trained requires a gradient.

        Raises:
            Refusal: the model can't take it.
        """

    def save(self, model: Any, directory: Path) -> None:
        """Write what was trained."""
        state = {k: v.detach().cpu().contiguous() for k, v in trained_state(model).items()}
        save_file(state, directory / WEIGHTS, metadata={"format": "pt"})

    def load(self, model: Any, directory: Path) -> None:
        """Give a model to which this was applied what `save` wrote.

        Raises:
            Refusal: the file is missing, damaged or of another model.
        """
        load_state(model, read_state(directory / WEIGHTS))

    def merged(self, model: Any) -> nn.Module:
        """Return a plain model of transformers with the result in its weights.

        Raises:
            Refusal: it can't be folded in.
        """
        if not self.mergeable:
            raise Refusal(
                f"the method must change only weights to be merged, but {self.name} adds parts to"
                " the model; use the run's directory with fastlora predict, or train with lora"
            )
        plain: nn.Module = model
        return plain


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """Return everything that training changes: parameters, and buffers beside them."""
    state: dict[str, Tensor] = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for name, module in model.named_modules():
        if any(p.requires_grad for p in module.parameters(recurse=False)):
            for key, value in module.named_buffers(name, recurse=False):
                if key.rpartition(".")[2] not in module._non_persistent_buffers_set:
                    state[key] = value
    return state


def read_state(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a file.

    Raises:
        Refusal: it is missing or damaged.
    """
    if not path.is_file():
        raise Refusal(f"the run must have its weights, but there is no {path}")
    try:
        found: dict[str, Tensor] = load_file(path)
    except SafetensorError as error:
        raise Refusal(
            f"{path} must be a whole safetensors file, but it is damaged: {error}"
        ) from None
    return found


def load_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Give a model the values of `trained_state`, strictly.

    Raises:
        Refusal: names or shapes differ.
    """
    live = trained_state(model)
    differ = sorted(set(live) ^ set(state))
    differ += [name for name in live if name in state and live[name].shape != state[name].shape]
    if differ:
        raise Refusal(
            f"the saved weights must be those of this model, but they differ in {differ[:4]}"
        )
    with torch.no_grad():
        for name, value in live.items():
            value.copy_(state[name])


def only(model: nn.Module, names: list[str]) -> None:
    """Let only the parameters of these modules require a gradient."""
    model.requires_grad_(False)
    for name in names:
        model.get_submodule(name).requires_grad_(True)


def blocks_of(model: nn.Module) -> tuple[str, nn.ModuleList | nn.Sequential]:
    """Return the name and the list of a model's repeated blocks: the list with most parameters.

    Raises:
        Refusal: it has none.
    """
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList | nn.Sequential) and len(module) > 1
    ]
    alike = [(n, m) for n, m in found if isinstance(m, nn.ModuleList)] or found
    if not alike:
        raise Refusal("the model must have a list of blocks for this method, but it has none")
    return max(alike, key=lambda item: sum(p.numel() for p in item[1].parameters()))
