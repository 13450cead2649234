"""Triton kernels for the inner loops of the encoders: neighbor selection, and EdgeConv's passes over neighbors.

``models.ops.backend`` decides where they are used; the calling modules contain the equivalent PyTorch operations. The
kernels are deterministic: without atomic additions, no result depends on the order in which threads run.

Set TRITON_INTERPRET=1 before this module is imported to run the kernels on a CPU, as the tests do.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

# Widest row that one program can keep in registers: 8 warps of 32 threads, 64 numbers per thread.
MAX_ROW = 8 * 32 * 64
# Largest number of coordinates for which ``nearest`` computes distances itself.
MAX_COORDINATES = 4
# Rows are aligned to this many numbers (64 bytes), so that a thread can load 16 bytes at once.
ROW_MULTIPLE = 16


@triton.jit
def _key(value):
    """Map floats to integers in the same order."""
    bits = (value + 0.0).to(tl.int32, bitcast=True)  # -0 becomes 0
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def _float(key):
    """Invert ``_key``."""
    return tl.where(key < 0, key ^ 0x7FFFFFFF, key).to(tl.float32, bitcast=True)


@triton.jit
def _count(condition):
    return tl.sum(condition.to(tl.int32), 0)


@triton.jit
def _raise(value, low, high, count, k: tl.constexpr, FEW: tl.constexpr):
    """Raise the threshold ``low`` until k values reach it, or to the k-th largest value in case of ties.

    Args:
        value: at least k values.
        low: key of a threshold that at least k values reach.
        high: key of an upper bound of the k-th largest value.
        count: number of values that reach ``low``.
        k: number of values to select.
        FEW: if fewer values than this are in excess, drop the smallest one, which finds ties at once; otherwise bisect
            the range of keys.

    Returns:
        The key and the number of values that reach it: k, or more if several equal the k-th largest.
    """
    while (low < high) & (count != k):
        next = (low >> 1) + (high >> 1) + ((low | high) & 1)  # rounded up, without overflow
        if FEW > 0:
            if count - k < FEW:
                low = _key(tl.min(tl.where(value >= _float(low), value, float("inf")), 0))
                next = low + 1
        above = _count(value >= _float(next))
        if above >= k:
            low = next
            count = above
        else:
            high = next - 1
    return low, count


@triton.jit
def _row(source, row, column, n, stride, coordinates: tl.constexpr):
    """Load part of a row: values of ``source``, or the negative squared distances from its point ``row`` to others.

    NaNs and the padding of the row become -inf.
    """
    if coordinates == 0:
        value = tl.load(source + row * stride + column, mask=column < stride, other=-float("inf"))
    else:
        cloud = source + row // n * coordinates * stride
        value = tl.zeros_like(column).to(tl.float32)
        for axis in tl.static_range(coordinates):
            difference = tl.load(cloud + axis * stride + column, mask=column < stride, other=0.0)
            difference -= tl.load(cloud + axis * stride + row % n)
            value -= difference * difference
    return tl.where(column < n, tl.maximum(value, -float("inf")), -float("inf"))


@triton.jit
def _select(
    source, out, n, stride, coordinates: tl.constexpr, k: tl.constexpr, WIDTH: tl.constexpr, PART: tl.constexpr
):
    """Write the indices of the k largest values of a row in ascending order; ties go to the lowest indices.

    The k-th largest maximum over groups of 4 is a tight lower bound of the k-th largest value, and to find it takes
    counting only a quarter of the numbers. The row is then read again from the cache, one part at a time: a single
    prefix sum ranks the larger values and, 16 bits up, the values that equal the k-th largest.
    """
    row = tl.program_id(0).to(tl.int64)
    value = _row(source, row, tl.arange(0, WIDTH), n, stride, coordinates)
    if WIDTH >= 4 * k:
        maxima = tl.max(tl.reshape(value, [4, WIDTH // 4]), 0)
        low = _key(tl.min(maxima, 0))
        high = _key(tl.max(maxima, 0))
        if _count(maxima >= _float(high)) >= k:  # k equal distances: most rows after input dropout
            low = high
        low, _ = _raise(maxima, low, high, tl.full([], WIDTH // 4, tl.int32), k, 0)
        low, count = _raise(value, low, high, _count(value >= _float(low)), k, 5)
    else:
        count = tl.full([], WIDTH, tl.int32)
        low, count = _raise(value, _key(tl.min(value, 0)), _key(tl.max(value, 0)), count, k, 5)
    least = _float(low)
    missing = tl.full([], k, tl.int32)  # number of values to take that equal ``least``
    if count != k:
        missing -= _count(value > least)
    before = tl.full([], 0, tl.int32)
    for first in range(0, n, PART):
        column = first + tl.arange(0, PART)
        part = _row(source, row, column, n, stride, coordinates)
        equal = part == least
        flags = (part > least).to(tl.int32) + (equal.to(tl.int32) << 16)  # sums of either stay below 2^15
        total = tl.sum(flags, 0)
        if ((total & 0xFFFF) > 0) | ((total > 0) & ((before >> 16) < missing)):
            sums = before + tl.cumsum(flags, 0)
            rank = sums >> 16
            slot = (sums & 0xFFFF) + tl.minimum(rank, missing) - 1
            tl.store(out + row * k + slot, column.to(tl.int64), mask=(part > least) | (equal & (rank <= missing)))
        before += total


@triton.jit
def _tile(points, width, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Return a program's rows and channels, their masks, and their offsets in a (points, width) tensor."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    channel = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    exists = row < points
    inside = exists[:, None] & (channel < width)[None, :]
    return row, channel, exists, inside, row[:, None] * width + channel[None, :]


@triton.jit
def _edge_forward(
    a,
    c,
    neighbors,
    sign,
    about,
    extremes,
    argmax,
    sums,
    points,
    width,
    k: tl.constexpr,
    MOMENTS: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    TOGETHER: tl.constexpr,
):
    """Compute in one pass over the neighbors: extreme, argmax, and the sums of h - about and of its square."""
    row, channel, exists, inside, at = _tile(points, width, ROWS, WIDTH)
    center = tl.load(c + at, mask=inside, other=0.0)
    direction = tl.load(sign + channel, mask=channel < width, other=1.0)[None, :]
    centered = center - tl.load(about + channel, mask=channel < width, other=0.0)[None, :]
    best = tl.full([ROWS, WIDTH], -float("inf"), tl.float32)
    best_row = tl.zeros([ROWS, WIDTH], tl.int32)
    total = tl.zeros([ROWS, WIDTH], tl.float32)
    squares = tl.zeros([ROWS, WIDTH], tl.float32)
    for first in range(0, k, TOGETHER):
        for step in tl.static_range(TOGETHER):
            known = exists & (first + step < k)
            neighbor = tl.load(neighbors + row * k + first + step, mask=known, other=0)
            edge = known[:, None] & inside
            value = tl.load(a + neighbor[:, None] * width + channel[None, :], mask=edge, other=0.0)
            signed = value * direction
            better = edge & ((signed > best) | (signed != signed))  # NaN propagates, as in torch.max
            best = tl.where(better, signed, best)
            best_row = tl.where(better, neighbor.to(tl.int32)[:, None], best_row)
            if MOMENTS:
                h = tl.where(edge, value + centered, 0.0)
                total += h
                squares += h * h
    tl.store(extremes + at, best * direction + center, mask=inside)
    tl.store(argmax + at, best_row, mask=inside)
    if MOMENTS:
        slot = tl.program_id(0).to(tl.int64) * 2 * width + channel
        tl.store(sums + slot, tl.sum(total, 0), mask=channel < width)
        tl.store(sums + slot + width, tl.sum(squares, 0), mask=channel < width)


@triton.jit
def _gradient_of_centers(
    a,
    c,
    neighbors,
    grad_scale,
    constant,
    grad_at_argmax,
    out,
    points,
    width,
    k: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    TOGETHER: tl.constexpr,
):
    """Write grad_scale (sum of a over the neighbors + k c) + k constant + grad_at_argmax."""
    row, channel, exists, inside, at = _tile(points, width, ROWS, WIDTH)
    total = k * tl.load(c + at, mask=inside, other=0.0)
    for first in range(0, k, TOGETHER):
        for step in tl.static_range(TOGETHER):
            known = exists & (first + step < k)
            neighbor = tl.load(neighbors + row * k + first + step, mask=known, other=0)
            edge = known[:, None] & inside
            total += tl.load(a + neighbor[:, None] * width + channel[None, :], mask=edge, other=0.0)
    grad_scales = tl.load(grad_scale + channel, mask=channel < width, other=0.0)[None, :]
    constants = tl.load(constant + channel, mask=channel < width, other=0.0)[None, :]
    tl.store(
        out + at,
        total * grad_scales + k * constants + tl.load(grad_at_argmax + at, mask=inside, other=0.0),
        mask=inside,
    )


@triton.jit
def _gradient_of_neighbors(
    a,
    c,
    order,
    starts,
    grad_scale,
    constant,
    grad_at_argmax,
    argmax,
    out,
    width,
    k: tl.constexpr,
    LIST: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Sum the gradients of the edges to a row, which ``order`` lists, LIST edges at a time.

    The gradient of an edge is grad_scale (a_j + c_i) + constant, plus grad_at_argmax if the edge is the extreme.
    """
    row = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    exists = channel < width
    at = row * width + channel
    start, stop = tl.load(starts + row), tl.load(starts + row + 1)
    grad_scales = tl.load(grad_scale + channel, mask=exists, other=0.0)
    constants = tl.load(constant + channel, mask=exists, other=0.0)
    everywhere = constants + grad_scales * tl.load(a + at, mask=exists, other=0.0)
    total = tl.zeros([LIST, WIDTH], tl.float32)
    first = start
    while first < stop:
        entry = first + tl.arange(0, LIST)
        center = tl.load(order + entry, mask=entry < stop, other=0).to(tl.int64) // k
        before = tl.load(order + entry - 1, mask=(entry > start) & (entry < stop), other=-k).to(tl.int64) // k
        edge = (entry < stop)[:, None] & exists[None, :]
        source = center[:, None] * width + channel[None, :]
        h = tl.load(c + source, mask=edge, other=0.0)
        grad_at_argmax_here = tl.load(grad_at_argmax + source, mask=edge, other=0.0)
        best_row = tl.load(argmax + source, mask=edge, other=-1).to(tl.int64)
        # If a row is listed twice as a neighbor of the same point, in consecutive entries, count the extreme once.
        total += h * grad_scales[None, :] + tl.where(
            (best_row == row) & (center != before)[:, None], grad_at_argmax_here, 0.0
        )
        first += LIST
    tl.store(out + at, tl.sum(total, 0) + (stop - start).to(tl.float32) * everywhere, mask=exists)


