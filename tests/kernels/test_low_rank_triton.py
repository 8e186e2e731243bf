from __future__ import annotations

import pytest
import torch
from fastlora_kernels import _launch
from fastlora_kernels import low_rank_products as low_rank
from fastlora_kernels.low_rank import LowRank, keep_mask
from torch import Tensor

from tests import contract
from tests.kernels.linear_setup import BF16, FP16, FP32, Setup, check


def spans_of(m: int, r: int) -> list[tuple[int, int]]:
    """Every kind of row: all ranks, none, one, the first, the last; tiles with and without any."""
    kinds = [(0, r), (0, 0), (r // 2, r // 2 + 1), (0, r // 2), (r // 2, r)]
    return [kinds[i % 5] if i % 64 < 32 else (0, 0) for i in range(m)]


@pytest.mark.parametrize("m", [1, 5, 140])
@pytest.mark.parametrize(
    ("dtype", "adapter", "quant"),
    [(BF16, BF16, ("nf4", 64, True)), (FP16, FP32, None), (FP32, FP32, ("fp4", 64, False))],
)
def test_dropout_contract(
    m: int,
    dtype: torch.dtype,
    adapter: torch.dtype,
    quant: tuple[str, int, bool] | None,
    device: str,
) -> None:
    check(Setup(m, 48, 64, 33, dtype, adapter, quant, device, dropout=0.3), f"dropout M={m}")


@pytest.mark.parametrize(("m", "r"), [(1, 64), (5, 40), (140, 3), (140, 40)])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_spans_contract(m: int, r: int, dropout: float, device: str) -> None:
    setup = Setup(m, 48, 64, r, device=device, dropout=dropout, spans=spans_of(m, r))
    check(setup, f"spans M={m} R={r}")


@pytest.mark.parametrize("dropout", [1e-9, 0.25, 0.5, 0.9])
@pytest.mark.parametrize("seed", [0, 1, -1, 2**62 + 12345])
def test_the_mask_is_that_of_torch(dropout: float, seed: int, device: str) -> None:
    """x of ones and A the identity: s is the mask."""
    key = torch.tensor([seed], device=device)
    update = LowRank(torch.eye(48).to(device), torch.zeros(1, 48), 1.0, dropout, key)
    mask = low_rank.masks(update)
    part = low_rank.first_product(torch.ones(70, 48, device=device), update.A, mask, True)
    assert torch.equal(part.sum(0) == 1.0, keep_mask(key, 70, 48, dropout))


@pytest.mark.parametrize("units", [1, 3])
def test_both_equals_the_two_products(
    units: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_launch, "_multiprocessors", lambda device: units)
    dy, b, s = (torch.randn(300, 140), torch.randn(140, 5), torch.randn(300, 5))
    dy, b, s = dy.to(device).bfloat16(), b.to(device), s.to(device)
    block = low_rank.both_block(dy, b)
    assert block is not None
    ds, db = low_rank.both(dy, b, s, block)
    wide = dy.double()
    contract.compare("ds", ds.sum(0), dy.float() @ b, wide @ b.double())
    contract.compare("db", db.sum(0), s.t() @ dy.float(), s.double().t() @ wide)


def test_one_pass_only_where_it_moves_less() -> None:
    """At R ranks the partial sums are 8 R / BLOCK_N bytes per element of dy, which has e bytes."""
    dy = torch.empty(300, 512, dtype=BF16)
    assert low_rank.both_block(dy, torch.empty(512, 32, dtype=BF16)) == low_rank.BOTH
    assert low_rank.both_block(dy, torch.empty(512, 64, dtype=BF16)) is None
    assert low_rank.both_block(dy, torch.empty(512, 16)) == low_rank.BOTH_MIXED
    assert low_rank.both_block(dy, torch.empty(512, 33)) is None
    assert low_rank.both_block(dy.half(), torch.empty(512, 4)) is None


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize("units", [1, 5])
def test_gradient(
    dtype: torch.dtype, units: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parts over tokens are added in a fixed order, into memory of any strides."""
    monkeypatch.setattr(_launch, "_multiprocessors", lambda device: units)
    low = torch.randn(700, 18).to(device)
    wide = torch.randn(700, 37).to(dtype).to(device)

    def run() -> Tensor:
        out = torch.empty(37, 18, device=device)
        low_rank.gradient(low, wide, 0.5, out.t(), low_rank.Masks(), False)
        return out

    truth = 0.5 * wide.double().t() @ low.double()
    contract.compare("gradient", run(), 0.5 * (wide.float().t() @ low), truth)
    assert torch.equal(run(), run())


def test_ranks_that_no_row_has_are_not_computed(device: str) -> None:
    """A NaN in a rank without rows must not reach anything."""
    setup = Setup(70, 48, 64, 40, device=device, spans=[(0, 8)] * 70)
    setup.lora_A[32:] = float("nan")
    part = low_rank.first_product(setup.x, setup.lora_A, low_rank.masks(setup.update()), False)
    assert torch.equal(part[:, :, 32:], torch.zeros_like(part[:, :, 32:]))


def test_split_reduction_covers_the_sum() -> None:
    for tiles in (1, 3, 1000):
        for length in (0, 1, 31, 64, 1000, 14336):
            device = torch.device("cpu")
            parts, span = _launch.split_reduction(tiles, length, 64, device)
            assert span % 64 == 0
            assert (parts - 1) * span < max(length, 1) <= parts * span
