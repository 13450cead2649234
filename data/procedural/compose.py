"""Compose shapes of simple solids: choose kinds, sizes, places and colors. Recipe: docs/generated_shapes.md.

Everything is a function of (seed, number, level), drawn from one random generator. Lengths are in the recipe's units; y
is up.
"""

from __future__ import annotations

import colorsys
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from data.procedural import solids
from data.procedural.solids import Solid

KINDS = ("superquadric", "box", "cylinder", "cone", "torus", "tube", "plate", "leg")
_WEIGHTS = np.array([0.18, 0.22, 0.14, 0.10, 0.08, 0.10, 0.10, 0.08])
LEVELS = {
    1: "one solid in one color",
    2: "2 to 4 solids along the axes, a color each",
    3: "1 to 9 solids, with thin plates and legs, and mirror symmetry",
    4: "and freely rotated parts",
    5: "and smooth displacement and colors in bands that cut across parts",
}
MAX_PARTS = 9
_SIZES = (0.08, 0.7)  # half extents, log-uniform
_THIN = (0.01, 0.04)
_LONG = (0.2, 0.7)
_TEXELS = 64  # of a band's texture
_CONTACT_POINTS = 150  # surface points that test whether two parts touch
_TRIES = 8  # attempts to place a part so that it touches another one
_MAX_ROUNDS = 50  # without a limit, an invisible surface would loop forever; less than 2 % visible does not occur


@dataclass(frozen=True)
class Part:
    """One surface of a shape.

    Attributes:
        solid: the placed solid.
        kind: index into ``KINDS``.
        number: of the primitive, from 0; mirror images share it.
    """

    solid: Solid
    kind: int
    number: int


@dataclass(frozen=True)
class Bands:
    """A second color by position, the same for all parts: a wave of colors along a direction.

    Attributes:
        direction: (3,) periods per unit of length.
        phase: periods.
        profile: (_TEXELS,) share of the second color along a period, 0 to 1.
        color: (3,) in 0..1.
    """

    direction: np.ndarray
    phase: float
    profile: np.ndarray
    color: np.ndarray


@dataclass(frozen=True)
class GeneratedShape:
    """A union of solids with colors.

    Attributes:
        parts: surfaces, including mirror images.
        colors: (primitives, 3) color of each primitive in 0..1.
        bands: second color, or None.
    """

    parts: list[Part]
    colors: np.ndarray
    bands: Bands | None

    def color_at(self, points: np.ndarray, number: np.ndarray) -> np.ndarray:
        """Return the colors (n, 3) of points (n, 3) on primitives ``number`` (n,)."""
        color = self.colors[number]
        if self.bands is None:
            return color
        along = (points @ self.bands.direction + self.bands.phase) % 1.0
        share = self.bands.profile[(along * _TEXELS).astype(int) % _TEXELS][:, None]
        return (1 - share) * color + share * self.bands.color


@dataclass(frozen=True)
class SurfaceSamples:
    """Points on the visible surface of a shape.

    Attributes:
        points: (n, 3) float64.
        normals: (n, 3) unit normals, inward or outward.
        kind: (n,) uint8 index into ``KINDS``.
        number: (n,) uint8 number of the primitive.
    """

    points: np.ndarray
    normals: np.ndarray
    kind: np.ndarray
    number: np.ndarray


def generator(seed: int, number: int) -> np.random.Generator:
    """Return the random generator of a shape."""
    return np.random.default_rng([seed, number])


def compose(seed: int, number: int, level: int = max(LEVELS)) -> GeneratedShape:
    """Compose shape ``number`` of a seed.

    Args:
        seed: of the set.
        number: of the shape.
        level: one of ``LEVELS``.

    Raises:
        ValueError: no such level.
    """
    if level not in LEVELS:
        raise ValueError(f"level must be one of {tuple(LEVELS)}, got {level}")
    rng = generator(seed, number)
    return _Composer(rng, level).shape()


