"""The benchmark of the adapter methods runs and says what its targets are about."""

from __future__ import annotations

import pytest

pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")

from bench import engine


def test_it_runs_and_prints_its_ratios(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "SHAPES", {"small": (256, 128)})
    monkeypatch.setattr(engine, "GROUPS", {"small group": (128, (64, 32))})
    options = ["--shapes", "small", "--groups", "small group", "--tokens", "16"]
    assert engine.main([*options, "--seconds", "0", "--no-write"]) == 0
    out = capsys.readouterr().out
    for name in ("loha", "lokr", "dora", "group", "8 adapters", "8 adapters, unsorted rows"):
        assert f"  {name}: " in out, name
    assert "faster than PEFT's" in out
    assert "appended" not in out
