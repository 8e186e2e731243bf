"""Prompt tuning: trained vectors before the input's embeddings (arXiv:2104.08691)."""

from __future__ import annotations

from peft import PromptTuningConfig

from fastlora.train.strategies.prompt_learning import PromptLearning


class Prompt(PromptLearning):
    """Prompt tuning; the section `adapter` holds the fields of PEFT's PromptTuningConfig."""

    name = "prompt"
    learning_rate = 1e-2
    config_class = PromptTuningConfig
    tasks = ("SEQ_CLS", "CAUSAL_LM", "SEQ_2_SEQ_LM")


STRATEGY = Prompt
