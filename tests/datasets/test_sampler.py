import pytest
import torch

from datasets.sampler import PairSampler
from datasets.shapenet_render import SampleKey


def batches(sampler, *, epoch=0, start=0):
    sampler.epoch, sampler.start = epoch, start
    return list(sampler)


def test_an_epoch_visits_each_sample_at_most_once_and_drops_the_incomplete_batch():
    sampler = PairSampler(23, global_batch=5, seed=1)
    assert len(sampler) == 4
    keys = [key for batch in batches(sampler, epoch=3) for key in batch]
    assert all(isinstance(key, SampleKey) and key.epoch == 3 for key in keys)
    indices = [key.index for key in keys]
    assert len(set(indices)) == 20 and set(indices) <= set(range(23))
    assert sorted(PairSampler(23, global_batch=5, seed=1).order().tolist()) == list(range(23))


def test_the_order_depends_on_seed_and_epoch_alone():
    first = batches(PairSampler(50, global_batch=5, seed=1), epoch=2)
    torch.manual_seed(99)
    assert batches(PairSampler(50, global_batch=5, seed=1), epoch=2) == first
    sampler = PairSampler(50, global_batch=5, seed=1)
    orders = {tuple(key.index for batch in batches(sampler, epoch=epoch) for key in batch) for epoch in range(20)}
    orders |= {tuple(PairSampler(50, global_batch=5, seed=seed).order().tolist()) for seed in range(2, 20)}
    assert len(orders) == 38


@pytest.mark.parametrize("world", [2, 3, 6])
def test_processes_share_each_global_batch_disjointly_in_one_order(world):
    whole = batches(PairSampler(40, global_batch=6, seed=4), epoch=1)
    shares = [batches(PairSampler(40, global_batch=6, seed=4, rank=r, world=world), epoch=1) for r in range(world)]
    assert [len(share) for share in shares] == [6] * world
    assert [sum(parts, []) for parts in zip(*shares, strict=True)] == whole


@pytest.mark.parametrize("world", [1, 2])
def test_an_epoch_goes_on_from_any_batch(world):
    for rank in range(world):
        sampler = PairSampler(40, global_batch=6, seed=4, rank=rank, world=world)
        whole = batches(sampler, epoch=1)
        for start in (0, 1, 5, 6):
            assert batches(sampler, epoch=1, start=start) == whole[start:]


def test_a_batch_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="global batch of 6 does not divide among 4"):
        PairSampler(40, global_batch=6, seed=1, world=4)
