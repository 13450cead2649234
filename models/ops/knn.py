"""Exact k-nearest-neighbor search within clouds."""

from __future__ import annotations

import torch
from torch import Tensor

from models.ops.backend import backend_for
from models.ops.precision import at_least_float32, exact_products, without_autocast
from models.ops.tiles import (
    can_mark,
    closeness_factors,
    is_exporting,
    mark_places,
    runs_eagerly,
    tiles_of_clouds,
    unmark,
)

# Elements per tile of the distance matrix: small enough for a CPU's cache, large enough to fill a GPU.
_TILE = {"cpu": 1 << 21, "cuda": 1 << 25}
# On a CPU, selection from more than this many times k values first compares the maxima of groups.
_DIRECT_SELECTION, _GROUP = 16, 8


def largest(values: Tensor, k: int) -> Tensor:
    """Return the indices of the k largest values of each row, in no particular order.

    On a CPU ``topk`` takes several nanoseconds per value. Comparing the maxima of groups first is faster: the k groups
    with the largest maxima contain k largest values, since no value elsewhere exceeds any of those k maxima. NumPy's
    vectorized partition then selects, on values into which their indices are packed.

    Args:
        values: (R, N).
        k: 1 to N.

    Returns:
        (R, k) int64.
    """
    rows, n = values.shape
    if (kernels := backend_for(values)) and n <= kernels.MAX_ROW:
        return kernels.largest(values, k)
    if not (can_mark(values, n) and runs_eagerly()):
        return values.topk(k, dim=1, sorted=False).indices
    if n <= _DIRECT_SELECTION * k:
        return _largest_places(values, torch.arange(n), k)
    groups = n // _GROUP
    grouped = groups * _GROUP  # group g is g, g + groups, g + 2 groups, ...: the maximum runs over contiguous rows
    chosen = _largest_places(values[:, :grouped].unflatten(1, (_GROUP, groups)).amax(1), torch.arange(groups), k)
    candidates = (chosen[:, None] + torch.arange(0, grouped, groups)[:, None]).flatten(1)  # (R, _GROUP * k)
    if grouped < n:
        candidates = torch.cat([candidates, torch.arange(grouped, n).expand(rows, -1)], dim=1)
    return _largest_places(values.gather(1, candidates), candidates, k)


def _largest_places(values: Tensor, index: Tensor, k: int) -> Tensor:
    """Return the entries of ``index``, (N,) or (R, N), at the k largest of each row of (R, N) values."""
    finite = torch.finfo(values.dtype)
    marked = mark_places(values.clamp(finite.min, finite.max), index)  # packing would turn infinity into NaN
    first = marked.shape[1] - k
    marked.numpy().partition(first, axis=1)
    return unmark(marked[:, first:])[1]


def knn(points: Tensor, k: int) -> Tensor:
    """Return the indices of the k nearest points of every point, itself included, in no particular order.

    Distances are computed in at least float32, even under autocast: in bfloat16 about 5 % of the neighbors change.
    Clouds are centered first, so that a large offset costs no digits.

    Args:
        points: (B, N, C).
        k: number of neighbors, 1 to N.

    Returns:
        (B, N, k) int64.

    Raises:
        ValueError: k is not between 1 and N.
    """
    b, n, _ = points.shape
    if not 1 <= k <= n:
        raise ValueError(f"k = {k} neighbors in clouds of {n} points: k must be between 1 and the number of points")
    with torch.no_grad(), without_autocast(points.device), exact_products(points.device):
        x = at_least_float32(points.detach())
        x = x - x.mean(dim=1, keepdim=True)  # (B, N, C)
        if (kernels := backend_for(x)) and n <= kernels.MAX_ROW and x.shape[2] <= kernels.MAX_COORDINATES:
            return kernels.nearest(x, k)
        queries, others = closeness_factors(x)  # (B, N, C + 1), (B, C + 1, N)
        if is_exporting():
            return torch.bmm(queries, others).topk(k, dim=2, sorted=False).indices
        index = torch.empty(b, n, k, dtype=torch.int64, device=x.device)
        width = kernels.padded(n) if kernels and n <= kernels.MAX_ROW else n
        space = None  # all tiles share the memory of the first, which is the largest
        for clouds, rows in tiles_of_clouds(b, n, n, _TILE.get(x.device.type, 1 << 24)):
            part = queries[clouds, rows]  # (b, n, C + 1)
            space = part.new_empty(len(part), part.shape[1], width) if space is None else space
            closeness = torch.bmm(part, others[clouds], out=space[: len(part), : part.shape[1], :n])  # (b, n, N)
            index[clouds, rows] = largest(closeness.flatten(0, 1), k).unflatten(0, closeness.shape[:2])  # (b, n, k)
    return index


def flatten_neighbors(index: Tensor) -> Tensor:
    """Convert indices within each cloud (B, N, k) to indices into the rows of the whole batch (B * N, k)."""
    b, n, k = index.shape
    return (index + torch.arange(b, device=index.device)[:, None, None] * n).reshape(b * n, k)
