"""What the tests of checkpoints share."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A checkpoint of several shards."""
    from tests import offline  # needs transformers

    path = tmp_path / "dense"
    offline.llama(torch.bfloat16).save_pretrained(path, max_shard_size="60KB")
    assert len(list(path.glob("*.safetensors"))) > 2
    return path
