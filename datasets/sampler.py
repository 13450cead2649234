"""The order of samples: a pure function of (seed, epoch), cut into global batches and shared out to processes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch.utils.data import Sampler


class SampleKey(NamedTuple):
    """What the sampler hands to the data set: a sample's randomness is a function of both."""

    epoch: int
    index: int


def batch_sizes(size: int, global_batch: int, *, smallest: int | None = None) -> list[int]:
    """Samples in each batch of an epoch.

    Args:
        size: samples of the data set.
        global_batch: samples of a full batch.
        smallest: keep the incomplete last batch. One of fewer samples than this shares those of the batch before it
            evenly; if that makes one too small, it is dropped. None always drops it.
    """
    full, rest = divmod(size, global_batch)
    sizes = [global_batch] * full
    if smallest is None or not rest:
        return sizes
    if rest >= smallest or not full:
        return [*sizes, rest]
    second = (global_batch + rest) // 2
    return [*sizes[:-1], global_batch + rest - second, second] if second >= smallest else sizes


class ResumableSampler(Sampler[list[SampleKey]]):
    """Batches of an epoch for one process, from any batch on.

    Every process sees the same shuffled order and takes its own slice of each global batch, so the processes' data are
    disjoint and an epoch can be resumed in its middle, with another number of processes too. The incomplete last batch
    is dropped unless ``smallest`` is given.

    Args:
        size: number of samples in the data set.
        global_batch: samples per step over all processes.
        seed: of the run.
        rank: this process.
        world: number of processes.
        parts: parts of a step whose losses are apart (gradient accumulation). Each is a slice of the order shared out
            to the processes, and a process's samples are its share of the first part, of the second, and so on.
        smallest: keep the incomplete last batch, see ``batch_sizes``; None drops it. Processes may have one sample more
            than others then, see ``loss_weight``.

    ``world * parts`` divides ``global_batch``.

    Attributes:
        epoch, start: set before iterating; the epoch's number and its first batch.
    """

    def __init__(
        self,
        size: int,
        *,
        global_batch: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        parts: int = 1,
        smallest: int | None = None,
    ) -> None:
        if global_batch % (world * parts):
            raise ValueError(
                f"a global batch of {global_batch} does not divide among {world} processes"
                + (f" in {parts} parts" if parts > 1 else "")
            )
        if smallest is not None and parts > 1:
            raise ValueError("an incomplete batch cannot be kept in steps of several parts")
        self.size, self.global_batch, self.seed, self.rank, self.world = size, global_batch, seed, rank, world
        self.parts = parts
        self.sizes = batch_sizes(size, global_batch, smallest=smallest)
        self.epoch, self.start = 0, 0

    def order(self) -> torch.Tensor:
        """(size,) the epoch's shuffled indices."""
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + self.epoch) % (1 << 63))
        return torch.randperm(self.size, generator=generator)

    def __iter__(self) -> Iterator[list[SampleKey]]:
        order = self.order().tolist()
        for batch in range(self.start, len(self)):
            share, more = divmod(self.sizes[batch], self.world * self.parts)  # the first `more` processes have one more
            begin = sum(self.sizes[:batch])
            first = begin + self.rank * share + min(self.rank, more)
            starts = range(first, begin + self.sizes[batch], self.world * share + more)
            share += self.rank < more
            yield [SampleKey(self.epoch, index) for start in starts for index in order[start : start + share]]

    def loss_weight(self, batch: int) -> float:
        """Factor of this process's mean loss in a batch, so that the mean over processes is that over all samples."""
        share, more = divmod(self.sizes[batch], self.world)
        return (share + (self.rank < more)) * self.world / self.sizes[batch] if more else 1.0

    def __len__(self) -> int:
        """Batches of a whole epoch."""
        return len(self.sizes)
