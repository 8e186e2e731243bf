from __future__ import annotations

import pytest
import torch

from bench import gpu


def test_without_cuda_it_says_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 2
    assert "needs a CUDA device, found none" in capsys.readouterr().out


def test_nothing_is_timed_after_a_failed_test(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "run_tests", lambda: 1)
    assert gpu.main([]) == 1
    assert "nothing was timed" in capsys.readouterr().out
