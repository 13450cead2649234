"""kNN against a sort of float64 differences."""

import math

import pytest
import torch

from benchmarks.reference.textbook import textbook_knn
from models.ops import knn as knn_ops
from models.ops.knn import knn, largest
from models.ops.precision import exact_products


def exact_nearest(points, k):
    """Return the k nearest by differences in float64: (B, N, C) -> (B, N, k), sorted indices."""
    difference = points.double()[:, :, None] - points.double()[:, None]
    return difference.square().sum(3).topk(k, dim=2, largest=False).indices.sort(dim=2).values


@pytest.mark.parametrize("k", [1, 5, 17])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_knn_finds_the_nearest_points(k, dtype):
    points = torch.randn(3, 17, 3, dtype=dtype)
    assert torch.equal(knn(points, k).sort(dim=2).values, exact_nearest(points, k))


def test_knn_in_feature_space_and_for_strided_input():
    points = torch.randn(2, 40, 30)
    assert torch.equal(knn(points[..., ::2], 6).sort(dim=2).values, exact_nearest(points[..., ::2], 6))


def test_a_far_away_cloud_keeps_its_neighbors():
    far = torch.randn(2, 64, 3) + 1000
    assert torch.equal(knn(far, 5).sort(dim=2).values, exact_nearest(far, 5))
    # Without centring the float32 distances are noise: this is what the field's formula returns.
    assert not torch.equal(textbook_knn(far.mT, 5).sort(dim=2).values, exact_nearest(far, 5))


@pytest.mark.parametrize("budget", [1, 50, 21 * 21, 2 * 21 * 21 + 5])
def test_knn_in_blocks_of_any_size(monkeypatch, budget):
    points = torch.randn(5, 21, 3)
    monkeypatch.setitem(knn_ops._TILE, "cpu", budget)
    assert torch.equal(knn(points, 4).sort(dim=2).values, exact_nearest(points, 4))


def test_a_point_with_duplicates_finds_them_first():
    points = torch.randn(1, 12, 3)
    points[:, 8:] = points[:, :1]  # five points in one place
    same = set(knn(points, 5)[0, 0].tolist())
    assert same == {0, 8, 9, 10, 11}


@pytest.mark.parametrize("k", [0, 9])
def test_impossible_k_is_an_error_that_names_both_numbers(k):
    with pytest.raises(ValueError, match=rf"k = {k} .*8 points"):
        knn(torch.randn(1, 8, 3), k)


def test_neighbors_under_autocast_are_those_of_float32():
    points = torch.randn(2, 200, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = knn(points, 10)
    assert torch.equal(mixed, knn(points, 10))


def test_knn_has_no_gradient():
    assert not knn(torch.randn(1, 6, 3, requires_grad=True), 2).requires_grad


@pytest.mark.parametrize("n", [5, 31, 64, 130, 1000])
@pytest.mark.parametrize("k", [1, 2, 5])
def test_selection_through_groups_finds_the_largest_values(n, k):
    values = torch.randn(7, n)
    found = largest(values, k)
    assert all(len(set(row)) == k for row in found.tolist())
    assert torch.equal(values.gather(1, found).sort(descending=True).values, values.topk(k).values)


def test_selection_among_equal_values_names_different_places():
    values = torch.zeros(3, 500)
    values[:, 123] = 1
    found = largest(values, 4)
    assert all(123 in row and len(set(row)) == 4 for row in found.tolist())


@pytest.mark.parametrize("n", [40, 700])
def test_selection_among_values_that_are_not_finite(n):
    values = torch.randn(2, n)
    values[:, 5:20] = -math.inf
    values[0, 30], values[1, 31] = math.inf, 1e38
    found = largest(values, 3)
    assert 30 in found[0] and 31 in found[1] and not ((found >= 5) & (found < 20)).any()
    values[0, 7] = math.nan  # wherever it comes, places are valid ones
    assert sorted(set(largest(values, n)[0].tolist())) == list(range(n))


@pytest.mark.parametrize("n", [300, 1023])
def test_neighbors_through_groups_are_those_of_float64(n):
    """Large enough for selection in several steps; the distances of float64 decide where the sets differ."""
    points = torch.randn(2, n, 3)
    points[:, n // 2 :] = points[:, :1]  # what random input dropout does
    found, expected = knn(points, 9), exact_nearest(points, 9)
    distance = (points.double()[:, :, None] - points.double()[:, None]).square().sum(3)
    torch.testing.assert_close(
        distance.gather(2, found).sort(2).values, distance.gather(2, expected).sort(2).values, rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_products_are_exact_on_a_gpu_whatever_the_environment_allows(precision):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        with exact_products(torch.device("cuda:0")):
            assert torch.get_float32_matmul_precision() == "highest"
        with pytest.raises(KeyError), exact_products(torch.device("cuda:0")):
            raise KeyError
        assert torch.get_float32_matmul_precision() == precision
        with exact_products(torch.device("cpu")):
            assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(before)
