"""Cutting large tensors into blocks that stay in a CPU's cache or fill a GPU, and reductions over such blocks."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

# Elements of one block of rows that are changed element by element.
ELEMENTWISE_TILE = {"cpu": 1 << 20, "cuda": 1 << 24}
# Elements of one block of neighbours that are gathered or reduced.
_GATHER_TILE = {"cpu": 1 << 19, "cuda": 1 << 24}
# float64 has this many more bits of mantissa than float32.
_SPARE_BITS = 29
_PLACE = (1 << _SPARE_BITS) - 1
# Said once in every process that makes such a matrix; ours live for one product and are compared with plain gathers.
warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta state")


def tiles_of_clouds(b: int, n: int, width: int, budget: int, *, multiple: int = 1) -> Iterator[tuple[slice, slice]]:
    """Cut (B, N, width) into blocks of about ``budget`` elements: several whole clouds, or rows of one cloud.

    Yields:
        Slices of clouds and of rows; rows start at multiples of ``multiple``.
    """
    clouds, rows = max(1, budget // max(n * width, 1)), max(1, min(n, budget // max(width, 1)))
    rows = min(n, -(-rows // multiple) * multiple)
    for i in range(0, b, clouds):
        for j in range(0, n, rows):
            yield slice(i, min(i + clouds, b)), slice(j, min(j + rows, n))


def tiles_of_rows(x: Tensor) -> list[slice]:
    """Cut (P, C) into blocks of rows for element-by-element work."""
    budget = ELEMENTWISE_TILE.get(x.device.type, 1 << 24)
    return [rows for _, rows in tiles_of_clouds(1, len(x), x.shape[1], budget)]


def whole_clouds(x: Tensor, clouds: int, width: int) -> list[slice]:
    """Cut (P, C) rows between clouds of P / clouds rows, for work on neighbours that makes ``width`` channels."""
    points = len(x) // clouds
    together = max(1, _GATHER_TILE.get(x.device.type, 1 << 24) // max(points * width, 1))
    return [slice(i * points, min(i + together, clouds) * points) for i in range(0, clouds, together)]


def can_mark(values: Tensor, places: int) -> bool:
    """Whether ``mark_places`` takes these values: float32 on a CPU, and not too many places."""
    return values.device.type == "cpu" and values.dtype == torch.float32 and places <= _PLACE


def runs_eagerly() -> bool:
    """Whether operations run as they are called, and are not recorded by torch.compile or torch.export."""
    return not torch.compiler.is_compiling()


def is_exporting() -> bool:
    """Whether torch.export records the operations: it needs plain ones, and loops that do not depend on the sizes.

    PyTorch before 2.7 does not tell; there an encoder exports for the sizes of its example only.
    """
    return getattr(torch.compiler, "is_exporting", bool)()


def mark_places(values: Tensor, places: Tensor) -> Tensor:
    """Write a place into each value, so that a maximum brings its place along.

    A CPU's vector units give the maximum of many numbers at once but not where it was. float64 has more bits than the
    float32 value needs: the place goes into these and decides between equal values only.

    Args:
        values: float32.
        places: int64 from 0 to 2^29 - 1, broadcast to the values.

    Returns:
        float64, to be read by ``unmark`` only.
    """
    bits = values.double().view(torch.int64)
    bits |= places
    return bits.view(torch.float64)


def unmark(marked: Tensor) -> tuple[Tensor, Tensor]:
    """The values (float32) and places (int64) of ``mark_places``; a value that is not finite has any place."""
    bits = marked.view(torch.int64)
    return (bits & ~_PLACE).view(torch.float64).float(), bits & _PLACE


def closeness_factors(x: Tensor) -> tuple[Tensor, Tensor]:
    """Factors of x_i . x_j - |x_j|^2 / 2, which orders the j as the distance does, largest first.

    Args:
        x: (B, N, C) centered points.

    Returns:
        (B, N, C + 1) and (B, C + 1, N), whose product that is.
    """
    last = torch.full_like(x[..., :1], -0.5)
    return torch.cat([x, last], dim=2), torch.cat([x, x.square().sum(2, keepdim=True)], dim=2).mT


def in_degree(neighbors: Tensor) -> Tensor:
    """How often each row is somebody's neighbour: (P, k) -> (P,) int64."""
    if neighbors.device.type == "cpu":
        return torch.bincount(neighbors.flatten(), minlength=len(neighbors))
    # On a GPU bincount would wait for its result's size.
    flat = neighbors.flatten()
    return flat.new_zeros(len(neighbors)).scatter_add_(0, flat, torch.ones_like(flat))


def neighbor_sum(table: Tensor, neighbors: Tensor) -> Tensor:
    """Sum over the rows that are a row's neighbours, without gradient: (P, C), (P, k) -> (P, C)."""
    return F.embedding_bag(neighbors, table.detach(), mode="sum")


def transposed_sum(table: Tensor, neighbors: Tensor) -> Tensor:
    """Sum over the rows whose neighbour a row is, without gradient: (P, C), (P, k) -> (P, C)."""
    points, k = neighbors.shape
    flat = neighbors.flatten()
    degree = in_degree(neighbors)
    # 32-bit numbers sort faster.
    order = torch.argsort(flat.int() if points < 1 << 31 else flat, stable=True)
    return F.embedding_bag(order // k, table.detach().contiguous(), degree.cumsum(0) - degree, mode="sum")


def neighbor_max(table: Tensor, neighbors: Tensor, sign: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Maximum over neighbours per channel, without gradient.

    Args:
        table: (P, C).
        neighbors: (P, k).
        sign: (C,) of 1 and -1, where the minimum is wanted; None is all 1.

    Returns:
        The maxima (P, C), minima where the sign is -1, and the rows that they come from (P, C), int32 or int64.
    """
    points, k = neighbors.shape
    table = table.detach()
    if not (can_mark(table, points) and runs_eagerly()):
        starts = torch.arange(0, points * k, k, device=table.device)
        signed = table if sign is None else table * sign
        maxima, _, _, chosen = torch.embedding_bag(signed, neighbors.flatten(), starts, mode=2)
        return maxima if sign is None else maxima.mul_(sign), chosen
    maxima, chosen = torch.empty_like(table), torch.empty_like(table, dtype=torch.int32)
    rows = max(1, _GATHER_TILE["cpu"] // table.shape[1])
    ones, starts = table.new_ones(rows * k, dtype=torch.float64), torch.arange(0, rows * k + 1, k)
    for i in range(0, points, rows):
        index = neighbors[i : i + rows].flatten()
        # Neighbours are of the same cloud, so a block needs a part of the table only.
        lowest, highest = (int(end) for end in index.aminmax())
        part = table[lowest : highest + 1]
        marked = mark_places(part if sign is None else part * sign, torch.arange(lowest, highest + 1)[:, None])
        # A matrix of ones with a maximum in the place of its sum: the neighbours of a row are never put side by side.
        count = len(index) // k
        picks = torch.sparse_csr_tensor(
            *(starts[: count + 1], index - lowest, ones[: len(index)]), size=(count, len(part)), check_invariants=False
        )
        maxima[i : i + rows], place = unmark(torch.sparse.mm(picks, marked, "amax"))
        chosen[i : i + rows] = place.clamp_max_(points - 1)  # also after a NaN it is some row
    return maxima if sign is None else maxima.mul_(sign), chosen
