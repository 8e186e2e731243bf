"""LoRA: the update of each linear is the product of two small matrices."""

from __future__ import annotations

from fastlora import LoraConfig
from fastlora.train.strategies.low_rank import LowRankStrategy


class Lora(LowRankStrategy):
    """LoRA; the section `adapter` holds the fields of `fastlora.LoraConfig`."""

    name = "lora"
    learning_rate = 2e-4
    config_class = LoraConfig


STRATEGY = Lora
