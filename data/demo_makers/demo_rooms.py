"""Rooms furnished with the models of the demo set and labeled like S3DIS, for the demo set of semantic segmentation.

A room is a box of floor, ceiling and walls, with openings for doors and windows, sometimes columns and beams, and
furniture on the floor, on tables and on the walls that does not intersect. Six areas have three rooms each; each area
uses different models, so that the furniture of another area is new. Lengths are in meters, z is up.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import h5py
import numpy as np

from datasets.s3dis import CLASS_NAMES
from datasets.s3dis_prepare import Room

# Points per square meter: of the room itself, and of the things in it.
ROOM_DENSITY, THING_DENSITY = 125.0, 270.0
# Other steps would be rounded in float16: multiples of this are exact within a room, and far below the point spacing.
GRID = 1 / 128
GAP = 0.02  # between neighboring things
WALL_DEPTH = 0.08  # doors and windows are pressed into the wall to this depth
# Kinds of the rooms of every area.
AREA_ROOMS: tuple[tuple[str, str, str], ...] = (
    ("office", "lounge", "conferenceRoom"),
    ("office", "lounge", "pantry"),
    ("office", "lounge", "storage"),
    ("office", "lounge", "hallway"),
    ("office", "lounge", "conferenceRoom"),
    ("office", "lounge", "pantry"),
)


@dataclass(frozen=True)
class Thing:
    """A model of the demo set.

    Attributes:
        key: its name.
        points: (N, 3) float64 in meters: x to the right, y to the back, z up; the center of the footprint is the
            origin, the underside is at 0.
        rgb: (N, 3) uint8.
        size: width (x), depth (y), height (z) of its box.
        area: of its surface in square meters, estimated.
    """

    key: str
    points: np.ndarray
    rgb: np.ndarray
    size: np.ndarray
    area: float


def read_things(pack: Path, wanted: Callable[[str, str, np.ndarray], bool] | None = None) -> dict[str, Thing]:
    """Read the models of ``shapenet_render.h5``, by name, sorted.

    Args:
        pack: the file.
        wanted: predicate of name, class and catalog size (width, height, depth); None means all.
    """
    from sklearn.neighbors import KDTree

    with h5py.File(pack, "r") as file:
        ids, classes, sizes = file["ids"].asstr()[:], file["catalogue/class"].asstr()[:], file["size_m"][:]
        stored, palette = file["points"], file["palette"][:]
        scale, offset = float(stored.attrs["scale"]), float(stored.attrs["offset"])
        things = {}
        for i in np.argsort(ids):
            key = ids[i].split("/")[-1]
            if wanted is not None and not wanted(key, classes[i], sizes[i]):
                continue
            meters = (stored[i] * scale + offset) * file["radius_m"][i] + file["centre_m"][i]
            points = meters[:, [0, 2, 1]] * [1, -1, 1]  # y up, front at +z -> z up, front at -y
            distance = KDTree(points).query(points, k=2)[0][:, 1].mean()
            # The mean distance to the nearest neighbor of random points with density p is 0.5 / sqrt(p).
            area = len(points) * (2 * distance) ** 2
            things[key] = Thing(key, points, palette[file["point_colour"][i]], sizes[i][[0, 2, 1]].astype(float), area)
    return things


# Models that are chosen by name.
SMALL_THINGS = {
    "desk": "blendswap-cc-by-laptop katorlegaz-apple_ibook_2001 katorlegaz-apple_imac_1998 scopia-apple_pc "
    "scopia-phone scopia-desk_lamp1 scopia-desk_lamp2 blendswap-cc-0-desklamp scopia-inkjet_and_scanner_printer "
    "katorlegaz-coffee_mug blendswap-cc-0-littleplant blendswap-cc-0-tablefan scopia-bandeja "
    "blendswap-cc-0-led_tv blendswap-cc-by-microwave scopia-tv",
    "meal": "scopia-bowlwithfruits scopia-teapot katorlegaz-red_wine_bottle_01 scopia-wine_bottle "
    "blendswap-cc-by-tulip blendswap-cc-by-tulips scopia-bowl scopia-apples katorlegaz-bowl scopia-jar "
    "blendswap-cc-0-orchids scopia-calla_lily_with_roses katorlegaz-coffee_maker scopia-tray "
    "blendswap-cc-by-white_lily",
    "floor": "blendswap-cc-0-decorativeplant blendswap-cc-0-plant blendswap-cc-by-mediumindoorplant scopia-ficus "
    "blendswap-cc-by-spatifilum blendswap-cc-by-yuccaplant blendswap-cc-0-dustbin katorlegaz-bullet_trash_can "
    "scopia-living_lamp scopia-water_cooler katorlegaz-filing_cabinet blendswap-cc-0-speaker2 scopia-maceta "
    "blendswap-cc-by-backpack scopia-clothes_basket",
    "storage": "scopia-cardboard_box scopia-open_cardboard_box blendswap-cc-0-crate blendswap-cc-by-suitcase "
    "scopia-step_ladder_metal scopia-step_ladder_wood blendswap-cc-by-sef_kasa blendswap-cc-0-barrel "
    "katorlegaz-trunk_large scopia-clothes_horse",
    "kitchen": "blendswap-cc-0-largefridge blendswap-cc-0-refrigerator katorlegaz-fridge "
    "scopia-clothes_washing_machine blendswap-cc-by-washing_machine blendswap-cc-0-sinkcabinet "
    "blendswap-cc-by-kitchensink blendswap-cc-by-kitchenlowercabinet "
    "blendswap-cc-0-lowercabinet blendswap-cc-by-largestove",
    "wall": "scopia-wall_flat_tv scopia-internal_unity_air_conditioning blendswap-cc-0-cuckooclock",
    "shelf": "blendswap-cc-0-bookcase blendswap-cc-by-bookcase katorlegaz-full_bookcase katorlegaz-utility_shelving "
    "blendswap-cc-0-verticalshelves scopia-kids_shelves scopia-dining_room",
    "desk_table": "blendswap-cc-0-lbdesk blendswap-cc-by-biurko3 blendswap-cc-by-officetable "
    "blendswap-cc-by-simpledesk scopia-kids_desk_table scopia-kids_wooden_desk scopia-wooden_office_alder_table "
    "scopia-wooden_table_office scopia-wooden_office_pear_table_rect scopia-table_with_leaning_feet "
    "katorlegaz-folding_table",
    "stand_board": "blendswap-cc-0-whiteboard",
}


def _one_of(keys: str) -> Callable[[str, str, np.ndarray], bool]:
    listed = frozenset(keys.split())
    return lambda key, kind, s: key in listed


# The models of every kind: their label, and a test on name, class and size (width, depth, height).
KINDS: dict[str, tuple[str, Callable[[str, str, np.ndarray], bool]]] = {
    "table": ("table", lambda key, kind, s: kind == "table" and 0.68 < s[2] < 0.8 and s[0] > 0.7),
    "coffee": ("table", lambda key, kind, s: kind == "table" and 0.38 < s[2] < 0.6 and 0.85 < s[0] < 1.5),
    "chair": ("chair", lambda key, kind, s: kind == "chair" and s[2] > 0.72 and s[0] < 0.7),
    "sofa": ("sofa", lambda key, kind, s: kind == "sofa" and s[0] < 2.35 and s[1] < 1.1),
    "door": ("door", lambda key, kind, s: kind == "door" and s[0] < 1.4 and s[2] < 2.2),
    "window": ("window", lambda key, kind, s: kind == "window" and s[0] < 2.0),
}
LABELS = {"shelf": "bookcase", "desk_table": "table", "stand_board": "board"}
KINDS |= {name: (LABELS.get(name, "clutter"), _one_of(keys)) for name, keys in SMALL_THINGS.items()}


def is_used(key: str, kind: str, size: np.ndarray) -> bool:
    """Return whether a model, by name, class and catalog size (width, height, depth), belongs to a kind."""
    return any(test(key, kind, size[[0, 2, 1]]) for _, test in KINDS.values())


def share_out(things: dict[str, Thing], classes: dict[str, str], *, seed: int) -> list[dict[str, list[Thing]]]:
    """Divide the models of each kind among the areas; areas share them if there are fewer than two per area."""
    areas: list[dict[str, list[Thing]]] = [{} for _ in AREA_ROOMS]
    for kind, (_, test) in KINDS.items():
        members = [things[key] for key in sorted(things) if test(key, classes[key], things[key].size)]
        rng = np.random.default_rng([seed, zlib.crc32(kind.encode())])
        order = [members[i] for i in rng.permutation(len(members))]
        count = max(2, len(order) // len(areas))
        for area, chosen in enumerate(areas):
            chosen[kind] = [order[(area * count + i) % len(order)] for i in range(min(count, len(order)))]
    return areas


@dataclass(frozen=True, eq=False)
class Box:
    """A box along the axes: (3,) lower and upper corner."""

    low: np.ndarray
    high: np.ndarray

    def meets(self, other: Box, gap: float = 0.0) -> bool:
        """Return whether the two boxes overlap, or are closer than ``gap``."""
        return bool((self.low < other.high + gap - 1e-9).all() and (other.low < self.high + gap - 1e-9).all())


@dataclass
class Layout:
    """A room under construction.

    Attributes:
        size: (3,) width (x), depth (y), height (z).
        rng: random generator of everything.
        models: models of each kind.
        taken: boxes that are occupied.
        openings: (wall, low, high): rectangles cut out of the walls, as (along the wall, z).
        points: clouds, colors and labels so far.
    """

    size: np.ndarray
    rng: np.random.Generator
    models: dict[str, list[Thing]]
    taken: list[Box] = field(default_factory=list)
    openings: list[tuple[int, np.ndarray, np.ndarray]] = field(default_factory=list)
    points: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = field(default_factory=list)
    stands: list[tuple[str, Box]] = field(default_factory=list)

    # --- walls 0..3 lie at y = depth, x = width, y = 0, x = 0; a thing with yaw 0 has its back to wall 0

    def wall_length(self, wall: int) -> float:
        """Return the length of a wall."""
        return float(self.size[wall % 2])

    def wall_box(self, wall: int, middle: float, width: float, depth: float, z: tuple[float, float]) -> Box:
        """Return a box against a wall; ``middle`` is measured along the wall."""
        low, high = np.array([0.0, 0.0, z[0]]), np.array([0.0, 0.0, z[1]])
        along, away = (0, 1) if wall % 2 == 0 else (1, 0)
        low[along], high[along] = middle - width / 2, middle + width / 2
        far = wall in (0, 1)
        low[away], high[away] = (self.size[away] - depth, self.size[away]) if far else (0.0, depth)
        return Box(low, high)

    def is_free(self, box: Box, *, ignore: Sequence[Box] = (), gap: float = GAP) -> bool:
        """Return whether a box is inside the room and overlaps nothing that was placed."""
        inside = (box.low > -1e-6).all() and (box.high < self.size + 1e-6).all()
        return bool(inside) and not any(box.meets(other, gap) for other in self.taken if other not in ignore)

    def wall_spot(self, width: float, depth: float, z: tuple[float, float]) -> tuple[int, float, Box] | None:
        """Find a free place against a wall; return the wall, the middle along it and the box."""
        for _ in range(60):
            wall = int(self.rng.choice(4))
            spare = self.wall_length(wall) - width - 2 * GAP
            if spare < 0:
                continue
            middle = GAP + width / 2 + self.rng.uniform(0, spare)
            box = self.wall_box(wall, middle, width, depth, z)
            if self.is_free(box):
                return wall, middle, box
        return None

    # --- things

    def add(self, points: np.ndarray, rgb: np.ndarray, label: str) -> None:
        """Add labeled points."""
        number = CLASS_NAMES.index(label)
        rgb = np.broadcast_to(rgb, points.shape)
        self.points.append((points, np.asarray(rgb, float), np.full(len(points), number, np.uint8)))

    def occupy(self, kind: str, box: Box) -> None:
        """Note what stands where."""
        self.taken.append(box)
        self.stands.append((kind, box))

    def surface(self, thing: Thing, density: float = THING_DENSITY) -> tuple[np.ndarray, np.ndarray]:
        """Draw points and colors of a thing; interpolate if it has too few points for the density."""
        from sklearn.neighbors import KDTree

        count = max(24, round(density * thing.area))
        order = self.rng.permutation(len(thing.points))
        points, rgb = thing.points[order[:count]], thing.rgb[order[:count]]
        more = count - len(points)
        if more > 0:
            start = self.rng.integers(len(thing.points), size=more)
            near = KDTree(thing.points).query(thing.points[start], k=4)[1]
            end = near[np.arange(more), self.rng.integers(1, 4, size=more)]
            t = self.rng.uniform(0.2, 0.8, (more, 1))
            points = np.concatenate([points, thing.points[start] * (1 - t) + thing.points[end] * t])
            rgb = np.concatenate([rgb, thing.rgb[start]])
        return points, rgb

    def stand(self, thing: Thing, kind: str, x: float, y: float, yaw: float, z: float = 0.0) -> Box:
        """Place a thing centered at (x, y), rotated by ``yaw`` degrees counterclockwise seen from above."""
        points, rgb = self.surface(thing)
        self.add(points @ turn(yaw).T + [x, y, z], rgb, KINDS[kind][0])
        box = footprint(thing.size, x, y, yaw, z)
        self.occupy(kind, box)
        return box

    def against_wall(self, kind: str, *, z: float = 0.0, gap: float = GAP) -> Box | None:
        """Place a thing with its back to a wall, where there is space; return its box."""
        thing = self.pick(kind)
        depth = thing.size[1] + gap
        found = self.wall_spot(thing.size[0], depth, (z, z + thing.size[2]))
        if found is None:
            return None
        wall, middle, box = found
        center = (box.low + box.high) / 2
        # Shift by half the gap away from the wall, so that the gap is behind it.
        inward = turn(-90 * wall)[:2, :2] @ np.array([0, -1]) * gap / 2
        self.stand(thing, kind, center[0] + inward[0], center[1] + inward[1], -90 * wall, z)
        self.taken[-1] = box
        return box

    def pick(self, kind: str) -> Thing:
        """Draw one of the area's models of a kind."""
        return self.models[kind][int(self.rng.integers(len(self.models[kind])))]

    def in_the_open(self, kind: str, *, margin: float, tries: int = 60) -> Box | None:
        """Place a thing anywhere on the floor; keep ``margin`` free around it."""
        thing = self.pick(kind)
        for _ in range(tries):
            yaw = float(self.rng.choice([0, 90, 180, 270]))
            half = footprint(thing.size, 0, 0, yaw, 0).high[:2] + margin
            if (2 * half > self.size[:2]).any():
                continue
            x, y = (self.rng.uniform(h, s - h) for h, s in zip(half, self.size[:2], strict=True))
            box = footprint(thing.size, x, y, yaw, 0.0)
            if self.is_free(Box(box.low - [margin, margin, 0], box.high + [margin, margin, 0])):
                return self.stand(thing, kind, x, y, yaw)
        return None

    def chairs_at(self, table: Box, *, sides: Sequence[int], most: int) -> int:
        """Place chairs at the sides of a table, facing it and slightly under it; return their number."""
        chair, count = self.pick("chair"), 0
        for side in sides:
            along = (0, 1) if side % 2 == 0 else (1, 0)
            length = table.high[along[0]] - table.low[along[0]]
            number = max(1, int((length - 0.1) / max(0.6, chair.size[0] + 0.08)))
            for i in range(number):
                if count >= most:
                    return count
                spot = (table.low + table.high) / 2
                spot[along[0]] = table.low[along[0]] + length * (i + 0.5) / number + self.rng.uniform(-0.04, 0.04)
                tucked = self.rng.uniform(-0.12, min(0.12, 0.25 * chair.size[1]))
                # Side 0 is toward wall 0; a person who sits there has their back to wall 0.
                far = chair.size[1] / 2 - tucked
                spot[along[1]] = table.high[along[1]] + far if side in (0, 1) else table.low[along[1]] - far
                yaw = -90.0 * side + self.rng.uniform(-12, 12)
                box = footprint(chair.size, spot[0], spot[1], yaw, 0.0)
                if self.is_free(box, ignore=[table]):
                    self.stand(chair, "chair", spot[0], spot[1], yaw)
                    count += 1
        return count

    def on_top(self, kind: str, table: Box, count: int, yaw: float) -> None:
        """Place small things on a table."""
        for _ in range(count):
            thing = self.pick(kind)
            for _ in range(20):
                angle = yaw + self.rng.uniform(-20, 20)
                half = footprint(thing.size, 0, 0, angle, 0).high[:2] + 0.04
                low, high = table.low[:2] + half, table.high[:2] - half
                if (low > high).any():
                    break
                x, y = self.rng.uniform(low, high)
                box = footprint(thing.size, x, y, angle, table.high[2])
                if self.is_free(box, ignore=[table], gap=0.01):
                    self.stand(thing, kind, x, y, angle, float(table.high[2]))
                    break

    # --- parts of the room

    def opening(self, kind: str, *, sill: float = 0.0) -> bool:
        """Cut a door or a window into a wall; keep the floor in front of a door free."""
        thing = self.pick(kind)
        width, high = thing.size[0], thing.size[2]
        if sill + high > self.size[2] - 0.05:
            return False
        found = self.wall_spot(width, WALL_DEPTH, (sill, sill + high))
        if found is None:
            return False
        wall, middle, box = found
        points, rgb = self.surface(thing, ROOM_DENSITY)
        points = points * [1, WALL_DEPTH / max(np.ptp(thing.points[:, 1]), 1e-3), 1]
        points[:, 1] -= points[:, 1].min()
        points[:, 1] -= WALL_DEPTH / 2
        center = (box.low + box.high) / 2
        self.add(points @ turn(-90 * wall).T + [center[0], center[1], sill], rgb, kind)
        self.occupy(kind, box)
        if kind == "door":
            self.taken.append(self.wall_box(wall, middle, width, 0.85, (0.0, 2.0)))
        self.openings.append((wall, np.array([middle - width / 2, sill]), np.array([middle + width / 2, sill + high])))
        return True

    def board(self) -> None:
        """Hang a white, green or black board with a frame on a wall."""
        width, high, z = self.rng.uniform(1.0, 1.9), self.rng.uniform(0.8, 1.15), self.rng.uniform(0.85, 1.0)
        found = self.wall_spot(width, 0.04, (z, z + high))
        if found is None:
            return
        color = [(240, 242, 244), (236, 238, 232), (38, 78, 58), (44, 46, 48)][int(self.rng.integers(4))]
        points = box_surface(found[2], THING_DENSITY, self.rng)
        rgb = np.tile(np.array(color, float), (len(points), 1))
        along = 0 if found[0] % 2 == 0 else 1
        edge = np.minimum(points - found[2].low, found[2].high - points)[:, [along, 2]].min(1)
        rgb[edge < 0.035] = (150, 150, 152) if self.rng.random() < 0.6 else (140, 104, 70)
        self.add(points, rgb, "board")
        self.occupy("board", found[2])

    def column(self, color: np.ndarray) -> None:
        """Place a square or round column at a wall or in a corner, from floor to ceiling."""
        side = self.rng.uniform(0.25, 0.42)
        found = self.wall_spot(side, side + self.rng.choice([0.0, 0.15]), (0.0, self.size[2]))
        if found is None:
            return
        box = found[2]
        points = box_surface(box, ROOM_DENSITY * 1.5, self.rng)
        if self.rng.random() < 0.5:
            middle = (box.low + box.high)[:2] / 2
            angle = self.rng.uniform(0, 2 * np.pi, len(points))
            points[:, :2] = middle + side / 2 * np.stack([np.cos(angle), np.sin(angle)], 1)
        points = points[(points[:, 2] > 1e-6) & (points[:, 2] < self.size[2] - 1e-6)]
        self.add(points, color, "column")
        self.occupy("column", box)

    def beam(self, color: np.ndarray) -> None:
        """Run a beam under the ceiling from wall to wall."""
        axis = int(self.rng.integers(2))
        width, high = self.rng.uniform(0.2, 0.35), self.rng.uniform(0.2, 0.32)
        middle = self.rng.uniform(0.25, 0.75) * self.size[axis]
        low, high_corner = np.zeros(3), self.size.copy()
        low[axis], high_corner[axis], low[2] = middle - width / 2, middle + width / 2, self.size[2] - high
        box = Box(low, high_corner)
        if any(box.meets(other) for other in self.taken):
            return
        points = box_surface(box, ROOM_DENSITY * 1.5, self.rng)
        across = 1 - axis
        points = points[(points[:, across] > 1e-6) & (points[:, across] < self.size[across] - 1e-6)]
        self.add(points[points[:, 2] < self.size[2] - 1e-6], color, "beam")
        self.occupy("beam", box)

    def enclose(self, floor: np.ndarray, wall: np.ndarray, ceiling: np.ndarray) -> None:
        """Add floor, ceiling and walls, without openings and the areas that columns and beams cover."""
        solid = [box for kind, box in self.stands if kind in ("column", "beam")]

        def visible(points: np.ndarray) -> np.ndarray:
            covered = [((points >= b.low - 1e-6) & (points <= b.high + 1e-6)).all(1) for b in solid]
            return points[~np.any(covered, axis=0)] if covered else points

        sx, sy, sz = self.size
        count = round(ROOM_DENSITY * sx * sy)
        for z, label, color in ((0.0, "floor", floor), (sz, "ceiling", ceiling)):
            flat = np.concatenate([self.rng.uniform(0, [sx, sy], (count, 2)), np.full((count, 1), z)], 1)
            flat = visible(flat)
            self.add(flat, self.pattern(flat[:, :2], color, label), label)
        for number in range(4):
            length = self.wall_length(number)
            flat = self.rng.uniform(0, [length, sz], (round(ROOM_DENSITY * length * sz), 2))
            for where, low, high in self.openings:
                if where == number:
                    flat = flat[((flat < low) | (flat > high)).any(1)]
            along, away = (0, 1) if number % 2 == 0 else (1, 0)
            points = np.zeros((len(flat), 3))
            points[:, along], points[:, 2] = flat.T
            points[:, away] = self.size[away] if number in (0, 1) else 0.0
            points = visible(points)
            self.add(points, self.pattern(points[:, [along, 2]], wall, "wall"), "wall")

    def pattern(self, flat: np.ndarray, color: np.ndarray, label: str) -> np.ndarray:
        """Color a plane: planks on the floor, panels on the ceiling, plain walls."""
        step = {"floor": np.array([0.15, 1.2]), "ceiling": np.array([0.6, 0.6]), "wall": np.ones(2)}[label]
        cell = np.floor(flat / step).astype(int)
        shade = (cell[:, 0] * 7 + cell[:, 1] * 13) % 5 - 2
        strength = {"floor": 0.04, "ceiling": 0.01, "wall": 0.0}[label]
        return color * (1 + strength * shade)[:, None]


