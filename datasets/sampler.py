"""Order of samples: a pure function of (seed, epoch), cut into global batches that processes share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch.utils.data import Sampler


class SampleKey(NamedTuple):
    """What the sampler passes to the data set; a sample's randomness is a function of both fields."""

    epoch: int
    index: int


def batch_sizes(size: int, global_batch: int, *, smallest: int | None = None) -> list[int]:
    """Return the number of samples in each batch of an epoch.

    Args:
        size: number of samples in the data set.
        global_batch: samples of a full batch.
        smallest: keep the incomplete last batch. If it has fewer samples than this, it is merged with the batch before
            it and the sum is split evenly, or dropped if half of the sum is still too small. None always drops it.
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
    """Yield the batches of an epoch for one process, starting at any batch.

    Every process computes the same shuffled order and takes its slice of each global batch, so the processes' data are
    disjoint and an epoch can be resumed midway, even with another number of processes. The incomplete last batch is
    dropped unless ``smallest`` is given.

    Args:
        size: number of samples in the data set.
        global_batch: samples per step over all processes.
        seed: of the run.
        rank: this process.
        world: number of processes.
        parts: parts of a step with separate losses (gradient accumulation). Each part is a slice of the order that the
            processes share; a process's samples are its share of the first part, then of the second, and so on.
        smallest: keep the incomplete last batch, as in ``batch_sizes``; None drops it. Some processes may then have one
            sample more than others, which ``loss_weight`` accounts for.

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
        """Return the epoch's shuffled indices, (size,)."""
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + self.epoch) % (1 << 63))
        return torch.randperm(self.size, generator=generator)

    def __iter__(self) -> Iterator[list[SampleKey]]:
        order = self.order().tolist()
        for batch in range(self.start, len(self)):
            share, more = divmod(
                self.sizes[batch], self.world * self.parts
            )  # the first `more` processes have one extra
            begin = sum(self.sizes[:batch])
            first = begin + self.rank * share + min(self.rank, more)
            starts = range(first, begin + self.sizes[batch], self.world * share + more)
            share += self.rank < more
            yield [SampleKey(self.epoch, index) for start in starts for index in order[start : start + share]]

    def loss_weight(self, batch: int) -> float:
        """Return the factor for this process's mean loss that makes the mean over processes that over all samples."""
        share, more = divmod(self.sizes[batch], self.world)
        return (share + (self.rank < more)) * self.world / self.sizes[batch] if more else 1.0

    def __len__(self) -> int:
        """Return the number of batches in a whole epoch."""
        return len(self.sizes)