class _Composer:
    """Draws one shape; parts are added one after another."""

    def __init__(self, rng: np.random.Generator, level: int) -> None:
        self.rng, self.level = rng, level
        self.aligned = level < 4 or rng.random() < 0.6
        self.mirror = level >= 3 and rng.random() < 0.6
        self.mirror_depth = self.mirror and rng.random() < 0.25
        self.parts: list[Part] = []
        self.surfaces: list[np.ndarray] = []  # points (_CONTACT_POINTS, 3) of each part

    def shape(self) -> GeneratedShape:
        for number in range(self._count()):
            self._add(number)
        count = self.parts[-1].number + 1
        return GeneratedShape(self.parts, self._colors(count), self._bands())

    def _count(self) -> int:
        if self.level == 1:
            return 1
        return int(self.rng.integers(2, 5) if self.level == 2 else self.rng.integers(1, MAX_PARTS + 1))

    def _add(self, number: int) -> None:
        """Add a primitive with its mirror images."""
        weights = _WEIGHTS.copy()
        if self.level < 3:
            weights[-2:] = 0
        kind = KINDS[self.rng.choice(len(KINDS), p=weights / weights.sum())]
        local, scale = self._primitive(kind)
        turn, upright = self._turn(kind)
        warp = self._warp() if self.level >= 5 and self.rng.random() < 0.4 else None
        if warp is not None:
            local = solids.warped(local, warp)
        solid = solids.placed(local, scale=scale, turn=turn, shift=np.zeros(3))
        shift = self._place(solid, under=kind == "leg" and upright, may_center=self.mirror and upright)
        images = [solids.placed(local, scale=scale, turn=turn, shift=shift)]
        for axis in (0,) * self.mirror + (2,) * self.mirror_depth:
            for image in [solids.reflected(image, axis) for image in images]:
                if not any(self._coincide(image, other) for other in images):
                    images.append(image)
        for image in images:
            self.parts.append(Part(image, KINDS.index(kind), number))
            self.surfaces.append(_surface_points(image, self.rng, _CONTACT_POINTS))

    def _coincide(self, a: Solid, b: Solid) -> bool:
        """Return whether two solids coincide; each would hide the whole surface of the other."""
        surface = _surface_points(a, self.rng, _CONTACT_POINTS)
        near = surface + self.rng.normal(size=surface.shape) * 0.03 * np.ptp(surface, axis=0)
        return bool((a.contains(near) == b.contains(near)).mean() > 0.99)

    def _place(self, solid: Solid, *, under: bool, may_center: bool) -> np.ndarray:
        """Return a shift (3,) that joins a solid to the earlier parts.

        Args:
            solid: at the origin.
            under: put it below an earlier part.
            may_center: allow putting it into the mirror plane.
        """
        middle = _middle(solid.vertices)
        if not self.parts:
            return -middle
        surface = _surface_points(solid, self.rng, _CONTACT_POINTS)
        for _ in range(_TRIES):
            shift = self._under(solid) if under else self._attached(solid, surface)
            if may_center and self.rng.random() < 0.5:
                shift[0] = -middle[0]
            if self._touches(solid, surface, shift):
                return shift
        return self._met(surface, depth=0.0)

    def _touches(self, solid: Solid, surface: np.ndarray, shift: np.ndarray) -> bool:
        """Return whether a solid with some surface points, moved by ``shift``, overlaps an earlier part."""
        if any(part.solid.contains(surface + shift).any() for part in self.parts):
            return True
        return bool(solid.contains(np.concatenate(self.surfaces) - shift).any())

    def _primitive(self, kind: str) -> tuple[Solid, np.ndarray]:
        """Draw a solid in its own coordinates and its half extents (3,)."""
        rng = self.rng
        fine = 8 if self.level >= 5 else 1
        if kind == "plate":
            solid = solids.box(divisions=fine) if rng.random() < 0.75 else solids.frustum(1.0)
            long, wide = self._log_uniform(_LONG, 2)
            return solid, np.array([long, self._log_uniform(_THIN), wide])
        if kind == "leg":
            solid = solids.box(divisions=fine) if rng.random() < 0.4 else solids.frustum(rng.uniform(0.7, 1.0))
            thin = self._log_uniform((0.015, 0.05))
            return solid, np.array([thin, self._log_uniform(_LONG), thin])
        makers: dict[str, Callable[[], Solid]] = {
            "superquadric": lambda: solids.superquadric(*self._exponents()),
            "box": lambda: solids.box(divisions=fine),
            "cylinder": lambda: solids.frustum(1.0),
            "cone": lambda: solids.frustum(0.0 if rng.random() < 0.5 else rng.uniform(0.15, 0.8)),
            "torus": lambda: solids.torus(rng.uniform(0.08, 0.45)),
            "tube": self._tube,
        }
        solid = makers[kind]()
        if kind == "tube":
            return solid, np.repeat(self._log_uniform((0.2, 0.7)), 3)
        if kind == "torus":  # a round or flattened ring whose tube is round when the ring is
            radius = self._log_uniform((0.12, 0.7))
            thickness = (1 - np.hypot(solid.vertices[:, 0], solid.vertices[:, 2]).min()) / 2
            squash = np.exp(rng.uniform(np.log(0.5), np.log(2), 2)) if rng.random() < 0.5 else np.ones(2)
            return solid, np.array([radius, radius * thickness * squash[0], radius * squash[1]])
        if rng.random() < 0.2:
            return solid, np.repeat(self._log_uniform((0.15, 0.6)), 3)
        return solid, self._log_uniform(_SIZES, 3)

    def _exponents(self) -> np.ndarray:
        return np.ones(2) if self.rng.random() < 0.4 else np.exp(self.rng.uniform(np.log(0.2), np.log(1.8), 2))

    def _tube(self) -> Solid:
        """Draw a tube: a handle, an arch or a free curve."""
        rng = self.rng
        if rng.random() < 0.5:  # an arch in a plane
            reach, spread = rng.uniform(0.5, 1.5), rng.uniform(0.3, 1.0)
            control = np.array([[-spread, 0, 0], [-spread, reach, 0], [spread, reach, 0], [spread, 0, 0]])
        else:
            control = np.cumsum(rng.normal(size=(4, 3)), axis=0)
            control /= max(np.abs(control - control.mean(0)).max(), 0.3)
        return solids.tube(control, self._log_uniform((0.04, 0.2)))

    def _turn(self, kind: str) -> tuple[np.ndarray, bool]:
        """Draw an orthogonal matrix, and whether it maps the axes onto themselves."""
        rng = self.rng
        free = not self.aligned and rng.random() < 0.7
        if self.level >= 4 and self.aligned and rng.random() < 0.12:  # a leaning part
            angle, axis = np.radians(rng.uniform(-35, 35)), int(rng.integers(3))
            turn = np.eye(3)
            i, j = (i for i in range(3) if i != axis)
            turn[i, i] = turn[j, j] = np.cos(angle)
            turn[i, j], turn[j, i] = -np.sin(angle), np.sin(angle)
            return turn, False
        if free:
            q, r = np.linalg.qr(rng.normal(size=(3, 3)))
            return q * np.sign(np.diag(r)), False
        if kind == "leg" and rng.random() < 0.7:
            return np.eye(3), True
        if kind == "plate" and rng.random() < 0.4:
            return np.eye(3), True
        turn = np.zeros((3, 3))
        turn[np.arange(3), rng.permutation(3)] = rng.choice([-1, 1], 3)
        return turn, True

    def _warp(self) -> solids.Warp:
        """Draw a smooth displacement: waves with probability 2/3, else taper and twist."""
        rng = self.rng
        waves = 3 if rng.random() < 0.66 else 0
        frequency = rng.normal(size=(waves, 3)) * rng.uniform(1.0, 3.0)
        amplitude = rng.normal(size=(waves, 3))
        slope = (np.linalg.norm(amplitude, axis=1) * np.linalg.norm(frequency, axis=1)).sum()
        if waves:
            amplitude *= rng.uniform(0.4, 1.0) * solids.WAVE_SLOPE / slope
        return solids.Warp(
            axis=int(rng.integers(3)),
            taper=rng.uniform(-0.6, 0.6) if not waves or rng.random() < 0.3 else 0.0,
            twist=rng.uniform(-0.8, 0.8) if not waves or rng.random() < 0.3 else 0.0,
            amplitude=amplitude,
            frequency=frequency,
            phase=rng.uniform(0, 2 * np.pi, waves),
        )

    def _attached(self, solid: Solid, surface: np.ndarray) -> np.ndarray:
        """Draw a shift that should join a solid to an earlier part."""
        if self.aligned and self.rng.random() < 0.6:
            return self._stacked(solid, self.parts[self.rng.integers(len(self.parts))].solid)
        return self._met(surface, depth=self.rng.uniform(0.02, 0.4))

    def _met(self, surface: np.ndarray, *, depth: float) -> np.ndarray:
        """Draw a shift that moves a surface point (of n, 3) to one of an earlier part, sunk in by ``depth``."""
        other = self.surfaces[self.rng.integers(len(self.surfaces))]
        return other[self.rng.integers(len(other))] - surface[self.rng.integers(len(surface))] * (1 - depth)

    def _stacked(self, solid: Solid, target: Solid) -> np.ndarray:
        """Return a shift that stacks bounding boxes along an axis; along the others centered, flush or random."""
        rng = self.rng
        axis = int(rng.choice(3, p=[0.25, 0.5, 0.25]))
        low, high = solid.vertices.min(0), solid.vertices.max(0)
        base, roof = target.vertices.min(0), target.vertices.max(0)
        shift = np.empty(3)
        for i in range(3):
            if i == axis:
                # Overlap, so that faces neither leave a gap nor coincide.
                overlap = rng.uniform(0.02, 0.25) * min(high[i] - low[i], roof[i] - base[i])
                shift[i] = roof[i] - low[i] - overlap if rng.random() < 0.5 else base[i] - high[i] + overlap
            else:
                center, room = (base[i] + roof[i] - low[i] - high[i]) / 2, (roof[i] - base[i] - high[i] + low[i]) / 2
                inset = rng.uniform(0.9, 0.99)
                shift[i] = center + room * rng.choice([0.0, inset, -inset, rng.uniform(-1, 1)], p=[0.4, 0.2, 0.2, 0.2])
        return shift

    def _under(self, leg: Solid) -> np.ndarray:
        """Return a shift that puts an upright leg below a part, near a corner, so that mirror images complete a set."""
        rng = self.rng
        target = self.parts[rng.integers(len(self.parts))].solid
        base, roof = target.vertices.min(0), target.vertices.max(0)
        low, high = leg.vertices.min(0), leg.vertices.max(0)
        spot = (base + roof) / 2 + rng.uniform(0.5, 0.9, 3) * rng.choice([-1, 1], 3) * (roof - base) / 2
        shift = spot - (low + high) / 2
        shift[1] = base[1] - high[1] + 0.5 * (roof[1] - base[1])
        return shift

    def _colors(self, count: int) -> np.ndarray:
        """Draw a color for each primitive from a palette of one to four."""
        rng = self.rng
        size = 1 if self.level == 1 else int(rng.integers(1, 5))
        palette = np.array([self._color() for _ in range(size)])
        return palette[rng.integers(size, size=count)]

    def _color(self) -> np.ndarray:
        rng = self.rng
        return np.array(colorsys.hsv_to_rgb(rng.random(), rng.uniform(0.05, 0.9), rng.uniform(0.25, 1.0)))

    def _bands(self) -> Bands | None:
        rng = self.rng
        if self.level < 5 or rng.random() > 0.4:
            return None
        direction = np.eye(3)[rng.integers(3)] if rng.random() < 0.6 else rng.normal(size=3)
        direction = direction / np.linalg.norm(direction) * np.exp(rng.uniform(np.log(0.4), np.log(4.0)))
        step = (np.arange(_TEXELS) + 0.5) / _TEXELS
        if rng.random() < 0.25:
            profile = 0.5 - 0.5 * np.cos(2 * np.pi * step)  # a smooth change
        else:
            profile = (step < rng.uniform(0.15, 0.6)).astype(float)
        return Bands(direction, rng.random(), profile, self._color())

    def _log_uniform(self, limits: tuple[float, float], size: int | None = None) -> np.ndarray | float:
        return np.exp(self.rng.uniform(np.log(limits[0]), np.log(limits[1]), size))


