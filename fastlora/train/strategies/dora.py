"""DoRA: LoRA, and a trained magnitude of each output."""

from __future__ import annotations

from fastlora import LoraConfig
from fastlora.train.strategies.low_rank import LowRankStrategy


class Dora(LowRankStrategy):
    """DoRA; the section `adapter` holds the fields of `fastlora.LoraConfig`."""

    name = "dora"
    learning_rate = 2e-4
    config_class = LoraConfig
    fixed = {"use_dora": True}


STRATEGY = Dora