def turn(yaw: float) -> np.ndarray:
    """Return the rotation (3, 3) about z by degrees, counterclockwise seen from above."""
    c, s = np.cos(np.radians(yaw)), np.sin(np.radians(yaw))
    return np.array([[c, -s, 0.0], [s, c, 0.0], [0.0, 0.0, 1.0]])


def footprint(size: np.ndarray, x: float, y: float, yaw: float, z: float) -> Box:
    """Return the axis-aligned box around a rotated thing."""
    half = np.abs(turn(yaw))[:2, :2] @ size[:2] / 2
    half[half < 1e-6] = 0
    return Box(np.array([x - half[0], y - half[1], z]), np.array([x + half[0], y + half[1], z + size[2]]))


def box_surface(box: Box, density: float, rng: np.random.Generator) -> np.ndarray:
    """Draw points uniformly from the surface of a box, (n, 3)."""
    size = box.high - box.low
    faces = []
    for axis in range(3):
        i, j = (a for a in range(3) if a != axis)
        count = max(8, round(density * size[i] * size[j]))
        for end in (0.0, 1.0):
            unit = rng.uniform(size=(count, 3))
            unit[:, axis] = end
            faces.append(box.low + unit * size)
    return np.concatenate(faces)


# ---------------------------------------------------------------------------------------------------- kinds of room


