"""Batch-norm statistics as mergeable moments, in one process; several processes: ``test_processes.py``."""

import copy

import pytest
import torch
from torch import nn

from models.ops.batch_norm import SyncBatchNorm, merge_moments


@pytest.mark.parametrize("sizes", [(5,), (3, 4), (1, 1, 7)])
@pytest.mark.parametrize("matrix", [False, True], ids=["per channel", "outer products"])
def test_merged_moments_are_those_of_the_union(sizes, matrix):
    parts = [torch.randn(size, 4, dtype=torch.float64) * 3 + i for i, size in enumerate(sizes)]

    def scatter(rows):
        centered = rows - rows.mean(0)
        return centered.T @ centered if matrix else centered.square().sum(0)

    counts = torch.tensor([float(size) for size in sizes], dtype=torch.float64)
    means = torch.stack([part.mean(0) for part in parts])
    merged = merge_moments(counts, means, torch.stack([scatter(part) for part in parts]))
    union = torch.cat(parts)
    assert merged.number == len(union)
    torch.testing.assert_close(merged.mean, union.mean(0))
    torch.testing.assert_close(merged.scatter, scatter(union))


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(("kind", "shape"), [(nn.BatchNorm1d, (6, 4)), (nn.BatchNorm2d, (3, 4, 5, 2))])
def test_in_one_process_it_is_batch_norm(kind, shape, train):
    plain = kind(shape[1]).train(train)
    nn.init.normal_(plain.weight)
    nn.init.normal_(plain.running_mean)
    x = torch.randn(shape)
    converted = SyncBatchNorm.convert(copy.deepcopy(plain))
    assert isinstance(converted, SyncBatchNorm)
    assert torch.equal(converted(x), plain(x))
    assert torch.equal(converted.running_var, plain.running_var)


def test_conversion_reaches_every_layer_and_keeps_names_and_values():
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Sequential(nn.BatchNorm2d(5)))
    before = copy.deepcopy(net.state_dict())
    SyncBatchNorm.convert(net)
    assert [type(m) is SyncBatchNorm for m in (net[0], net[1], net[2][0])] == [False, True, True]
    assert net.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_a_vector_is_refused():
    with pytest.raises(ValueError, match="at least 2 dimensions"):
        SyncBatchNorm(3)(torch.zeros(3))
