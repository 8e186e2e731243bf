"""LoKr: the update is the Kronecker product of two small matrices."""

from __future__ import annotations

from fastlora import LoKrConfig
from fastlora.train.strategies.low_rank import LowRankStrategy


class LoKr(LowRankStrategy):
    """LoKr; the section `adapter` holds the fields of `fastlora.LoKrConfig`."""

    name = "lokr"
    learning_rate = 5e-4
    config_class = LoKrConfig


STRATEGY = LoKr