def furnish_office(room: Layout) -> None:
    """Desks at the walls with a chair and things on them, shelves, a board, something on the floor."""
    room.board()
    for _ in range(int(room.rng.integers(1, 3))):
        box = room.against_wall("desk_table", gap=0.04)
        if box is not None:
            wall = nearest_wall(room, box)
            # The back of a desk is at the wall: the chair is on the opposite side.
            room.chairs_at(box, sides=[(wall + 2) % 4], most=1)
            room.on_top("desk", box, int(room.rng.integers(2, 5)), -90 * wall)
    for _ in range(int(room.rng.integers(1, 3))):
        room.against_wall("shelf")
    for _ in range(2):
        room.against_wall("floor")
    if room.rng.random() < 0.5:
        table = room.in_the_open("table", margin=0.3)
        if table is not None:
            room.chairs_at(table, sides=room.rng.permutation(4)[:2], most=3)


def furnish_lounge(room: Layout) -> None:
    """Sofas at the walls, a coffee table before the first, shelves, plants, something on the wall."""
    for number in range(2):
        sofa = room.against_wall("sofa", gap=0.05)
        if sofa is None or number:
            continue
        wall, thing = nearest_wall(room, sofa), room.pick("coffee")
        away = turn(-90 * wall)[:2, :2] @ np.array([0, -1])
        middle = (sofa.low + sofa.high)[:2] / 2
        half = abs(away @ (sofa.high - sofa.low)[:2]) / 2
        x, y = middle + away * (half + thing.size[1] / 2 + room.rng.uniform(0.22, 0.4))
        box = footprint(thing.size, x, y, -90 * wall, 0.0)
        if room.is_free(box):
            box = room.stand(thing, "coffee", x, y, -90 * wall)
            room.on_top("meal", box, int(room.rng.integers(1, 3)), -90 * wall)
    room.against_wall("shelf")
    room.against_wall("wall", z=room.rng.uniform(1.1, 1.5))
    for _ in range(2):
        room.against_wall("floor")
    if room.rng.random() < 0.5:
        room.board()
    room.against_wall("chair")


