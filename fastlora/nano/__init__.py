"""A small Llama pre-trained from scratch on CPython's own text: model, corpus, training script."""

from __future__ import annotations

from pathlib import Path

MODEL_DIR: Path = Path(__file__).parent / "model"
"""What `AutoModelForCausalLM.from_pretrained` and `AutoTokenizer.from_pretrained` load."""
