"""Options of a quickstart run, checked before anything is loaded."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

METHODS = ("lora", "dora", "loha", "lokr")
QUANTIZATIONS = ("nf4", "fp4", "none")
DEVICES = ("cpu", "cuda")


@dataclass(frozen=True)
class QuickstartOptions:
    """What `fastlora quickstart` was asked for.

    Attributes:
        steps: optimizer steps.
        rank: rank of the adapter; alpha is twice the rank.
        method: one of `METHODS`.
        quantize: storage of the frozen base, one of `QUANTIZATIONS`.
        output: adapter directory to create; None picks the first free `runs/quickstart[-N]`.
        device: "cpu" or "cuda".
        seed: of the adapter, the data order and the sample.
        batch_size: windows per step.
        sequence_length: tokens per window, at most the model's context.
        learning_rate: peak of the schedule.
        backend: "auto" or the name of one of fastlora's backends.
        threads: CPU threads; 0 measures which number is the fastest now.

    Raises:
        ValueError: an option out of range.
    """

    steps: int = 100
    rank: int = 16
    method: str = "lora"
    quantize: str = "nf4"
    output: Path | None = None
    device: str = "cpu"
    seed: int = 0
    batch_size: int = 8
    sequence_length: int = 256
    learning_rate: float = 5e-3
    backend: str = "auto"
    threads: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "rank", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.threads < 0:
            raise ValueError(f"threads must be at least 0, got {self.threads}")
        if self.sequence_length < 2:
            raise ValueError(f"sequence_length must be at least 2, got {self.sequence_length}")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must be between 0 and 2**32 - 1, got {self.seed}")
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise ValueError(f"learning_rate must be finite and > 0, got {self.learning_rate}")
        _one_of("method", self.method, METHODS)
        _one_of("quantize", self.quantize, QUANTIZATIONS)
        _one_of("device", self.device, DEVICES)

    @property
    def quantization(self) -> str | None:
        """The value for `patch_model(quantize=)`."""
        return None if self.quantize == "none" else self.quantize


def _one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