def furnish_conference(room: Layout) -> None:
    """Place a table in the middle with chairs around it, and boards."""
    room.board()
    table = room.in_the_open("table", margin=0.62, tries=300) or room.in_the_open("table", margin=0.4, tries=300)
    if table is not None:
        room.chairs_at(table, sides=room.rng.permutation(4), most=8)
        room.on_top("desk", table, 2, float(room.rng.choice([0, 90, 180, 270])))
    room.against_wall("stand_board")
    room.against_wall("wall", z=room.rng.uniform(1.1, 1.4))
    for _ in range(2):
        room.against_wall("floor")


def furnish_pantry(room: Layout) -> None:
    """Kitchen things along the walls, one or two small tables with chairs."""
    for _ in range(4):
        room.against_wall("kitchen")
    for _ in range(2):
        table = room.in_the_open("table", margin=0.35, tries=150)
        if table is not None:
            room.chairs_at(table, sides=room.rng.permutation(4), most=4)
            room.on_top("meal", table, int(room.rng.integers(2, 4)), 0.0)
    room.against_wall("floor")
    room.against_wall("shelf")
    room.board()


def furnish_storage(room: Layout) -> None:
    """Shelves along the walls, boxes and the like, a table."""
    for _ in range(4):
        room.against_wall("shelf")
    table = room.against_wall("desk_table", gap=0.04)
    if table is not None:
        room.on_top("desk", table, 2, -90 * nearest_wall(room, table))
    for _ in range(4):
        room.against_wall("storage")
    room.against_wall("chair")
    room.in_the_open("storage", margin=0.1)


