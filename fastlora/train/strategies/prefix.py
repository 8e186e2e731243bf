"""Prefix tuning: trained keys and values before those of every attention (arXiv:2101.00190)."""

from __future__ import annotations

from peft import PrefixTuningConfig

from fastlora.train.strategies.prompt_learning import PromptLearning


class Prefix(PromptLearning):
    """Prefix tuning; the section `adapter` holds the fields of PEFT's PrefixTuningConfig."""

    name = "prefix"
    learning_rate = 1e-2
    config_class = PrefixTuningConfig
    tasks = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "CAUSAL_LM", "SEQ_2_SEQ_LM")
    recomputes = False  # gradients would not reach the prefix


STRATEGY = Prefix
