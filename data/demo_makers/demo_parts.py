"""Parametric objects whose parts are known exactly, for the demo set of part segmentation.

An object is a union of simple solids, each of which belongs to one part. Points are drawn uniformly by area from the
surfaces of the solids; points inside another solid are hidden and rejected, so that the labels are exact and every
point is visible. Lengths are roughly in meters, y is up, the front faces +z.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from data.rendering import Material, Mesh, sample_surface
from datasets.shape_reader import to_unit_sphere

# Category -> (synset of WordNet 3.0, as in ShapeNet; names of its parts).
CATEGORIES: dict[str, tuple[str, tuple[str, ...]]] = {
    "airplane": ("02691156", ("body", "wing", "tail", "engine")),
    "bed": ("02818832", ("frame", "headboard", "mattress", "pillow")),
    "bottle": ("02876657", ("body", "neck", "cap")),
    "chair": ("03001627", ("back", "seat", "leg", "arm")),
    "guitar": ("03467517", ("head", "neck", "body")),
    "lamp": ("03636649", ("base", "shade", "pole")),
    "mug": ("03797390", ("handle", "body")),
    "table": ("04379243", ("top", "leg", "drawer")),
}
ROUND = 20  # corners of a circle
# Without this margin, rounding would hide the points of two touching faces: only points deeper than this are hidden.
DEPTH = 1e-6


@dataclass(frozen=True)
class Solid:
    """A closed surface that belongs to a part.

    Attributes:
        part: the part's name.
        vertices: (v, 3) float64.
        triangles: (t, 3) corners.
        contains: (n, 3) points -> (n,) bool, strictly inside.
    """

    part: str
    vertices: np.ndarray
    triangles: np.ndarray
    contains: Callable[[np.ndarray], np.ndarray]

    def moved(self, turn: np.ndarray, shift: Sequence[float] = (0, 0, 0)) -> Solid:
        """Multiply by a regular 3 x 3 matrix (a rotation or a stretch), then shift."""
        back, offset, inside = np.linalg.inv(turn).T, np.asarray(shift, float), self.contains
        return Solid(
            self.part,
            self.vertices @ np.asarray(turn).T + offset,
            self.triangles,
            lambda p: inside((p - offset) @ back),
        )


def about(axis: str, degrees: float) -> np.ndarray:
    """Return the rotation matrix (3, 3) about x, y or z, counterclockwise seen from the tip of the axis."""
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    i = "xyz".index(axis)
    j, k = (i + 1) % 3, (i + 2) % 3
    matrix = np.eye(3)
    matrix[j, j], matrix[j, k], matrix[k, j], matrix[k, k] = c, -s, s, c
    return matrix


def hull(part: str, points: np.ndarray) -> Solid:
    """Convex hull of (n, 3) points."""
    from scipy.spatial import ConvexHull

    points = np.asarray(points, float)
    shape = ConvexHull(points)
    normal, offset = shape.equations[:, :3].T, shape.equations[:, 3]
    return Solid(part, points, shape.simplices, lambda p: ((p @ normal + offset) < -DEPTH).all(1))


def ring(center: Sequence[float], radius: float | tuple[float, float]) -> np.ndarray:
    """Return a horizontal circle or ellipse, (ROUND, 3)."""
    rx, rz = radius if isinstance(radius, tuple) else (radius, radius)
    angle = np.arange(ROUND) * 2 * np.pi / ROUND
    return np.stack([rx * np.cos(angle), np.zeros(ROUND), rz * np.sin(angle)], 1) + center


def rectangle(center: Sequence[float], size: tuple[float, float]) -> np.ndarray:
    """Return a horizontal rectangle of width (x) and depth (z), (4, 3)."""
    signs = np.array([[-1, 0, -1], [1, 0, -1], [1, 0, 1], [-1, 0, 1]])
    return signs * [size[0] / 2, 0, size[1] / 2] + center


def box(part: str, center: Sequence[float], size: Sequence[float]) -> Solid:
    """Return a box of width, height and depth around a center."""
    shift = np.array([0, size[1] / 2, 0])
    sides = (size[0], size[2])
    return hull(part, np.concatenate([rectangle(center + shift, sides), rectangle(center - shift, sides)]))


def bar(
    part: str,
    low: Sequence[float],
    high: Sequence[float],
    size: float | tuple[float, float],
    *,
    end: float | tuple[float, float] | None = None,
    is_round: bool = False,
) -> Solid:
    """Return an upright bar between two face centers; it may lean and taper. ``size``: diameter or (x, z) sides."""
    size, end = (s if isinstance(s, tuple) else (s, s) for s in (size, size if end is None else end))
    if is_round:
        faces = [ring(low, (size[0] / 2, size[1] / 2)), ring(high, (end[0] / 2, end[1] / 2))]
    else:
        faces = [rectangle(low, size), rectangle(high, end)]
    return hull(part, np.concatenate(faces))


def lathe(part: str, profile: Sequence[tuple[float, float]]) -> Solid:
    """Revolve a closed outline of (radius, height) corners around the y axis; it need not be convex."""
    outline = np.asarray(profile, float)
    angle = np.arange(ROUND) * 2 * np.pi / ROUND
    radius, height = outline[:, :1], np.broadcast_to(outline[:, 1:], (len(outline), ROUND))
    vertices = np.stack([radius * np.cos(angle), height, radius * np.sin(angle)], 2).reshape(-1, 3)
    i, j = np.meshgrid(np.arange(len(outline)), np.arange(ROUND), indexing="ij")
    next_i, next_j = (i + 1) % len(outline), (j + 1) % ROUND
    a, b, c, d = (m * ROUND + n for m, n in ((i, j), (next_i, j), (next_i, next_j), (i, next_j)))
    triangles = np.stack([np.stack([a, b, c], -1), np.stack([a, c, d], -1)]).reshape(-1, 3)

    def contains(points: np.ndarray) -> np.ndarray:
        # The sides of the solid are flat between its corners, so the radius is measured on the polygon's scale.
        step = np.arctan2(points[:, 2], points[:, 0]) % (2 * np.pi / ROUND) - np.pi / ROUND
        r = np.hypot(points[:, 0], points[:, 2]) * np.cos(step) / np.cos(np.pi / ROUND)
        y, inside = points[:, 1], np.zeros(len(points), bool)
        for (r0, y0), (r1, y1) in zip(outline, np.roll(outline, -1, 0), strict=True):
            if y0 != y1:
                inside ^= ((y0 > y) != (y1 > y)) & (r < r0 + (y - y0) / (y1 - y0) * (r1 - r0) - DEPTH)
        return inside

    return Solid(part, vertices, triangles, contains)


def tube(part: str, path: Sequence[Sequence[float]], radius: float) -> Solid:
    """Return a round tube along a path of (n, 3) points, with closed ends."""
    path = np.asarray(path, float)
    step = np.diff(path, axis=0)
    along = np.concatenate([step[:1], step[:-1] / np.linalg.norm(step[:-1], axis=1)[:, None] + step[1:], step[-1:]])
    along /= np.linalg.norm(along, axis=1)[:, None]
    # Transport one direction along the path, so that the tube does not twist.
    side, sides = np.eye(3)[np.abs(along[0]).argmin()], []
    for direction in along:
        side = side - side @ direction * direction
        side = side / np.linalg.norm(side)
        sides.append(side)
    first = np.asarray(sides)
    second = np.cross(along, first)
    count = 10
    angle = np.arange(count) * 2 * np.pi / count
    rings = path[:, None] + radius * (
        np.cos(angle)[:, None] * first[:, None] + np.sin(angle)[:, None] * second[:, None]
    )
    i, j = np.meshgrid(np.arange(len(path) - 1), np.arange(count), indexing="ij")
    k = (j + 1) % count
    quads = np.stack([i * count + j, (i + 1) * count + j, (i + 1) * count + k, i * count + k], -1).reshape(-1, 4)
    last = len(path) * count
    rim = np.arange(count)
    caps = [
        np.stack([np.full(count, last + end), rim + base, (rim + 1) % count + base], 1)
        for end, base in ((0, 0), (1, last - count))
    ]
    vertices = np.concatenate([rings.reshape(-1, 3), path[[0, -1]]])

    def contains(points: np.ndarray) -> np.ndarray:
        distance = np.full(len(points), np.inf)
        for a, b in zip(path, path[1:], strict=False):
            t = (((points - a) @ (b - a)) / ((b - a) @ (b - a))).clip(0, 1)
            distance = np.minimum(distance, np.linalg.norm(points - a - t[:, None] * (b - a), axis=1))
        # The surface is a polygon inside the circle: points within the polygon's inscribed circle are inside.
        return distance < radius * np.cos(np.pi / count) - DEPTH

    return Solid(part, vertices, np.concatenate([quads[:, [0, 1, 2]], quads[:, [0, 2, 3]], *caps]), contains)


def shell(outline: Sequence[tuple[float, float]], thickness: float) -> list[tuple[float, float]]:
    """Close an open outline of (radius, height) corners to a wall of the given thickness along the radius."""
    return [*outline, *((max(r - thickness, 1e-3), y) for r, y in reversed(outline))]


# ------------------------------------------------------------------------------------------------------- objects


def legs(
    rng: np.random.Generator, part: str, width: float, depth: float, height: float, *, thick: tuple[float, float]
) -> list[Solid]:
    """Four legs under a plate of ``width`` x ``depth``: round or square, straight or tapered, upright or splayed."""
    size, taper = rng.uniform(*thick), rng.choice([1.0, rng.uniform(0.45, 0.8)])
    is_round, splay = rng.random() < 0.5, rng.choice([0.0, rng.uniform(0.02, 0.14)]) * height
    x, z = width / 2 - size * 0.6 - rng.uniform(0, 0.12) * width, depth / 2 - size * 0.6 - rng.uniform(0, 0.12) * depth

    def leg(sx: int, sz: int) -> Solid:
        foot, top = (sx * (x + splay), 0, sz * (z + splay)), (sx * x, height, sz * z)
        return bar(part, foot, top, size * taper, end=size, is_round=is_round)

    found = [leg(sx, sz) for sx in (-1, 1) for sz in (-1, 1)]
    if rng.random() < 0.3:  # stretchers between the legs
        y, across = rng.uniform(0.15, 0.5) * height, size * 0.6
        at = 1 - y / height
        sx, sz = x + splay * at, z + splay * at
        found += [box(part, (0, y, s * sz), (2 * sx, across, across)) for s in (-1, 1)]
        found += [box(part, (s * sx, y + across, 0), (across, across, 2 * sz)) for s in (-1, 1)]
    return found


def pedestal(rng: np.random.Generator, part: str, reach: float, height: float) -> list[Solid]:
    """One column on a disc, on a cross or on a star of five."""
    found = [bar(part, (0, 0.01, 0), (0, height, 0), rng.uniform(0.12, 0.3) * reach, is_round=True)]
    kind = rng.choice(["disc", "cross", "star"])
    if kind == "disc":
        rise = rng.uniform(0.02, 0.06)
        return [*found, bar(part, (0, 0, 0), (0, rise, 0), 2 * reach, end=rng.uniform(0.5, 1.9) * reach, is_round=True)]
    count, start, thick = (4, rng.choice([0, 45])) + (rng.uniform(0.03, 0.06),) if kind == "cross" else (5, 18, 0.035)
    for i in range(count):
        foot = bar(part, (0, 0, 0), (0, reach, 0), (thick, thick), end=(thick, thick * 0.7))
        lie = about("y", start + 360 * i / count) @ about("z", 90 + rng.uniform(0, 0.1))
        found.append(foot.moved(lie, (0, thick / 2 + 0.03 * (kind == "star"), 0)))
    if kind == "star":
        radius = reach * 0.94
        angles = np.radians(18 + 72 * np.arange(5))
        found += [hull(part, ball(0.03) + [-radius * np.cos(a), 0.03, radius * np.sin(a)]) for a in angles]  # castors
    return found


def ball(radius: float) -> np.ndarray:
    """Corners of a sphere, (n, 3)."""
    rows = [(0, radius * np.cos(t), radius * np.sin(t)) for t in np.linspace(0, np.pi, 9)]
    return np.concatenate([ring((0, y, 0), r) if r > 1e-6 else np.array([[0, y, 0]]) for _, y, r in rows])


def chair(rng: np.random.Generator) -> list[Solid]:
    """Seat, back (panel, slats, rails or spindles), legs (four, pedestal or sled), often arms."""
    w, d, h = rng.uniform(0.40, 0.62), rng.uniform(0.40, 0.58), rng.uniform(0.36, 0.52)
    thick, rise, lean = rng.uniform(0.025, 0.11), rng.uniform(0.30, 0.70), rng.uniform(0.0, 0.16)
    top = h + thick
    is_round = rng.random() < 0.2
    front = rng.uniform(0.9, 1.15)  # a seat is often wider in front
    if is_round:
        seat = bar("seat", (0, h, 0), (0, top, 0), (w, d), is_round=True)
    else:
        shape = np.concatenate([rectangle((0, y, 0), (w, d)) for y in (h, top)])
        shape[shape[:, 2] > 0, 0] *= front
        seat = hull("seat", shape)
    found = [seat]
    # --- back
    deep, kind = rng.uniform(0.02, 0.08), rng.choice(["panel", "slats", "rails", "spindles", "gap"])
    z0, bw = -d / 2 + deep / 2 + 0.06 * d * is_round, w * (0.8 if is_round else rng.uniform(0.85, 1.0))
    top_w = bw * rng.uniform(0.75, 1.1)
    y0, y1 = top - 0.02, top + rise

    def back_at(t: float) -> np.ndarray:
        return np.array([0, y0 + t * (y1 - y0), z0 - t * lean])

    if kind == "panel":
        found.append(bar("back", back_at(0), back_at(1), (bw, deep), end=(top_w, deep * rng.uniform(0.5, 1.0))))
    else:
        post = rng.uniform(0.025, 0.05)
        posts = [(s * (bw - post) / 2, s * (top_w - post) / 2) for s in (-1, 1)]
        found += [
            bar("back", back_at(0) + [a, 0, 0], back_at(1) + [b, 0, 0], post, is_round=bool(rng.random() < 0.5))
            for a, b in posts
        ]
        inner = [] if kind in ("rails", "gap") else np.linspace(0, 1, int(rng.integers(3, 8)) + 2)[1:-1]
        width = rng.uniform(0.4, 0.75) * bw / (len(inner) + 1) if kind == "slats" else rng.uniform(0.012, 0.022)
        for t in inner:
            low, high = (edge[0] + t * (edge[1] - edge[0]) for edge in zip(*posts, strict=True))
            across = (width, 0.018) if kind == "slats" else width
            found.append(bar("back", back_at(0.0) + [low, 0, 0], back_at(0.95) + [high, 0, 0], across))
        tall = rng.uniform(0.05, 0.12)
        rails = (
            [(0.92, tall)] if kind != "rails" else [(t, tall) for t in np.linspace(0.3, 0.94, int(rng.integers(2, 5)))]
        )
        rails = [(rng.uniform(0.65, 0.8), rise * rng.uniform(0.4, 0.5))] if kind == "gap" else rails
        for t, high in rails:
            middle, wide = back_at(t), bw + (top_w - bw) * t
            tilt = lean / (y1 - y0) * high / 2
            low_end, high_end = middle + [0, -high / 2, tilt], middle + [0, high / 2, -tilt]
            found.append(bar("back", low_end, high_end, (wide, max(deep * 0.6, 0.02))))
    # --- legs
    kind = rng.choice(["four", "four", "four", "pedestal", "sled"])
    if kind == "four":
        found += legs(
            rng, "leg", w * (0.8 if is_round else 1), d * (0.8 if is_round else 1), h + 0.01, thick=(0.025, 0.055)
        )
    elif kind == "pedestal":
        found += pedestal(rng, "leg", rng.uniform(0.22, 0.32), h + 0.01)
    else:
        radius, x, z = rng.uniform(0.012, 0.02), w / 2 - 0.04, d / 2 - 0.05
        for s in (-1, 1):
            path = [(s * x, h + 0.01, z), (s * x, radius, z), (s * x, radius, -z), (s * x, h + 0.01, -z)]
            found.append(tube("leg", path, radius))
    # --- arms
    if rng.random() < 0.5:
        y, length = top + rng.uniform(0.14, 0.26), d * rng.uniform(0.65, 1.0)
        x, wide = w / 2 * max(front, 1.0) - rng.uniform(-0.02, 0.02), rng.uniform(0.03, 0.08)
        kind = rng.choice(["post", "panel", "loop"])
        z_front = z0 + length
        for s in (-1, 1):
            if kind == "panel":
                low, high = (s * x, h - 0.02, (z0 + z_front) / 2), (s * x, y, (z0 + z_front) / 2)
                found.append(bar("arm", low, high, (wide, length)))
            elif kind == "post":
                found.append(box("arm", (s * x, y, (z0 + z_front) / 2), (wide, 0.03, length)))
                z = z_front - rng.uniform(0.03, 0.12)
                found.append(bar("arm", (s * (x - 0.01), h + 0.01, z), (s * x, y, z), 0.028))
            else:
                path = [(s * (x - 0.02), h + 0.02, z_front - 0.02), (s * x, y - 0.03, z_front)]
                path += [(s * x, y, z_front - 0.03), (s * (x - 0.01), y, z0)]
                found.append(tube("arm", path, rng.uniform(0.012, 0.02)))
    return found


def table(rng: np.random.Generator) -> list[Solid]:
    """Top (rectangle, circle or ellipse), legs (four, pedestal, boards or trestles), sometimes drawers."""
    w, h = rng.uniform(0.6, 1.8), rng.uniform(0.38, 0.85)
    d, thick = w * rng.uniform(0.4, 1.0), rng.uniform(0.018, 0.08)
    is_round = rng.random() < 0.3
    under = h - thick
    top = bar("top", (0, under, 0), (0, h, 0), (w, d), is_round=is_round)
    found, inner = [top], 0.68 if is_round else 1.0
    kind = rng.choice(["four", "four", "pedestal", "boards", "trestle"])
    reach = min(w, d) / 2
    if kind == "four":
        found += legs(rng, "leg", w * inner, d * inner, under + 0.005, thick=(0.03, 0.1))
    elif kind == "pedestal":
        found += pedestal(rng, "leg", reach * rng.uniform(0.5, 0.8), under + 0.005)
    elif kind == "boards":
        x, board = w / 2 * inner - rng.uniform(0.03, 0.15) * w, rng.uniform(0.02, 0.06)
        deep = d * inner * rng.uniform(0.7, 0.98)
        found += [bar("leg", (s * x, 0, 0), (s * x, under + 0.005, 0), (board, deep)) for s in (-1, 1)]
        if rng.random() < 0.5:
            found.append(box("leg", (0, under * rng.uniform(0.3, 0.7), 0), (2 * x, 0.08, 0.03)))
    else:
        x, z, size = w / 2 * inner - rng.uniform(0.05, 0.12) * w, d / 2 * inner * 0.85, rng.uniform(0.025, 0.06)
        for s in (-1, 1):
            found += [bar("leg", (s * x, 0, t * z), (s * x, under + 0.005, -t * z), size) for t in (-1, 1)]
    if rng.random() < 0.5 and kind != "pedestal":
        kind = rng.choice(["flat", "side", "both"])
        deep = d * inner * rng.uniform(0.6, 0.85)
        if kind == "flat":
            high, wide = rng.uniform(0.07, 0.14), w * inner * rng.uniform(0.35, 0.7)
            blocks = [(0.0, high, wide)]
        else:
            high, wide = (under - 0.02) * rng.uniform(0.5, 0.95), w * inner * rng.uniform(0.2, 0.3)
            x = w * inner / 2 - wide / 2 - 0.08 * w
            blocks = [(x * s, high, wide) for s in ((-1, 1) if kind == "both" else (rng.choice([-1, 1]),))]
        for x, high, wide in blocks:
            found.append(box("drawer", (x, under - high / 2 + 0.005, 0), (wide, high, deep)))
            count = 1 if high < 0.16 else int(rng.integers(2, 4))
            for i in range(count):  # fronts with a knob stand a little proud
                y, tall = under - high * (i + 0.5) / count, high / count * 0.85
                found.append(box("drawer", (x, y, deep / 2 + 0.005), (wide * 0.94, tall, 0.02)))
                found.append(hull("drawer", ball(0.015) + [x, y, deep / 2 + 0.025]))
    return found


def lamp(rng: np.random.Generator) -> list[Solid]:
    """Build a table, floor, desk or hanging lamp: base, pole and shade."""
    kind = rng.choice(["table", "table", "floor", "floor", "desk", "desk", "hanging"])
    tall = {"table": rng.uniform(0.35, 0.6), "floor": rng.uniform(1.1, 1.6), "desk": 0.5, "hanging": 0.8}[kind]
    size = {"table": 0.16, "floor": 0.24, "desk": 0.10, "hanging": 0.20}[kind] * rng.uniform(0.7, 1.25)
    radius = {"table": 0.010, "floor": 0.016, "desk": 0.009, "hanging": 0.008}[kind] * rng.uniform(0.8, 1.8)

    def shade() -> Solid:
        """Return a shade that hangs from its upper rim at y = 0, centered on the axis."""
        style = rng.choice(["drum", "cone", "bell", "globe"]) if kind != "desk" else rng.choice(["cone", "bell"])
        high = size * rng.uniform(0.8, 1.6)
        if style == "globe":
            return hull("shade", ball(size * 0.8) * [1, rng.uniform(0.7, 1.2), 1] + [0, -size * 0.7, 0])
        narrow = {"drum": rng.uniform(0.85, 1.0), "cone": rng.uniform(0.3, 0.7), "bell": 0.25}[style] * size
        outline = [(narrow, 0.0), (size, -high)]
        if style == "bell":
            bend = np.linspace(0, np.pi / 2, 7)
            outline = [(narrow + (size - narrow) * np.sin(b), -high * (1 - np.cos(b))) for b in bend]
        if kind == "hanging" or style == "bell":  # closed at the top
            outline = [(0.001, 0.0), *outline]
            inner = [(max(r - 0.006, 0.001), y - 0.006 * (y == 0)) for r, y in reversed(outline)]
            return lathe("shade", [*outline, *inner])
        return lathe("shade", shell(outline, 0.006))

    if kind == "hanging":
        drop = tall * rng.uniform(0.5, 1.3)
        rose = bar("base", (0, drop - rng.uniform(0.02, 0.06), 0), (0, drop, 0), rng.uniform(0.1, 0.16), is_round=True)
        return [rose, bar("pole", (0, -0.02, 0), (0, drop - 0.01, 0), 2 * radius, is_round=True), shade()]
    reach = size * rng.uniform(0.55, 0.9)
    style = rng.choice(
        ["disc", "square", "dome", "tripod" if kind == "floor" else "vase" if kind == "table" else "disc"]
    )
    start = 0.02
    if style == "tripod":
        start = tall * rng.uniform(0.25, 0.55)
        feet = [about("y", 120 * i) @ np.array([reach * 1.2, 0, 0]) for i in range(3)]
        base = [tube("base", [foot + [0, radius, 0], (0, start, 0)], radius * 1.2) for foot in feet]
    elif style == "vase":
        start = tall * rng.uniform(0.35, 0.65)
        bulge, t = rng.uniform(0.5, 0.9) * reach, np.linspace(0, 1, 9)
        body = 0.35 * reach + bulge * np.sin(np.pi * t ** rng.uniform(0.6, 1.4)) ** rng.uniform(0.7, 1.6)
        base = [lathe("base", [(0.001, 0), *zip(body, t * start, strict=True), (0.001, start)])]
    elif style == "square":
        base = [box("base", (0, 0.015, 0), (2 * reach, 0.03, 2 * reach))]
    else:
        end = 2 * reach if style == "disc" else 0.4 * reach
        start = 0.025 if style == "disc" else rng.uniform(0.04, 0.1)
        base = [bar("base", (0, 0, 0), (0, start, 0), 2 * reach, end=end, is_round=True)]
    if kind != "desk":
        pole = bar("pole", (0, start - 0.01, 0), (0, tall, 0), 2 * radius, is_round=True)
        return [*base, pole, shade().moved(np.eye(3), (0, tall + rng.uniform(-0.02, 0.03), 0))]
    # A desk lamp: one bent arm, or a lower and an upper one; the shade looks forward and down.
    lower, upper = rng.uniform(0.2, 0.4), rng.uniform(0.18, 0.35)
    first, second = np.radians(rng.uniform(0, 35)), np.radians(rng.uniform(20, 70))
    elbow = np.array([0, start - 0.01 + lower * np.cos(first), -lower * np.sin(first)])
    tip = elbow + [0, upper * np.cos(second), upper * np.sin(second)]
    head = shade().moved(about("x", -rng.uniform(10, 50)), tip + [0, 0.01, 0])
    return [*base, tube("pole", [(0, start - 0.01, 0), elbow, tip], radius), head]


def mug(rng: np.random.Generator) -> list[Solid]:
    """Build a hollow body (straight, tapered or bulged) with one handle (round, ear or square), or two."""
    high, radius, wall = rng.uniform(0.07, 0.14), rng.uniform(0.03, 0.05), rng.uniform(0.003, 0.006)
    bottom, bulge, t = rng.uniform(0.6, 1.1), rng.choice([0.0, rng.uniform(-0.12, 0.25)]), np.linspace(0, 1, 9)
    outer = radius * (bottom + (1 - bottom) * t + bulge * np.sin(np.pi * t))
    outline = [(0.0005, 0.0), *zip(outer, t * high, strict=True)]
    inner = [(r - wall, max(y, wall * 1.5)) for r, y in reversed(outline[1:])]
    found = [lathe("body", [*outline, *inner, (0.0005, wall * 1.5)])]
    y0, y1 = high * rng.uniform(0.1, 0.3), high * rng.uniform(0.7, 0.92)
    out, thick = rng.uniform(0.6, 1.1) * radius, rng.uniform(0.0035, 0.007)
    kind = rng.choice(["round", "ear", "square"])
    low_x, high_x = (float(np.interp(y / high, t, outer)) - wall / 2 for y in (y0, y1))
    if kind == "square":
        path = [(high_x, y1, 0), (high_x + out, y1, 0), (high_x + out, y0, 0), (low_x, y0, 0)]
    else:
        angle = np.linspace(0, np.pi, 13)
        power = 1.0 if kind == "round" else rng.uniform(0.5, 0.7)
        swing, along = np.sin(angle) ** power, (1 - np.cos(angle)) / 2
        shift = (0.25 * out * np.sin(2 * angle)) if kind == "ear" else 0
        x = high_x + (low_x - high_x) * along + out * swing + shift * swing
        path = np.stack([x, y1 + (y0 - y1) * along, np.zeros(13)], 1)
    handle = tube("handle", path, thick)
    flat = np.diag([1, 1, rng.uniform(1.0, 2.2)])  # often a flat strap
    found.append(handle.moved(flat))
    if rng.random() < 0.1:
        found.append(handle.moved(flat * [-1, 1, 1]))
    return found


def bottle(rng: np.random.Generator) -> list[Solid]:
    """Body (round or with flat sides), neck and cap (screw cap, cork, ball or spray head)."""
    high, radius = rng.uniform(0.14, 0.24), rng.uniform(0.032, 0.05)
    neck_r, neck_h = radius * rng.uniform(0.25, 0.6), high * rng.uniform(0.12, 0.5)
    shoulder, t = high * rng.uniform(0.04, 0.25), np.linspace(0, 1, 7)
    kind = rng.choice(["round", "round", "square", "waist"])
    if kind == "square":
        sides = (2 * radius, 2 * radius * rng.uniform(0.5, 1.0))
        low, mid = rectangle((0, 0, 0), sides), rectangle((0, high, 0), sides)
        found = [hull("body", np.concatenate([low, mid, ring((0, high + shoulder, 0), neck_r)]))]
    else:
        waist = rng.uniform(0.08, 0.25) if kind == "waist" else 0.0
        body = radius * (1 - waist * np.sin(np.pi * t) ** 2) * np.where(t == 0, rng.uniform(0.8, 1.0), 1)
        curve = neck_r + (radius - neck_r) * np.cos(t * np.pi / 2) ** rng.uniform(0.5, 1.5)
        outline = [*zip(body, t * high, strict=True), *zip(curve[1:], high + t[1:] * shoulder, strict=True)]
        found = [lathe("body", [(0.0005, 0), *outline, (0.0005, high + shoulder)])]
    y0, y1 = high + shoulder - 0.002, high + shoulder + neck_h
    end = neck_r * rng.uniform(0.8, 1.0)
    found.append(bar("neck", (0, y0, 0), (0, y1, 0), 2 * neck_r, end=2 * end, is_round=True))
    if rng.random() < 0.5:  # a lip
        found.append(bar("neck", (0, y1 - 0.012, 0), (0, y1 - 0.005, 0), 2.4 * end, is_round=True))
    kind = rng.choice(["screw", "screw", "cork", "ball", "spray"])
    wide = end * rng.uniform(1.12, 1.4)
    if kind == "screw":
        tall = rng.uniform(0.012, 0.035)
        found.append(bar("cap", (0, y1 - tall * 0.3, 0), (0, y1 + tall, 0), 2 * wide, is_round=True))
    elif kind == "cork":
        tall = rng.uniform(0.012, 0.03)
        found.append(bar("cap", (0, y1 - 0.005, 0), (0, y1 + tall, 0), 1.7 * end, end=2.1 * end, is_round=True))
    elif kind == "ball":
        found.append(hull("cap", ball(wide * 1.1) + [0, y1 + wide * 0.8, 0]))
    else:
        found.append(bar("cap", (0, y1 - 0.004, 0), (0, y1 + 0.03, 0), 2 * wide, end=1.2 * wide, is_round=True))
        found.append(box("cap", (0, y1 + 0.032, 0.012), (0.014, 0.014, 0.05)))
    return found


def airplane(rng: np.random.Generator) -> list[Solid]:
    """Build an airliner, a jet fighter or a propeller plane: body, wings, tail and engines; the nose points to +z."""
    kind = rng.choice(["airliner", "airliner", "fighter", "propeller"])
    length = 1.0
    radius = {
        "airliner": rng.uniform(0.05, 0.08),
        "fighter": rng.uniform(0.05, 0.075),
        "propeller": rng.uniform(0.06, 0.09),
    }[kind]
    nose, rear = rng.uniform(0.08, 0.2) if kind != "fighter" else rng.uniform(0.2, 0.35), rng.uniform(0.25, 0.45)
    t = np.linspace(0, 1, 7)
    back = radius * (0.25 + 0.75 * np.sin(t * np.pi / 2))
    front = radius * np.cos(t * np.pi / 2) ** (0.6 if kind != "fighter" else 0.9)
    outline = [*zip(back, t * rear, strict=True)]
    outline += [*zip(np.maximum(front, 0.001), length - nose + t * nose, strict=True)]
    if kind == "fighter":
        outline[:7] = [(radius * (0.7 + 0.3 * x), x * rear) for x in t]
    lie = about("x", 90)
    body = lathe("body", [(0.001, 0), *outline, (0.001, length)]).moved(lie, (0, 0, -length / 2))
    flat = rng.uniform(0.85, 1.15)
    found = [body.moved(np.diag([1, flat, 1]))]

    def fin(part: str, root: Sequence[float], span: Sequence[float], chord: float, tip: float, sweep: float) -> Solid:
        """Build a blade from the leading edge ``root`` along ``span``; chords run back along -z."""
        span, thick = np.asarray(span, float), 0.012
        across = np.cross(span, [0, 0, 1])
        across *= thick / 2 / np.linalg.norm(across)
        start = np.asarray(root, float)
        end = start + span - [0, 0, sweep]
        low = [start, start - [0, 0, chord], end, end - [0, 0, tip]]
        return hull(part, np.concatenate([np.asarray(low) + across, np.asarray(low) - across]))

    half = rng.uniform(0.35, 0.6) if kind != "fighter" else rng.uniform(0.25, 0.4)
    chord = rng.uniform(0.14, 0.22) if kind != "fighter" else rng.uniform(0.3, 0.45)
    tip = chord * rng.uniform(0.25, 0.6) if kind != "propeller" else chord * rng.uniform(0.6, 1.0)
    sweeps = rng.uniform(0.1, 0.3), rng.uniform(0.15, 0.35), rng.uniform(0, 0.05)
    sweep = dict(zip(("airliner", "fighter", "propeller"), sweeps, strict=True))[kind]
    up = rng.uniform(-0.02, 0.08)
    lead = rng.uniform(0.08, 0.18) if kind != "fighter" else rng.uniform(0.02, 0.1)
    if kind == "propeller":
        lead = rng.uniform(0.18, 0.26)
    heights = [rng.choice([-0.5, 0.0, 0.75]) * radius * flat]
    if kind == "propeller" and rng.random() < 0.3:  # a biplane
        heights = [-0.7 * radius * flat, 0.16]
        for s in (-1, 1):
            x, z = s * half * 0.6, lead - chord / 2
            found.append(tube("wing", [(x, heights[0] + up * 0.6, z), (x, heights[1] + up * 0.6, z)], 0.007))
        found.append(tube("wing", [(0, 0, lead - chord / 2), (0, heights[1], lead - chord / 2)], 0.012))
    for y in heights:
        found += [fin("wing", (0, y, lead), (s * half, up, 0), chord, tip, sweep) for s in (-1, 1)]
    # --- tail
    tail_chord, rise = rng.uniform(0.1, 0.16), rng.uniform(0.12, 0.2)
    z = -length / 2 + tail_chord * rng.uniform(1.0, 1.3)
    lean = rng.uniform(0.02, 0.14)
    tail_half, style = rng.uniform(0.12, 0.2), rng.choice(["plain", "plain", "t", "v"])
    if style == "v":
        spans = [(s * tail_half * 0.9, rise * 0.9, 0) for s in (-1, 1)]
        found += [fin("tail", (0, 0.01, z), span, tail_chord, tail_chord * 0.6, lean) for span in spans]
    else:
        found.append(fin("tail", (0, 0.01, z), (0, rise, 0), tail_chord, tail_chord * rng.uniform(0.4, 0.8), lean))
        y, shift = (rise * 0.97, lean) if style == "t" else (0.01, 0.0)
        root, blade = (0, y, z - shift), (tail_chord * 0.8, tail_chord * 0.4, lean * 0.6)
        found += [fin("tail", root, (s * tail_half, 0.01, 0), *blade) for s in (-1, 1)]
    # --- engines

    def nacelle(x: float, y: float, z: float, size: float, long: float) -> Solid:
        shape = [(0.001, 0), (0.6 * size, 0), (size, 0.45 * long), (size * 0.9, long), (0.7 * size, long)]
        shape += [(0.65 * size, 0.8 * long), (0.001, 0.8 * long)]
        return lathe("engine", shape).moved(lie, (x, y, z - long / 2))

    def propeller(x: float, y: float, z: float, size: float) -> list[Solid]:
        blades = int(rng.integers(2, 5))
        spinner = bar("engine", (0, -0.03, 0), (0, 0.05, 0), 0.05, end=0.006, is_round=True).moved(lie, (x, y, z))
        blade = box("engine", (0, size / 2, 0), (0.028, size, 0.008))
        start = rng.uniform(0, 90)
        return [spinner] + [
            blade.moved(about("z", start + 360 * i / blades) @ about("y", 20), (x, y, z)) for i in range(blades)
        ]

    if kind == "airliner":
        size, long = rng.uniform(0.026, 0.04), rng.uniform(0.1, 0.16)
        if rng.random() < 0.25:
            found += [nacelle(s * (radius + size * 0.9), 0.02, -0.26, size, long) for s in (-1, 1)]
        else:
            spots = [0.35] if rng.random() < 0.65 else [0.3, 0.6]
            for t in spots:
                y, z = heights[0] + up * t - size * 0.95, lead - sweep * t
                found += [nacelle(s * half * t, y, z, size, long) for s in (-1, 1)]
    elif kind == "fighter":
        count, size = int(rng.integers(1, 3)), radius * rng.uniform(0.5, 0.65)
        long = rng.uniform(0.08, 0.2)
        spots = [0.0] if count == 1 else [-0.6 * radius, 0.6 * radius]
        found += [nacelle(x, 0, -length / 2, size * (1.2 if count == 1 else 0.9), long) for x in spots]
    elif len(heights) == 1 and rng.random() < 0.3:
        for s in (-1, 1):
            x, y = s * half * 0.35, heights[0] + up * 0.35
            found += [nacelle(x, y, lead - 0.02, 0.03, 0.18), *propeller(x, y, lead + 0.07, 0.11)]
    else:
        found += propeller(0, 0, length / 2 - 0.005, rng.uniform(0.12, 0.18))
    return found


def bed(rng: np.random.Generator) -> list[Solid]:
    """Frame with legs (and often a footboard), headboard, mattress and one or two pillows; the head is at -z."""
    w, d = rng.uniform(0.85, 1.9), rng.uniform(1.85, 2.15)
    h, rail = rng.uniform(0.22, 0.42), rng.uniform(0.08, 0.2)
    top, soft = h, rng.uniform(0.12, 0.3)
    rail = min(rail, h - 0.03)
    found = [box("frame", (0, top - rail / 2, 0), (w, rail, d))]
    if rng.random() < 0.8:
        size, is_round = rng.uniform(0.05, 0.11), bool(rng.random() < 0.4)
        corners = [(sx * (w / 2 - size * 0.7), sz * (d / 2 - size * 0.7)) for sx in (-1, 1) for sz in (-1, 1)]
        found += [bar("frame", (x, 0, z), (x, top - rail / 2, z), size, is_round=is_round) for x, z in corners]
    else:  # a box down to the floor
        found.append(box("frame", (0, (top - rail) / 2 + 0.005, 0), (w * 0.93, top - rail + 0.01, d * 0.93)))
    inset = rng.uniform(0.005, 0.05)
    found.append(box("mattress", (0, top + soft / 2 - 0.02, 0.01), (w - 2 * inset, soft, d - 2 * inset)))
    # --- headboard
    high, deep = top + soft + rng.uniform(0.15, 0.7), rng.uniform(0.03, 0.1)
    z = -d / 2 - deep / 2 + 0.005
    wide = w * rng.uniform(0.98, 1.12)
    foot = rng.choice([0.0, h * 0.5])
    if rng.random() < 0.55:
        end = (wide * rng.uniform(0.75, 1.0), deep)
        found.append(bar("headboard", (0, foot, z), (0, high, z), (wide, deep), end=end))
    else:
        post = max(deep, 0.04)
        found += [
            bar("headboard", (s * (wide - post) / 2, 0, z), (s * (wide - post) / 2, high, z), post) for s in (-1, 1)
        ]
        found.append(box("headboard", (0, high - 0.05, z), (wide, 0.07, post * 0.8)))
        count = int(rng.integers(4, 10))
        for x in np.linspace(-0.5, 0.5, count + 2)[1:-1] * (wide - post):
            found.append(bar("headboard", (x, top, z), (x, high - 0.05, z), 0.025, is_round=True))
    if rng.random() < 0.4:
        up = top + soft * rng.uniform(0.3, 1.6)
        found.append(box("frame", (0, up / 2, d / 2 + 0.02), (wide, up, 0.05)))
    # --- pillows
    count = 1 if w < 1.2 else 2
    pw, pd, ph = w / count * rng.uniform(0.6, 0.88), rng.uniform(0.3, 0.5), rng.uniform(0.10, 0.18)
    for i in range(count):
        x = (i - (count - 1) / 2) * w / count
        y = top + soft - 0.02
        cushion = ball(1.0)
        cushion = np.sign(cushion) * np.abs(cushion) ** 0.5  # between a ball and a box
        middle = [x, y + ph * 0.38, -d / 2 + pd / 2 + inset + 0.03]
        found.append(hull("pillow", cushion / np.abs(cushion).max(0) * [pw / 2, ph / 2, pd / 2] + middle))
    return found


def guitar(rng: np.random.Generator) -> list[Solid]:
    """Build an upright acoustic, electric or pointed guitar: head, neck and body."""
    kind = rng.choice(["acoustic", "electric", "pointed"])
    deep = rng.uniform(0.08, 0.12) if kind == "acoustic" else rng.uniform(0.035, 0.055)
    upright = about("x", 90)
    low_r, up_r = rng.uniform(0.16, 0.21), rng.uniform(0.11, 0.15)
    tall = rng.uniform(0.85, 1.1)

    def disc(x: float, y: float, radius: float, thick: float = deep) -> Solid:
        plate = bar("body", (0, -thick / 2, 0), (0, thick / 2, 0), 2 * radius, is_round=True)
        return plate.moved(upright, (x, y, 0))

    if kind == "acoustic":
        gap = (low_r + up_r) * rng.uniform(0.7, 0.85)
        found = [disc(0, low_r, low_r), disc(0, low_r + gap, up_r)]
        waist = min(low_r, up_r) * rng.uniform(1.3, 1.6)
        found.append(box("body", (0, low_r + gap * 0.55, 0), (waist, gap * 0.6, deep * 0.98)))
        body_top = low_r + gap + up_r
    elif kind == "electric":
        low_r *= 0.85
        gap = low_r * rng.uniform(0.7, 0.95)
        found = [disc(-0.01, low_r, low_r), disc(0, low_r + gap, low_r * 0.8)]
        for s in (-1, 1):  # two horns
            tip = np.array([s * low_r * rng.uniform(0.75, 0.95), low_r + gap + low_r * rng.uniform(0.75, 1.15)])
            y = low_r + gap - 0.05
            root = np.array([[s * 0.05, y], [s * low_r * 0.78, y], tip, tip - [s * 0.05, 0]])
            found.append(hull("body", np.concatenate([np.c_[root, np.full(4, z)] for z in (-deep / 2.1, deep / 2.1)])))
        body_top = low_r + gap + low_r * 0.75
    else:
        found = []
        wide, body_top = rng.uniform(0.17, 0.24), rng.uniform(0.38, 0.48)
        for s in (-1, 1):  # an arrow's two wings
            outline = np.array([[-s * 0.035, body_top], [s * 0.035, body_top], [s * wide, 0.0]])
            outline = np.concatenate([outline, [[s * wide * 0.55, 0.0], [-s * 0.03, body_top * 0.5]]])
            found.append(hull("body", np.concatenate([np.c_[outline, np.full(5, z)] for z in (-deep / 2, deep / 2)])))
    wide, front = rng.uniform(0.045, 0.06), deep / 2
    end = max(tall, body_top + 0.25)
    start = body_top - rng.uniform(0.05, 0.12)
    neck_z = front - 0.004
    found.append(bar("neck", (0, start, neck_z), (0, end, neck_z), (wide * 1.15, 0.03), end=(wide, 0.028)))
    bridge = box("body", (0, body_top * rng.uniform(0.25, 0.4), front), (0.1, 0.02, 0.02))
    found.append(bridge)
    # --- head
    long, flare, tilt = rng.uniform(0.12, 0.2), rng.uniform(1.2, 1.9), rng.uniform(0, 0.05)
    top = (rng.uniform(-0.02, 0.02), end + long, neck_z - tilt)
    found.append(bar("head", (0, end - 0.005, neck_z), top, (wide * 1.1, 0.022), end=(wide * flare, 0.018)))
    sides = (-1, 1) if rng.random() < 0.6 else (rng.choice([-1, 1]),)
    count = 3 if len(sides) == 2 else 6
    for s in sides:
        for t in np.linspace(0.2, 0.85, count):
            x = wide * (1.1 + (flare - 1.1) * t) / 2 * s + top[0] * t
            start_peg = np.array([x * 0.8, end + long * t, neck_z - tilt * t])
            found.append(tube("head", [start_peg, start_peg + [s * 0.04, 0, 0]], 0.008))
    return found


BUILDERS: dict[str, Callable[[np.random.Generator], list[Solid]]] = {
    "airplane": airplane,
    "bed": bed,
    "bottle": bottle,
    "chair": chair,
    "guitar": guitar,
    "lamp": lamp,
    "mug": mug,
    "table": table,
}


def draw_points(solids: Sequence[Solid], count: int, seed: int) -> tuple[np.ndarray, list[str]]:
    """Draw points uniformly by area from the surface of the union of solids.

    Returns:
        (count, 3) float64, and the part of each.
    """
    first = np.cumsum([0] + [len(solid.vertices) for solid in solids[:-1]])
    triangles = np.concatenate([solid.triangles + start for solid, start in zip(solids, first, strict=True)])
    mesh = Mesh(
        vertices=np.concatenate([solid.vertices for solid in solids]),
        triangles=triangles,
        uv=np.zeros((len(triangles), 3, 2), np.float32),
        material=np.repeat(np.arange(len(solids)), [len(solid.triangles) for solid in solids]),
        materials=[Material(solid.part) for solid in solids],
    )
    points, owners, missing, attempt = [], [], count, 0
    while missing > 0:
        drawn, _, owner, _ = sample_surface(mesh, 2 * count, seed + 1000 * attempt)
        hidden = np.zeros(len(drawn), bool)
        for i, solid in enumerate(solids):
            hidden |= (owner != i) & solid.contains(drawn)
        seen = np.flatnonzero(~hidden)[:missing]
        points.append(drawn[seen])
        owners.append(owner[seen])
        missing -= len(seen)
        attempt += 1
    return np.concatenate(points), [solids[i].part for i in np.concatenate(owners)]


def build_object(category: str, split: str, number: int, *, seed: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Build one labeled shape; a pure function of its arguments.

    Args:
        category: a key of ``CATEGORIES``.
        split: ``"train"``, ``"val"`` or ``"test"``.
        number: which shape of the category and split.
        seed: of the set.
        count: number of points.

    Returns:
        Points (count, 3) float64 in the unit sphere, y up, in random order, and their parts (count,) uint8, numbered
        within the category.
    """
    rng = np.random.default_rng([seed, zlib.crc32(f"{split}/{category}/{number}".encode())])
    solids = BUILDERS[category](rng)
    points, parts = draw_points(solids, count, int(rng.integers(2**31)))
    names = CATEGORIES[category][1]
    return to_unit_sphere(points), np.array([names.index(part) for part in parts], np.uint8)