def furnish_hallway(room: Layout) -> None:
    """Place a second and third door, shelves, chairs and plants along the walls."""
    for _ in range(2):
        room.opening("door")
    room.board()
    room.against_wall("shelf")
    for _ in range(2):
        room.against_wall("chair")
    for _ in range(3):
        room.against_wall("floor")


FURNISH = {
    "office": furnish_office,
    "lounge": furnish_lounge,
    "conferenceRoom": furnish_conference,
    "pantry": furnish_pantry,
    "storage": furnish_storage,
    "hallway": furnish_hallway,
}


def nearest_wall(room: Layout, box: Box) -> int:
    """Return the wall that a box is against."""
    gaps = [room.size[1] - box.high[1], room.size[0] - box.high[0], box.low[1], box.low[0]]
    return int(np.argmin(gaps))


def plan_room(area: int, number: int, models: dict[str, list[Thing]], *, seed: int) -> Layout:
    """Build one room with everything in it; a pure function of its arguments.

    Args:
        area: from 1.
        number: the room's position in its area, from 0.
        models: the area's models of each kind.
        seed: of the set.
    """
    kind = AREA_ROOMS[area - 1][number]
    rng = np.random.default_rng([seed, area, number])
    # Avoid a thin last row of blocks: 0.45 m or more.
    whole = {"hallway": (1, 5)}.get(kind, (3, 4))
    sides = np.array([part + rng.uniform(0.45, 0.98) for part in whole])
    room = Layout(np.array([*rng.permutation(sides), rng.uniform(2.5, 2.9)]), rng, models)
    # Colors differ between rooms, not areas: a test area with unseen colors would be a different task.
    colors = np.random.default_rng([seed, area, number, 1])
    floors = [(150, 111, 76), (176, 160, 138), (96, 98, 104), (122, 74, 48), (196, 192, 184), (108, 122, 112)]
    walls = [(226, 222, 210), (214, 224, 228), (238, 226, 196), (222, 208, 200), (208, 218, 202), (236, 236, 234)]
    bright = rng.uniform(0.86, 1.04)
    floor = np.array(floors[colors.integers(6)]) * bright
    wall = np.array(walls[colors.integers(6)]) * bright
    ceiling = np.full(3, rng.uniform(225, 248)) * bright
    frame = (
        wall if rng.random() < 0.5 else np.array([(168, 164, 158), (128, 92, 60), (190, 120, 96)][area % 3])
    ) * 0.95
    room.opening("door")
    for _ in range(int(rng.integers(1, 3))):
        tall = room.rng.random() < 0.3
        room.opening("window", sill=0.02 if tall else float(rng.uniform(0.75, 0.95))) or room.opening(
            "window", sill=0.02
        )
    # Every area has columns in two rooms of three, and beams in two.
    if number != area % 3:
        for _ in range(1 + int(rng.random() < 0.3)):
            room.column(frame)
    if number != (area + 1) % 3:
        for _ in range(int(rng.integers(1, 3))):
            room.beam(frame)
    FURNISH[kind](room)
    room.enclose(floor, wall, ceiling)
    return room


