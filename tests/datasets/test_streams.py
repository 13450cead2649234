import math
import struct

import pytest
import torch

from datasets.streams import SampleStreams

MASK = (1 << 64) - 1


def streams(index, *, seed=1, epoch=0, purpose=0):
    return SampleStreams(seed=seed, epoch=epoch, index=torch.tensor(index), purpose=purpose)


def splitmix_finalizer(x):
    """Compute the published finalizer in Python's unbounded integers."""
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & MASK
    x = (x ^ x >> 27) * 0x94D049BB133111EB & MASK
    return x ^ x >> 31


@pytest.mark.parametrize(
    "seed, epoch, index, purpose", [(0, 0, 0, 0), (1, 249, 43782, 1), (2**62, 3, 2**40, 7), (-5, 1, 2, 0)]
)
def test_numbers_are_splitmix64_of_seed_purpose_epoch_index_and_counter(seed, epoch, index, purpose):
    golden = 0x9E3779B97F4A7C15
    state = splitmix_finalizer((seed & MASK) + golden & MASK)
    for value in (purpose, epoch, index):
        state = splitmix_finalizer(state ^ value * golden & MASK)
    expected = [(splitmix_finalizer(state + counter * golden & MASK) >> 40) / 2**24 for counter in range(1, 6)]
    drawn = streams([index], seed=seed, epoch=epoch, purpose=purpose).uniform(5)
    assert drawn[0].tolist() == expected


def test_a_sample_draws_the_same_in_any_batch_and_in_any_portions():
    alone = streams([7], epoch=3)
    together = streams([4, 7, 7, 100], epoch=3)
    for draw in (lambda s: s.uniform(5), lambda s: s.normal(3, 2), lambda s: s.uniform(1, low=-2, high=9)):
        batch = draw(together)
        assert torch.equal(draw(alone)[0], batch[1]) and torch.equal(batch[1], batch[2])
        assert not torch.equal(batch[0], batch[1])
    whole, parts = streams([3, 4]), streams([3, 4])
    assert torch.equal(whole.uniform(6), torch.cat([parts.uniform(2), parts.uniform(4)], dim=1))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_draws_the_same_numbers():
    index = torch.arange(50)
    cpu, gpu = (SampleStreams(seed=1, epoch=2, index=index.to(device)) for device in ("cpu", "cuda"))
    assert torch.equal(cpu.uniform(100), gpu.uniform(100).cpu())
    torch.testing.assert_close(cpu.normal(100), gpu.normal(100).cpu())
    assert cpu.seeds() == gpu.seeds()


def test_uniform_has_the_moments_and_bounds_of_its_range():
    x = streams(list(range(200))).uniform(500, low=-1.0, high=3.0).double()
    assert x.min() >= -1 and x.max() < 3 and x.max() > 2.99 and x.min() < -0.99
    assert abs(x.mean() - 1) < 0.02 and abs(x.var() - 16 / 12) < 0.02
    assert (x.mean(1) - 1).abs().max() < 0.3  # every sample's own stream too


@pytest.mark.parametrize("low, high", [(0, 1), (0, 3), (0, 24), (0.5, 2), (-0.5, 0.5), (0, 0.875), (0, 1000)])
def test_the_largest_draw_stays_below_the_upper_bound(low, high, monkeypatch):
    s = streams([0])
    monkeypatch.setattr(s, "_bits", lambda shape: torch.full((1, *shape), -1))
    assert low < s.uniform(1, low=low, high=high).item() < high


def test_normal_is_finite_and_has_normal_moments():
    x = streams(list(range(200))).normal(500).double()
    assert x.isfinite().all()
    moments = [(x**power).mean().item() for power in (1, 2, 3, 4)]
    assert moments == pytest.approx([0, 1, 0, 3], abs=0.06)
    assert (x.abs() < 1).double().mean().item() == pytest.approx(math.erf(1 / math.sqrt(2)), abs=0.01)


def test_no_two_streams_are_equal():
    seen = set()
    for seed in (0, 1, 2):
        for purpose in (0, 1):
            for epoch in (0, 1, 2, 249):
                rows = SampleStreams(seed=seed, epoch=epoch, index=torch.arange(500), purpose=purpose).uniform(3)
                seen.update(struct.pack("3f", *row) for row in rows.tolist())
    assert len(seen) == 3 * 2 * 4 * 500


@pytest.mark.parametrize("change", [{"seed": 2}, {"epoch": 1}, {"purpose": 1}])
def test_streams_of_other_seed_epoch_or_purpose_are_uncorrelated(change):
    a, b = (streams(list(range(300)), **kwargs).uniform(100).flatten().double() for kwargs in ({}, change))
    assert abs(torch.corrcoef(torch.stack([a, b]))[0, 1]) < 0.02
    neighbors = torch.corrcoef(streams(list(range(300))).uniform(400).double())
    assert (neighbors - torch.eye(300)).abs().max() < 0.3


def test_seeds_are_distinct_valid_and_draw_nothing():
    s, same = streams(list(range(2000))), streams(list(range(2000)))
    seeds = s.seeds()
    assert len(set(seeds)) == 2000 and all(0 <= seed < 1 << 62 for seed in seeds)
    assert torch.equal(s.uniform(2), same.uniform(2))
    assert seeds[7] == streams([7]).seeds()[0] and not set(seeds) & set(streams(list(range(2000)), epoch=1).seeds())
    torch.manual_seed(seeds[0])
