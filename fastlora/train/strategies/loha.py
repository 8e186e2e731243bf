"""LoHa: the update is the Hadamard product of two products of small matrices."""

from __future__ import annotations

from fastlora import LoHaConfig
from fastlora.train.strategies.low_rank import LowRankStrategy


class LoHa(LowRankStrategy):
    """LoHa; the section `adapter` holds the fields of `fastlora.LoHaConfig`."""

    name = "loha"
    learning_rate = 5e-4
    config_class = LoHaConfig


STRATEGY = LoHa