def _middle(points: np.ndarray) -> np.ndarray:
    """Return the middle of the bounding box, (3,)."""
    return (points.min(0) + points.max(0)) / 2


def _areas_and_normals(corners: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the areas (t,) and normals (t, 3), not of unit length, of triangles (t, 3, 3)."""
    a, b = (corners[:, 1:] - corners[:, :1]).transpose(1, 2, 0)  # (3, t)
    # numpy.cross takes three times as long.
    normals = np.stack([a[1] * b[2] - a[2] * b[1], a[2] * b[0] - a[0] * b[2], a[0] * b[1] - a[1] * b[0]], 1)
    return np.sqrt((normals * normals).sum(1)) / 2, normals


def _in_triangles(corners: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draw a uniform point in each triangle (n, 3, 3)."""
    u, v = rng.random((2, len(corners)))
    fold = u + v > 1
    u, v = np.where(fold, 1 - u, u)[:, None], np.where(fold, 1 - v, v)[:, None]
    return corners[:, 0] + u * (corners[:, 1] - corners[:, 0]) + v * (corners[:, 2] - corners[:, 0])


def _surface_points(solid: Solid, rng: np.random.Generator, count: int) -> np.ndarray:
    """Draw points (count, 3) uniformly by area."""
    corners = solid.vertices[solid.triangles]
    areas, _ = _areas_and_normals(corners)
    return _in_triangles(corners[_by_area(np.cumsum(areas), rng, count)], rng)


def _by_area(cumulative: np.ndarray, rng: np.random.Generator, count: int) -> np.ndarray:
    """Draw triangles (count,) by their area, given its cumulative sum (t,)."""
    draws = rng.random(count) * cumulative[-1]
    return np.searchsorted(cumulative, draws, side="right").clip(max=len(cumulative) - 1)


def sample_visible(shape: GeneratedShape, count: int, rng: np.random.Generator) -> SurfaceSamples:
    """Draw points uniformly by area from the surface of the union; points inside another part are rejected."""
    corners = np.concatenate([part.solid.vertices[part.solid.triangles] for part in shape.parts])  # (t, 3, 3)
    owner = np.repeat(np.arange(len(shape.parts)), [len(part.solid.triangles) for part in shape.parts])
    areas, normals = _areas_and_normals(corners)
    cumulative = np.cumsum(areas)
    found: list[tuple[np.ndarray, np.ndarray]] = []
    missing = count
    for _ in range(_MAX_ROUNDS):
        chosen = _by_area(cumulative, rng, int(1.7 * missing) + 64)
        points = _in_triangles(corners[chosen], rng)
        seen = ~_hidden(points, owner[chosen], shape.parts)
        found.append((points[seen], chosen[seen]))
        missing = count - sum(len(rows) for rows, _ in found)
        if missing <= 0:
            break
    points = np.concatenate([rows for rows, _ in found])[:count]
    chosen = np.concatenate([rows for _, rows in found])[:count]
    if len(points) < count:
        raise RuntimeError(f"only {len(points)} of {count} points were found on the outside of a shape")
    parts = owner[chosen]
    return SurfaceSamples(
        points,
        normals[chosen] / np.maximum(2 * areas[chosen], 1e-12)[:, None],
        np.array([part.kind for part in shape.parts], np.uint8)[parts],
        np.array([part.number for part in shape.parts], np.uint8)[parts],
    )


def _hidden(points: np.ndarray, owner: np.ndarray, parts: list[Part]) -> np.ndarray:
    """Return which points (n,) lie inside another part than the one they are on."""
    hidden = np.zeros(len(points), bool)
    for i, part in enumerate(parts):
        ask = np.flatnonzero((owner != i) & ~hidden)
        hidden[ask] = part.solid.contains(points[ask])
    return hidden
