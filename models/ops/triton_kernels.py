"""The encoder's inner loops as Triton kernels: selection of neighbours, and EdgeConv's passes over them.

``models.ops.backend`` decides where they are used; the plain PyTorch form of each stands in the module that calls it.
No result depends on the order in which threads run: there are no atomic additions, so the same input gives the same
bits.

With TRITON_INTERPRET=1 in the environment before this module is imported they run on a CPU, which is how the tests run
them without a GPU.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# The widest row that one program keeps in registers, 32 numbers to a thread: 16 warps of 32 threads.
MAX_ROW = 16 * 32 * 32
# The most coordinates of which ``nearest`` computes distances itself.
MAX_COORDINATES = 4


@triton.jit
def _places_of_largest(value, inside, column, out, k: tl.constexpr):
    """Write where the k largest of a row are, in ascending order; of equal ones those that come first.

    Floats compare as integers once those of negative numbers are turned round. Halving the range between the smallest
    and the largest finds the k-th: at most 32 counts, fewer where a count is k.
    """
    bits = (value + 0.0).to(tl.int32, bitcast=True)  # -0 becomes 0
    key = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    low = tl.min(tl.where(inside, key, 0x7FFFFFFF), 0)
    key = tl.where(inside, key, -0x80000000)  # below all that is counted
    high = tl.max(key, 0)
    count = tl.sum(inside.to(tl.int32), 0)
    while (low < high) & (count != k):
        middle = (low >> 1) + (high >> 1) + ((low | high) & 1)  # rounded up, without overflow
        above = tl.sum((key >= middle).to(tl.int32), 0)
        if above >= k:
            low = middle
            count = above
        else:
            high = middle - 1
    chosen = inside & (key >= low)
    if count != k:
        larger = key > low
        equal = chosen & (key == low)
        missing = k - tl.sum(larger.to(tl.int32), 0)
        chosen = larger | (equal & (tl.cumsum(equal.to(tl.int32), 0) <= missing))
    position = tl.cumsum(chosen.to(tl.int32), 0) - 1
    tl.store(out + position, column.to(tl.int64), mask=chosen)


@triton.jit
def _largest(values, out, n, k: tl.constexpr, WIDTH: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    inside = column < n
    value = tl.load(values + row * n + column, mask=inside, other=0.0)
    _places_of_largest(value, inside, column, out + row * k, k)


@triton.jit
def _nearest(points, out, n, coordinates: tl.constexpr, k: tl.constexpr, WIDTH: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    cloud = points + row // n * n * coordinates
    column = tl.arange(0, WIDTH)
    inside = column < n
    distance = tl.zeros([WIDTH], tl.float32)
    for axis in tl.static_range(coordinates):
        difference = tl.load(cloud + column * coordinates + axis, mask=inside, other=0.0)
        difference -= tl.load(points + row * coordinates + axis)
        distance += difference * difference
    _places_of_largest(-distance, inside, column, out + row * k, k)


@triton.jit
def _tile(points, width, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Rows and channels of a program, which of them there are, and where they lie in a (points, width) tensor."""
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
    """One pass over the neighbours: extreme, its place, and the sums of h - about and of its square."""
    row, channel, exists, inside, at = _tile(points, width, ROWS, WIDTH)
    center = tl.load(c + at, mask=inside, other=0.0)
    direction = tl.load(sign + channel, mask=channel < width, other=1.0)[None, :]
    centered = center - tl.load(about + channel, mask=channel < width, other=0.0)[None, :]
    best = tl.full([ROWS, WIDTH], -float("inf"), tl.float32)
    place = tl.zeros([ROWS, WIDTH], tl.int32)
    total = tl.zeros([ROWS, WIDTH], tl.float32)
    squares = tl.zeros([ROWS, WIDTH], tl.float32)
    for first in range(0, k, TOGETHER):
        for step in tl.static_range(TOGETHER):
            known = exists & (first + step < k)
            neighbor = tl.load(neighbors + row * k + first + step, mask=known, other=0)
            edge = known[:, None] & inside
            value = tl.load(a + neighbor[:, None] * width + channel[None, :], mask=edge, other=0.0)
            signed = value * direction
            better = edge & ((signed > best) | (signed != signed))  # what is not a number stays, as in torch.max
            best = tl.where(better, signed, best)
            place = tl.where(better, neighbor.to(tl.int32)[:, None], place)
            if MOMENTS:
                h = tl.where(edge, value + centered, 0.0)
                total += h
                squares += h * h
    tl.store(extremes + at, best * direction + center, mask=inside)
    tl.store(argmax + at, place, mask=inside)
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
    """Write slope (sum of the neighbours' a + k c) + k constant + peak."""
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
    """Sum of the gradients of the edges that end at a row, of which ``order`` has a list; a block of the list at once.

    That of an edge is slope (a_j + c_i) + constant, and the peak where it is the extreme.
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
        place = tl.load(argmax + source, mask=edge, other=-1).to(tl.int64)
        # A row that is the same row's neighbour twice is its extreme once; the two stand side by side in the list.
        total += h * grad_scales[None, :] + tl.where(
            (place == row) & (center != before)[:, None], grad_at_argmax_here, 0.0
        )
        first += LIST
    tl.store(out + at, tl.sum(total, 0) + (stop - start).to(tl.float32) * everywhere, mask=exists)


def _power_of_two(x: int) -> int:
    return 1 << (x - 1).bit_length()


def _row_launch(n: int) -> dict[str, int]:
    """How a program of a row of n numbers is launched: 16 numbers to a thread, twice that in the widest row."""
    width = max(32, _power_of_two(n))
    return {"WIDTH": width, "num_warps": min(16, max(1, width // 512))}


def _edge_launch(width: int) -> dict[str, int]:
    """The tile of one program of a pass over neighbours."""
    return {"ROWS": 8, "WIDTH": max(16, min(128, _power_of_two(width))), "TOGETHER": 4, "num_warps": 4}


def largest(values: Tensor, k: int) -> Tensor:
    """Where the k largest values of every row are: ascending, and of equal ones those that come first.

    Args:
        values: (R, N) float32, N at most ``MAX_ROW``.
        k: 1 to N.

    Returns:
        (R, k) int64.
    """
    values = values.contiguous()
    rows, n = values.shape
    out = values.new_empty((rows, k), dtype=torch.int64)
    with torch.cuda.device_of(values):
        _largest[(rows,)](values, out, n, k, **_row_launch(n))
    return out


def nearest(points: Tensor, k: int) -> Tensor:
    """Indices of the k nearest points of every point, distances and selection in one.

    Args:
        points: (B, N, C) float32, C at most ``MAX_COORDINATES``, N at most ``MAX_ROW``.
        k: 1 to N.

    Returns:
        (B, N, k) int64, ascending; of equally distant ones those that come first.
    """
    points = points.contiguous()
    b, n, coordinates = points.shape
    out = points.new_empty((b, n, k), dtype=torch.int64)
    with torch.cuda.device_of(points):
        _nearest[(b * n,)](points, out, n, coordinates, k, **_row_launch(n))
    return out


def edge_extremes(
    a: Tensor, c: Tensor, neighbors: Tensor, sign: Tensor, *, about: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Extremes of h_ij = a_j + c_i over the neighbours j, and the sums that its moments need.

    Args:
        a: (P, C) float32.
        c: (P, C) float32.
        neighbors: (P, k) int64.
        sign: (C,) of 1 and -1, where the minimum is wanted.
        about: (C,) what h is compared with in the sums; None leaves the sums at zero.

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
    return extremes, argmax, *(sums if about is None else sums.sum(0)).unbind(0)


def edge_gradients(
    a: Tensor,
    c: Tensor,
    neighbors: Tensor,
    grad_scale: Tensor,
    constant: Tensor,
    grad_at_argmax: Tensor,
    argmax: Tensor,
) -> tuple[Tensor, Tensor]:
    """Gradients with respect to a and c: of each edge ``grad_scale * (a_j + c_i) + constant``, and at extremes more.

    Args:
        a: (P, C) float32.
        c: (P, C) float32.
        neighbors: (P, k) int64.
        grad_scale: (C,).
        constant: (C,).
        grad_at_argmax: (P, C) gradient with respect to the extremes.
        argmax: (P, C) the row that each extreme comes from.

    Returns:
        Two tensors (P, C).
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
