"""Tiles of large tensors and reductions over neighbors."""

import math

import pytest
import torch

from models.ops import tiles
from models.ops.tiles import in_degree, mark_places, neighbor_max, neighbor_sum, tiles_of_clouds, transposed_sum, unmark


@pytest.mark.parametrize("budget", [1, 7, 60, 61, 130, 10**6])
def test_blocks_cover_every_row_of_every_cloud_once(budget):
    seen = torch.zeros(5, 12)
    for clouds, rows in tiles_of_clouds(5, 12, 5, budget):
        assert seen[clouds, rows].numel() * 5 <= max(budget, 5)
        seen[clouds, rows] += 1
    assert (seen == 1).all()


@pytest.mark.parametrize("budget", [1, 40, 10**6])
def test_blocks_begin_at_multiples(budget):
    rows = [rows for _, rows in tiles_of_clouds(1, 21, 5, budget, multiple=4)]
    assert all(r.start % 4 == 0 for r in rows) and [r.start for r in rows[1:]] == [r.stop for r in rows[:-1]]
    assert rows[0].start == 0 and rows[-1].stop == 21


def test_reductions_over_neighbors_by_hand():
    table = torch.tensor([[1.0, -1.0], [2.0, -2.0], [4.0, -4.0]])
    neighbors = torch.tensor([[0, 1], [1, 2], [1, 1]])
    assert in_degree(neighbors).tolist() == [1, 4, 1]
    assert neighbor_sum(table, neighbors).tolist() == [[3, -3], [6, -6], [4, -4]]
    assert transposed_sum(table, neighbors).tolist() == [[1, -1], [11, -11], [2, -2]]
    maxima, chosen = neighbor_max(table, neighbors)
    assert maxima.tolist() == [[2, -1], [4, -2], [2, -2]]
    assert chosen.tolist() == [[1, 0], [2, 1], [1, 1]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("budget", [1, 100, 10**6])
@pytest.mark.parametrize("sign", [None, [1, -1, 1, 1, -1, -1]], ids=["maxima", "both"])
def test_maximum_over_neighbors_is_exact_and_names_its_row(monkeypatch, dtype, budget, sign):
    monkeypatch.setitem(tiles._GATHER_TILE, "cpu", budget)
    table = torch.randn(40, 6, dtype=dtype)
    table[10:20] = table[:1]
    table[20:30] *= torch.finfo(torch.float32).tiny  # subnormal numbers and zeros too
    table[30:33] = 0
    neighbors = torch.randint(40, (40, 5))
    if sign is not None:
        sign = torch.tensor(sign, dtype=dtype)
    maxima, chosen = neighbor_max(table, neighbors, sign)
    signed = table if sign is None else table * sign
    expected = signed[neighbors].amax(1) * (1 if sign is None else sign)
    assert maxima.dtype == dtype and torch.equal(maxima, expected)
    chosen = chosen.long()
    assert torch.equal(table.gather(0, chosen), maxima)
    assert (neighbors[:, :, None] == chosen[:, None]).any(1).all()


def test_maxima_of_values_that_are_not_finite_name_a_row():
    table = torch.randn(6, 4)
    table[0], table[1], table[2] = math.nan, math.inf, -math.inf
    _, chosen = neighbor_max(table, torch.arange(6).repeat(6, 1))
    assert ((chosen >= 0) & (chosen < 6)).all()


def test_a_place_does_not_change_its_value():
    values = torch.cat([torch.randn(1000), torch.tensor([0.0, 1e-45, -1e-45, 3e38, -3e38])])
    places = torch.randint((1 << 29) - 1, values.shape)
    back, there = unmark(mark_places(values, places))
    assert torch.equal(back, values) and torch.equal(there, places)
