"""Split large tensors into tiles that fit a CPU's cache or fill a GPU, and reduce over neighbors."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

# Elements per tile of element-wise work.
ELEMENTWISE_TILE = {"cpu": 1 << 20, "cuda": 1 << 24}
# Elements per tile of gathered or reduced neighbors.
_GATHER_TILE = {"cpu": 1 << 19, "cuda": 1 << 24}
# Mantissa bits that float64 has in addition to those of float32.
_SPARE_BITS = 29
_INDEX_MASK = (1 << _SPARE_BITS) - 1
# Each process would warn once. Our matrices live for one product, which the tests compare with plain gathers.
warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta state")


def tiles_of_clouds(b: int, n: int, width: int, budget: int, *, multiple: int = 1) -> Iterator[tuple[slice, slice]]:
    """Split (B, N, width) into tiles of about ``budget`` elements: several whole clouds, or rows of one cloud.

    Yields:
        Slices of clouds and of rows; those of rows start at multiples of ``multiple``.
    """
    clouds, rows = max(1, budget // max(n * width, 1)), max(1, min(n, budget // max(width, 1)))
    rows = min(n, -(-rows // multiple) * multiple)
    for i in range(0, b, clouds):
        for j in range(0, n, rows):
            yield slice(i, min(i + clouds, b)), slice(j, min(j + rows, n))


def tiles_of_rows(x: Tensor) -> list[slice]:
    """Split the rows of (P, C) into tiles for element-wise work."""
    budget = ELEMENTWISE_TILE.get(x.device.type, 1 << 24)
    return [rows for _, rows in tiles_of_clouds(1, len(x), x.shape[1], budget)]


def whole_clouds(x: Tensor, clouds: int, width: int) -> list[slice]:
    """Split the rows of (P, C) into tiles of whole clouds, for work on neighbors that produces ``width`` channels."""
    points = len(x) // clouds
    together = max(1, _GATHER_TILE.get(x.device.type, 1 << 24) // max(points * width, 1))
    return [slice(i * points, min(i + together, clouds) * points) for i in range(0, clouds, together)]


def can_mark(values: Tensor, size: int) -> bool:
    """Return whether ``mark_places`` supports values and indices below ``size``: float32 on a CPU, at most 29 bits."""
    return values.device.type == "cpu" and values.dtype == torch.float32 and size <= _INDEX_MASK


def runs_eagerly() -> bool:
    """Return whether operations run eagerly, not traced by torch.compile or torch.export."""
    return not torch.compiler.is_compiling()


def is_exporting() -> bool:
    """Return whether torch.export is tracing: it needs plain operations, and loops that do not depend on the sizes.

    PyTorch before 2.7 cannot tell; there an exported encoder only supports the sizes of its example.
    """
    return getattr(torch.compiler, "is_exporting", bool)()


def mark_places(values: Tensor, index: Tensor) -> Tensor:
    """Pack an index into each value, so that a maximum carries its argmax.

    The vector units of a CPU compute many maxima at once, but not where these are. The index goes into the mantissa
    bits that float64 has in addition to those of float32, where it only decides between equal values.

    Args:
        values: float32.
        index: int64 from 0 to 2^29 - 1, broadcast to the values.

    Returns:
        float64, to be read by ``unmark`` only.
    """
    bits = values.double().view(torch.int64)
    bits |= index
    return bits.view(torch.float64)


def unmark(marked: Tensor) -> tuple[Tensor, Tensor]:
    """Unpack ``mark_places``: values (float32) and indices (int64); those of non-finite values are arbitrary."""
    bits = marked.view(torch.int64)
    return (bits & ~_INDEX_MASK).view(torch.float64).float(), bits & _INDEX_MASK


def closeness_factors(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the factors of x_i . x_j - |x_j|^2 / 2, which is largest for the j that is nearest to i.

    Args:
        x: (B, N, C) centered points.

    Returns:
        (B, N, C + 1) and (B, C + 1, N), to be multiplied.
    """
    last = torch.full_like(x[..., :1], -0.5)
    return torch.cat([x, last], dim=2), torch.cat([x, x.square().sum(2, keepdim=True)], dim=2).mT


def in_degree(neighbors: Tensor) -> Tensor:
    """Count how often each row is a neighbor: (P, k) -> (P,) int64."""
    if neighbors.device.type == "cpu":
        return torch.bincount(neighbors.flatten(), minlength=len(neighbors))
    # On a GPU, bincount would synchronize to learn the size of its result.
    flat = neighbors.flatten()
    return flat.new_zeros(len(neighbors)).scatter_add_(0, flat, torch.ones_like(flat))


def neighbor_sum(table: Tensor, neighbors: Tensor) -> Tensor:
    """Sum the table over the neighbors of each row, without gradient: (P, C), (P, k) -> (P, C)."""
    return F.embedding_bag(neighbors, table.detach(), mode="sum")


def transposed_sum(table: Tensor, neighbors: Tensor) -> Tensor:
    """Sum the table over the rows that have each row as a neighbor, without gradient: (P, C), (P, k) -> (P, C)."""
    points, k = neighbors.shape
    flat = neighbors.flatten()
    degree = in_degree(neighbors)
    order = torch.argsort(flat.int() if points < 1 << 31 else flat, stable=True)  # (P * k,); int32 sorts faster
    return F.embedding_bag(order // k, table.detach().contiguous(), degree.cumsum(0) - degree, mode="sum")


def neighbor_max(table: Tensor, neighbors: Tensor, sign: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Compute the maximum over neighbors in each channel, without gradient.

    Args:
        table: (P, C).
        neighbors: (P, k).
        sign: (C,) of 1 and -1; -1 computes the minimum instead. None means all 1.

    Returns:
        The extremes (P, C) and the rows that they come from (P, C), int32 or int64.
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
        # Neighbors belong to the same cloud, so a tile needs only a part of the table.
        lowest, highest = (int(end) for end in index.aminmax())
        part = table[lowest : highest + 1]
        marked = mark_places(part if sign is None else part * sign, torch.arange(lowest, highest + 1)[:, None])
        # A sparse matrix of ones, with products reduced by maximum: the gathered tensor (rows, k, C) is never built.
        count = len(index) // k
        picks = torch.sparse_csr_tensor(
            *(starts[: count + 1], index - lowest, ones[: len(index)]), size=(count, len(part)), check_invariants=False
        )
        maxima[i : i + rows], argmax = unmark(torch.sparse.mm(picks, marked, "amax"))
        chosen[i : i + rows] = argmax.clamp_max_(points - 1)  # a valid row even after a NaN
    return maxima if sign is None else maxima.mul_(sign), chosen
