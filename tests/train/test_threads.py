"""The number of threads is the one that was fastest."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from fastlora.train import threads


@pytest.mark.parametrize("best", [1, 2, 4])
def test_picks_the_fastest(best: int, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[int] = []

    def seconds(work: Callable[[], object]) -> float:
        tried.append(torch.get_num_threads())
        return 1.0 if tried[-1] == best else 2.0

    monkeypatch.setattr(threads, "_seconds", seconds)
    torch.set_num_threads(4)
    assert threads.fastest_threads(lambda: None) == best
    assert torch.get_num_threads() == best
    assert set(tried) == {1, 2, 4}
