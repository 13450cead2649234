import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from datasets.sampler import ResumableSampler, SampleKey, batch_sizes
from datasets.streams import SampleStreams


def batches(sampler, *, epoch=0, start=0):
    sampler.epoch, sampler.start = epoch, start
    return list(sampler)


def test_an_epoch_visits_each_sample_at_most_once_and_drops_the_incomplete_batch():
    sampler = ResumableSampler(23, global_batch=5, seed=1)
    assert len(sampler) == 4
    keys = [key for batch in batches(sampler, epoch=3) for key in batch]
    assert all(isinstance(key, SampleKey) and key.epoch == 3 for key in keys)
    indices = [key.index for key in keys]
    assert len(set(indices)) == 20 and set(indices) <= set(range(23))
    assert sorted(ResumableSampler(23, global_batch=5, seed=1).order().tolist()) == list(range(23))


def test_the_order_depends_on_seed_and_epoch_alone():
    first = batches(ResumableSampler(50, global_batch=5, seed=1), epoch=2)
    torch.manual_seed(99)
    assert batches(ResumableSampler(50, global_batch=5, seed=1), epoch=2) == first
    sampler = ResumableSampler(50, global_batch=5, seed=1)
    orders = {tuple(key.index for batch in batches(sampler, epoch=epoch) for key in batch) for epoch in range(20)}
    orders |= {tuple(ResumableSampler(50, global_batch=5, seed=seed).order().tolist()) for seed in range(2, 20)}
    assert len(orders) == 38


@pytest.mark.parametrize("world", [2, 3, 6])
def test_processes_share_each_global_batch_disjointly_in_one_order(world):
    whole = batches(ResumableSampler(40, global_batch=6, seed=4), epoch=1)
    shares = [batches(ResumableSampler(40, global_batch=6, seed=4, rank=r, world=world), epoch=1) for r in range(world)]
    assert [len(share) for share in shares] == [6] * world
    assert [sum(parts, []) for parts in zip(*shares, strict=True)] == whole


@pytest.mark.parametrize("world", [1, 2])
def test_an_epoch_goes_on_from_any_batch(world):
    for rank in range(world):
        sampler = ResumableSampler(40, global_batch=6, seed=4, rank=rank, world=world)
        whole = batches(sampler, epoch=1)
        for start in (0, 1, 5, 6):
            assert batches(sampler, epoch=1, start=start) == whole[start:]


@pytest.mark.parametrize("world", [1, 2, 4])
def test_parts_of_a_step_hold_the_same_samples_whatever_the_processes(world):
    alone = batches(ResumableSampler(24, global_batch=12, seed=3))
    shares = [
        batches(ResumableSampler(24, global_batch=12, seed=3, rank=r, world=world, parts=3)) for r in range(world)
    ]
    for step, whole in enumerate(alone):
        for part in range(3):
            size = 4 // world
            together = [key for share in shares for key in share[step][part * size : (part + 1) * size]]
            assert together == whole[part * 4 : (part + 1) * 4]


def test_a_batch_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="global batch of 6 does not divide among 2 processes in 2 parts"):
        ResumableSampler(40, global_batch=6, seed=1, world=2, parts=2)
    with pytest.raises(ValueError, match="global batch of 6 does not divide among 4"):
        ResumableSampler(40, global_batch=6, seed=1, world=4)


class Streams(Dataset):
    """For every sample the first numbers of its streams: of reading, of each augmentation, of the first dropouts."""

    PURPOSES = (0, 1, 2, 3, 16, 17, 18)

    def __getitem__(self, key):
        index = torch.tensor([key.index])
        streams = [SampleStreams(seed=5, epoch=key.epoch, index=index, purpose=p) for p in self.PURPOSES]
        return key.epoch, key.index, [(int(s.state), s.uniform(2).flatten().tolist()) for s in streams]


def test_no_two_samples_share_a_stream_and_none_depends_on_workers_or_processes():
    seen = []
    for world, workers in ((1, 0), (1, 2), (2, 0), (2, 2), (3, 0)):
        drawn = {}
        for rank in range(world):
            sampler = ResumableSampler(30, global_batch=6, seed=5, rank=rank, world=world)
            for sampler.epoch in range(2):
                loader = DataLoader(Streams(), batch_sampler=sampler, num_workers=workers, collate_fn=list)
                for epoch, index, numbers in (sample for batch in loader for sample in batch):
                    assert (epoch, index) not in drawn  # no sample twice in an epoch
                    drawn[epoch, index] = numbers
        assert len(drawn) == 60
        states = [state for numbers in drawn.values() for state, _ in numbers]
        assert len(set(states)) == len(states) == 60 * len(Streams.PURPOSES)
        draws = [tuple(values) for numbers in drawn.values() for _, values in numbers]
        assert len(set(draws)) == len(draws)
        seen.append(drawn)
    assert all(drawn == seen[0] for drawn in seen)


def test_an_incomplete_last_batch_is_kept_where_it_can_have_statistics():
    assert batch_sizes(70, 32, smallest=2) == [32, 32, 6] and batch_sizes(70, 32) == [32, 32]
    assert batch_sizes(64, 32, smallest=2) == [32, 32]
    assert batch_sizes(33, 32, smallest=2) == [17, 16]  # one sample has no statistics
    assert batch_sizes(5, 2, smallest=2) == [2, 2]
    for smallest in (2, 3, 4):
        for size in range(12, 40):
            sizes = batch_sizes(size, 12, smallest=smallest)
            assert sum(sizes) == size and min(sizes) >= smallest and max(sizes) <= 12 and len(sizes) == -(-size // 12)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_a_kept_last_batch_is_shared_and_resumed_like_the_others(world):
    def share(rank):
        return ResumableSampler(SIZE, global_batch=6, seed=1, rank=rank, world=world, smallest=3)

    shares = [batches(share(rank), epoch=1) for rank in range(world)]
    together = [sum(parts, []) for parts in zip(*shares, strict=True)]
    assert [len(batch) for batch in together] == [6, 6, 6, 5] and len(
        {key.index for b in together for key in b}
    ) == SIZE
    assert [key.index for batch in together for key in batch] == order_of(share(0), epoch=1)
    assert all(batches(share(rank), epoch=1, start=2) == shares[rank][2:] for rank in range(world))
    for number, size in enumerate((6, 6, 6, 5)):
        weights = [share(rank).loss_weight(number) for rank in range(world)]
        assert weights == pytest.approx([len(shares[rank][number]) * world / size for rank in range(world)])


SIZE = 23


def order_of(sampler, *, epoch):
    sampler.epoch = epoch
    return sampler.order().tolist()