def build_room(area: int, number: int, models: dict[str, list[Thing]], *, seed: int) -> Room:
    """Plan a room and return its points in random order, as the block cutter expects them."""
    layout = plan_room(area, number, models, seed=seed)
    xyz, rgb, labels = (np.concatenate(parts) for parts in zip(*layout.points, strict=True))
    order = layout.rng.permutation(len(xyz))
    xyz = np.rint(xyz.clip(0, layout.size) / GRID)[order] * GRID
    kind = AREA_ROOMS[area - 1][number]
    name = f"Area_{area}_{kind}_1"
    return Room(name, xyz, np.rint(rgb).clip(0, 255).astype(np.float32)[order], labels[order])


def build_rooms(pack: Path, *, seed: int) -> list[Room]:
    """Build the rooms of all areas from the models of ``shapenet_render.h5``."""
    with h5py.File(pack, "r") as file:
        keys = [name.split("/")[-1] for name in file["ids"].asstr()[:]]
        classes = dict(zip(keys, file["catalogue/class"].asstr()[:], strict=True))
    areas = share_out(read_things(pack, is_used), classes, seed=seed)
    return [
        build_room(area, number, models, seed=seed)
        for area, models in enumerate(areas, start=1)
        for number in range(len(AREA_ROOMS[area - 1]))
    ]
