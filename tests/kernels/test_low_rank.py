"""The dropout mask and the spans of ranks."""

from __future__ import annotations

import pytest
import torch
from fastlora_kernels.low_rank import drop_threshold, keep_mask, keep_scale, span_mask

MASK = 0xFFFFFFFF
GOLDEN = 0x9E3779B9


def mix(h: int) -> int:
    h ^= h >> 16
    h = h * 0x7FEB352D & MASK
    h ^= h >> 15
    h = h * 0x846CA68B & MASK
    return h ^ h >> 16


def keep(seed: int, i: int, k: int, p: float) -> bool:
    """The definition, for one element, in Python's integers."""
    low, high = seed & MASK, seed >> 32 & MASK
    key = mix((mix((i & MASK) ^ low) + high + (i >> 32) * GOLDEN) & MASK)
    return mix((key + k * GOLDEN) & MASK) >= int(p * 2**32)


@pytest.mark.parametrize("seed", [0, 1, -1, 2**32, 2**62 + 7, -(2**62) + 12345])
@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.999])
def test_the_mask_is_its_definition(seed: int, p: float) -> None:
    m, k = 40, 50
    expected = [[keep(seed, i, j, p) for j in range(k)] for i in range(m)]
    for given in (torch.tensor(seed), torch.tensor([seed])):
        assert keep_mask(given, m, k, p).tolist() == expected


def test_the_mask_of_many_rows_is_cut_nowhere() -> None:
    seed = torch.tensor(9)
    whole = keep_mask(seed, 391, 1001, 0.3)  # six steps of 65 rows, and one row
    for first in (0, 64, 324, 384):
        rows = [[keep(9, i, j, 0.3) for j in range(30)] for i in range(first, first + 7)]
        assert whole[first : first + 7, :30].tolist() == rows
    assert keep_mask(seed, 0, 5, 0.3).shape == (0, 5)


def test_the_mask_is_random_along_every_dimension() -> None:
    """Shares per row, per column and of equal neighbours lie where chance puts them."""
    m, k, p = 500, 1000, 0.3
    kept = keep_mask(torch.tensor(1234), m, k, p).double()
    for dim, count in ((0, m), (1, k)):
        shares = kept.mean(dim)
        expected = (p * (1 - p) / count) ** 0.5
        assert (shares - (1 - p)).abs().max() < 5 * expected
        assert 0.8 * expected < shares.std() < 1.2 * expected
    other = keep_mask(torch.tensor(1235), m, k, p).double()
    pairs = [(kept[1:], kept[:-1]), (kept[:, 1:], kept[:, :-1]), (kept, other)]
    for one, two in pairs:
        covariance = ((one - one.mean()) * (two - two.mean())).mean()
        assert covariance.abs() < 5 * p * (1 - p) / one.numel() ** 0.5


def test_threshold_and_scale() -> None:
    assert drop_threshold(0.0) == 0 and drop_threshold(0.5) == 2**31
    assert drop_threshold(1 - 2**-53) == 2**32 - 1
    assert keep_scale(0.75) == 4.0


def test_spans() -> None:
    spans = torch.tensor([[0, 3], [1, 2], [2, 2], [0, 0]], dtype=torch.int32)
    expected = [[True, True, True], [False, True, False], [False] * 3, [False] * 3]
    assert span_mask(spans, 3).tolist() == expected