def _power_of_two(x: int) -> int:
    return 1 << (x - 1).bit_length()


def _row_launch(n: int) -> dict[str, int]:
    """Return launch options for rows of n numbers: 64 numbers per thread, 4 per part."""
    width = max(32, _power_of_two(n))
    warps = max(1, width // 2048)
    return {"WIDTH": width, "PART": min(width, 128 * warps), "num_warps": warps}


def _edge_launch(width: int) -> dict[str, int]:
    """Return the tile size and launch options of a pass over neighbors."""
    return {"ROWS": 8, "WIDTH": max(16, min(128, _power_of_two(width))), "TOGETHER": 4, "num_warps": 4}


def padded(n: int) -> int:
    """Round a row length up to a multiple of ``ROW_MULTIPLE``."""
    return -(-n // ROW_MULTIPLE) * ROW_MULTIPLE


def largest(values: Tensor, k: int) -> Tensor:
    """Return the indices of the k largest values of each row in ascending order; ties go to the lowest indices.

    Args:
        values: (R, N) float32, N at most ``MAX_ROW``; a view of (R, ``padded(N)``) is not copied.
        k: 1 to N.

    Returns:
        (R, k) int64.
    """
    rows, n = values.shape
    stride = padded(n)
    if values.stride() != (stride, 1) or values.storage_offset() % ROW_MULTIPLE or not _holds(values, rows * stride):
        values = F.pad(values, (0, stride - n))
    out = values.new_empty((rows, k), dtype=torch.int64)
    with torch.cuda.device_of(values):
        _select[(rows,)](values, out, n, stride, 0, k, **_row_launch(n))
    return out


def _holds(x: Tensor, numbers: int) -> bool:
    """Return whether the storage of ``x`` has this many numbers from its offset on."""
    return x.untyped_storage().nbytes() >= (x.storage_offset() + numbers) * x.element_size()


def nearest(points: Tensor, k: int) -> Tensor:
    """Return the indices of the k nearest points of every point, with distances and selection in one kernel.

    Args:
        points: (B, N, C) float32, C at most ``MAX_COORDINATES``, N at most ``MAX_ROW``.
        k: 1 to N.

    Returns:
        (B, N, k) int64, ascending; ties go to the lowest indices.
    """
    b, n, coordinates = points.shape
    stride = padded(n)
    axes = F.pad(points.mT, (0, stride - n)).contiguous()  # (B, C, padded N)
    out = points.new_empty((b, n, k), dtype=torch.int64)
    with torch.cuda.device_of(points):
        _select[(b * n,)](axes, out, n, stride, coordinates, k, **_row_launch(n))
    return out


def edge_extremes(
    a: Tensor, c: Tensor, neighbors: Tensor, sign: Tensor, *, about: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute the extremes of h_ij = a_j + c_i over the neighbors j, and the sums for its moments.

    Args:
        a: (P, C) float32.
        c: (P, C) float32.
        neighbors: (P, k) int64.
        sign: (C,) of 1 and -1; -1 computes the minimum instead of the maximum.
        about: (C,) subtracted from h in the sums, so that no digits cancel; None leaves the sums at zero.

    Returns:
        Extremes (P, C), the rows j that they come from (P, C) int32, and over all edges the sum of h - about and of its
        square, each (C,).
    """
    a, c, neighbors = a.contiguous(), c.contiguous(), neighbors.contiguous()
    points, width = a.shape
    launch = _edge_launch(width)
    grid = (triton.cdiv(points, launch["ROWS"]), triton.cdiv(width, launch["WIDTH"]))
    extremes, argmax = torch.empty_like(a), torch.empty_like(a, dtype=torch.int32)
    sums = a.new_zeros(2, width) if about is None else a.new_empty(grid[0], 2, width)
    with torch.cuda.device_of(a):
        _edge_forward[grid](
            *(a, c, neighbors, sign, sign if about is None else about, extremes, argmax, sums),
            *(points, width, neighbors.shape[1]),
            MOMENTS=about is not None,
            **launch,
        )
    total, squares = (sums if about is None else sums.sum(0)).unbind(0)
    return extremes, argmax, total, squares


def edge_gradients(
    a: Tensor,
    c: Tensor,
    neighbors: Tensor,
    grad_scale: Tensor,
    constant: Tensor,
    grad_at_argmax: Tensor,
    argmax: Tensor,
) -> tuple[Tensor, Tensor]:
    """Compute the gradients of a and c if that of each edge is ``grad_scale * (a_j + c_i) + constant``, plus extremes.

    Args:
        a: (P, C) float32.
        c: (P, C) float32.
        neighbors: (P, k) int64.
        grad_scale: (C,).
        constant: (C,).
        grad_at_argmax: (P, C) gradient with respect to the extremes.
        argmax: (P, C) the row that each extreme comes from.

    Returns:
        The gradients of a and c, each (P, C).
    """
    a, c, neighbors, grad_at_argmax, argmax = (x.contiguous() for x in (a, c, neighbors, grad_at_argmax, argmax))
    points, width = a.shape
    k, launch = neighbors.shape[1], _edge_launch(width)
    ends, order = neighbors.flatten().int().sort(stable=True)
    starts = torch.searchsorted(ends, torch.arange(points + 1, device=a.device, dtype=ends.dtype))
    grad_a, grad_c = torch.empty_like(a), torch.empty_like(c)
    channels = triton.cdiv(width, launch["WIDTH"])
    with torch.cuda.device_of(a):
        _gradient_of_centers[triton.cdiv(points, launch["ROWS"]), channels](
            *(a, c, neighbors, grad_scale, constant, grad_at_argmax, grad_c, points, width, k), **launch
        )
        _gradient_of_neighbors[points, channels](
            *(a, c, order, starts, grad_scale, constant, grad_at_argmax, argmax, grad_a, width, k),
            LIST=16,
            WIDTH=launch["WIDTH"],
            num_warps=launch["num_warps"],
        )
    return grad_a, grad_c
