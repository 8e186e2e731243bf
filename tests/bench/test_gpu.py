from __future__ import annotations

import sys
import time

import pytest
import torch

from bench import gpu, gpu_cases


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


def test_the_most_telling_cases_come_first_and_none_twice() -> None:
    cases = gpu_cases.all_cases()
    assert len(set(cases)) == len(cases)
    assert cases[0] == gpu_cases.Case("lora", 28672, 8192, 1, "forward")
    assert {case.what for case in cases} == {"lora", "fp8", "loha", "lokr", "dora", "adapters"}
    assert {case.m for case in cases} == {*gpu_cases.FEW, *gpu_cases.MANY}


@pytest.mark.parametrize("what", ["lora", "fp8", "loha", "lokr", "dora", "adapters"])
@pytest.mark.parametrize("step", ["forward", "forward+backward"])
def test_every_case_runs(what: str, step: str, capsys: pytest.CaptureFixture[str]) -> None:
    """On the CPU, small, so that no slip waits for a GPU."""
    case = gpu_cases.Case(what, 64, 128, 16, step)
    row = gpu.measure(case, "cpu", 0.01)
    assert row["ms"]["fastlora"] > 0 and row["times"]
    assert not row["left_out"]
    assert (row["error"] is None) == (what != "fp8") and not (row["error"] or 0.0) > 0.06
    gpu.show(row)
    assert "against" in capsys.readouterr().out


def test_the_time_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    cases = [gpu_cases.Case("lora", 64, 128, 4, "forward")] * 3
    assert gpu.run_cases(cases, "cpu", 0.0, write=False) == cases


@pytest.mark.parametrize("what", ["lora", "loha", "lokr", "dora"])
def test_missing_peers_are_left_out(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "peft", None)
    row = gpu.measure(gpu_cases.Case(what, 64, 128, 16, "forward"), "cpu", 0.01)
    assert row["ms"]["fastlora"] > 0 and len(row["left_out"]) == 1 and "peft" in row["left_out"][0]


def test_a_failed_case_does_not_stop_the_others(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    case = gpu_cases.Case("lora", 64, 128, 4, "forward")
    build, calls = gpu_cases.build, []

    def sometimes(case: gpu_cases.Case, device: str) -> object:
        calls.append(case)
        if len(calls) == 1:
            raise RuntimeError("out of resource: shared memory")
        return build(case, device)

    monkeypatch.setattr(gpu_cases, "build", sometimes)
    assert gpu.run_cases([case, case], "cpu", time.monotonic() + 60, write=False) == []
    out = capsys.readouterr().out
    assert "left out: RuntimeError: out of resource" in out and "against" in out
