"""Make a pretraining pair from a mesh or cloud, and manage a folder of pairs so that interrupted runs can continue."""

from __future__ import annotations

import json
import re
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from plyfile import PlyData, PlyElement

from data.rendering import (
    Cloud,
    Mesh,
    Renderer,
    cameras_3d_r2n2,
    encode_png,
    read_shape,
    sample_exterior,
    sample_surface,
)
from data.rendering.cameras import DISTANCE, Camera, View, aim
from data.rendering.meshes import MESH_SUFFIXES
from data.rendering.shape import check_mesh
from data.shape_files import ShapeFile
from datasets.own_clouds import LABELED_FOLDER
from datasets.shape_reader import enclosing_sphere
from datasets.untrusted import read_ply
from utils.cli import Settings, flag, non_negative_int, positive_int, seed_number
from utils.cloud_files import CLOUD_SUFFIXES, read_cloud_file
from utils.errors import DataError, UserError
from utils.files import replacing, writing
from utils.progress import progress

SETTINGS_NAME = "prepared.json"
RECORDS_NAME = "prepared_files.jsonl"
CAMERAS_NAME = "cameras.json"
_OURS = re.compile(r"(\d{2,}\.png|cameras\.json)(\.tmp)?")
FORMAT, VERSION = "crossnet-prepared", 1

INVISIBLE = 0.01  # skip parts less opaque than this: modeling aids that are not meant to be seen
MAX_SPLATS = 20_000  # points of a cloud that are rendered; more only take longer
_Z_UP = np.array([[1, 0, 0], [0, 0, 1], [0, -1, 0]], float)  # (x, y, z) -> (x, z, -y)


@dataclass(frozen=True)
class PairSettings(Settings):
    """Everything that determines a pair, besides its file."""

    num_points: int = flag(2048, group="content", type=positive_int, metavar="N", help="points of each cloud")
    views: int = flag(12, type=non_negative_int, metavar="V", help="pictures per shape; 0: only clouds")
    image_size: int = flag(224, type=positive_int, metavar="PX", help="side of a picture in pixels")
    samples: int = 9
    up: str = flag("y", choices=("y", "z"), help="axis of the files that points up")
    remove_interior: bool = flag(False, help="draw no points on surfaces that are invisible from outside")
    seed: int = flag(1, type=seed_number, metavar="S", help="seed of points and views")


@dataclass(frozen=True)
class Pair:
    """A cloud with pictures and their cameras."""

    points: np.ndarray  # (N, 3) float32 in the unit sphere
    pictures: np.ndarray  # (V, S, S, 4) uint8
    cameras: list[dict[str, Any]]
    notes: list[str]


def make_pair(shape: Mesh | Cloud, name: str, settings: PairSettings, renderer: Renderer | None) -> Pair:
    """Sample points and render views of a shape; a pure function of its arguments (the name gives the seed).

    ``renderer`` may be None without views and without ``remove_interior``.

    Raises:
        DataError: no part of the surface is visible, or no points can be drawn.
    """
    # Seed by name, so that a pair does not depend on which other shapes exist.
    seed = zlib.crc32(f"{settings.seed}/{name}".encode())
    shape = shape.transformed(_Z_UP) if settings.up == "z" else shape
    if isinstance(shape, Mesh):
        shape = _visible_part(shape, name)
        if settings.remove_interior and renderer is not None:
            points = sample_exterior(shape, settings.num_points, seed, renderer).points
        else:
            points = sample_surface(shape, settings.num_points, seed).points
        notes = shape.notes
    else:
        points, notes = _choose_points(shape, settings.num_points, seed)
        shape = _thin_out(shape, seed)
    if np.ptp(points, axis=0).max() == 0:
        raise DataError(f"{name}: all its points are in one place")
    center, radius = enclosing_sphere(points)
    normalize = np.diag([1 / radius] * 3 + [1.0])
    normalize[:3, 3] = -center / radius
    placed = shape.transformed(normalize)
    cameras = cameras_3d_r2n2(settings.views, seed)
    spanned = placed.spanned()
    views = [aim(spanned, camera) for camera in cameras]
    pictures = np.zeros((0, 1, 1, 4), np.uint8) if renderer is None else renderer.views(placed, views)
    described = [_describe(camera, view) for camera, view in zip(cameras, views, strict=True)]
    return Pair(((points - center) / radius).astype(np.float32), pictures, described, notes)


def _visible_part(mesh: Mesh, name: str) -> Mesh:
    opaque = np.array([material.opacity > INVISIBLE for material in mesh.materials])[mesh.material]
    if opaque.all():
        return mesh
    if not opaque.any():
        raise DataError(f"{name}: all its parts are transparent")
    return check_mesh(mesh.select(opaque), name)


def _choose_points(cloud: Cloud, count: int, seed: int) -> tuple[np.ndarray, list[str]]:
    """Choose ``count`` points; if the cloud has fewer, repeat some."""
    rng = np.random.default_rng(seed)
    held = len(cloud.points)
    if held >= count:
        return cloud.points[rng.choice(held, count, replace=False)], cloud.notes
    order = np.concatenate([rng.permutation(held) for _ in range(-(-count // held))])[:count]
    return cloud.points[order], [*cloud.notes, f"it has {held} points, so some repeat"]


def _thin_out(cloud: Cloud, seed: int) -> Cloud:
    if len(cloud.points) <= MAX_SPLATS:
        return cloud
    chosen = np.random.default_rng([seed, 1]).choice(len(cloud.points), MAX_SPLATS, replace=False)
    return Cloud(cloud.points[chosen], None if cloud.colors is None else cloud.colors[chosen])


def _describe(camera: Camera, view: View) -> dict[str, Any]:
    """Return a camera for ``cameras.json``; its matrix maps the cloud's points to clip space."""
    return {
        "azimuth": camera.azimuth,
        "elevation": camera.elevation,
        "distance": DISTANCE * view.radius,
        "field_of_view": view.field_of_view,
        "matrix": view.matrix().tolist(),
    }


# --------------------------------------------------------------------------------------------------------- one folder


def read_source(path: Path) -> Mesh | Cloud:
    """Read a mesh, or a cloud with its colors, if any.

    Raises:
        DataError: the file cannot be used; the message says why.
    """
    suffix = path.suffix.lower()
    if suffix in MESH_SUFFIXES:
        return read_shape(path)
    if suffix not in CLOUD_SUFFIXES:
        raise DataError(
            f"{path} is neither a mesh ({', '.join(MESH_SUFFIXES)}) nor a cloud ({', '.join(CLOUD_SUFFIXES)})"
        )
    return Cloud(*read_cloud_file(path))


@dataclass(frozen=True)
class PairPaths:
    """Paths of a pair below a data root, and how to write them.

    ``ShapeNet/<category>/<id>.ply``, ``ShapeNetRendering/<category>/<id>/rendering/NN.png`` and ``cameras.json``.
    """

    root: Path

    def cloud(self, name: str) -> Path:
        """Return the path of a pair's cloud."""
        return self.root / "ShapeNet" / f"{name}.ply"

    def rendering(self, name: str) -> Path:
        """Return the folder of a pair's pictures."""
        return self.root / "ShapeNetRendering" / name / "rendering"

    def write(self, name: str, pair: Pair) -> None:
        """Write a pair, replacing an older one; ``cameras.json``, which marks the pictures as ours, comes first.

        Raises:
            UserError: it cannot be written.
        """
        self.remove(name)
        if len(pair.pictures):
            folder = self.rendering(name)
            folder.mkdir(parents=True, exist_ok=True)
            _replace(folder / CAMERAS_NAME, json.dumps(pair.cameras).encode() + b"\n")
            for file, picture in zip(view_names(len(pair.pictures)), pair.pictures, strict=True):
                _replace(folder / file, encode_png(picture))
        write_ply(self.cloud(name), pair.points)

    def remove(self, name: str) -> None:
        """Remove a pair, but keep pictures without ``cameras.json``, which come from another renderer."""
        self.cloud(name).unlink(missing_ok=True)
        folder = self.rendering(name)
        if not (folder / CAMERAS_NAME).exists():
            return
        for file in sorted(folder.iterdir(), key=lambda file: file.name == CAMERAS_NAME):
            if _OURS.fullmatch(file.name):
                file.unlink()


class PairFolder:
    """A data root of pairs, with their settings and a record of each file.

    The settings are in ``prepared.json``. ``prepared_files.jsonl`` records the pairs that were begun (so they belong to
    this script, complete or not) and those that are finished.

    Args:
        root: the data root.
        settings: of this run.
        overwrite: remake everything.

    Raises:
        UserError: the folder holds pairs that were made with other settings.
    """

    def __init__(self, root: Path, settings: PairSettings, *, overwrite: bool) -> None:
        self.root, self.settings, self.overwrite = root, settings, overwrite
        self.paths = PairPaths(root)
        try:
            if not overwrite:
                self._check_settings()
            self.records = self._read_records()
        except OSError as error:
            raise UserError(f"cannot read {root}: {error.strerror or error}") from error

    def _check_settings(self) -> None:
        path = self.root / SETTINGS_NAME
        if not path.exists():
            return
        again = f"--overwrite remakes all pairs of {self.root}"
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            found = content["settings"]
            if content["format"] != FORMAT or content["version"] != VERSION or not isinstance(found, dict):
                raise ValueError("written by another version")
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} cannot be used ({error}); {again}") from error
        wanted = asdict(self.settings)
        differing = [name for name in sorted({*wanted, *found}) if wanted.get(name) != found.get(name)]
        if differing:
            words = ", ".join(f"--{name} {found.get(name)}, now {wanted.get(name)}" for name in differing)
            raise UserError(
                f"the pairs in {self.root} were made with {words}; choose the same settings or another --out; {again}"
            )

    def _read_records(self) -> dict[str, dict[str, Any]]:
        records: dict[str, dict[str, Any]] = {}
        path = self.root / RECORDS_NAME
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
            try:
                record = json.loads(line)
                records[record["name"]] = record
            except (ValueError, KeyError, TypeError):  # the last line of a run that was killed
                continue
        return records

    def is_done(self, shape: ShapeFile) -> bool:
        """Return whether the pair of a file exists, is complete, and was made from the current file."""
        record = self.records.get(shape.name)
        if self.overwrite or record is None or record.get("source") != fingerprint(shape.path):
            return False
        files = [*view_names(self.settings.views), CAMERAS_NAME] if self.settings.views else []
        rendering = self.paths.rendering(shape.name)
        return self.paths.cloud(shape.name).is_file() and all((rendering / file).is_file() for file in files)

    def check_free(self, shape: ShapeFile) -> None:
        """Refuse to replace a cloud or pictures that this script did not make.

        Raises:
            UserError: such files exist.
        """
        if shape.name in self.records:
            return
        cloud, rendering = self.paths.cloud(shape.name), self.paths.rendering(shape.name)
        if cloud.exists() and not self.overwrite:
            raise UserError(
                f"{cloud} exists but its settings are not known; choose another --out, or --overwrite to replace it"
            )
        if self.settings.views and rendering.is_dir() and not (rendering / CAMERAS_NAME).exists():
            other = next((file for file in sorted(rendering.iterdir()) if file.suffix == ".png"), None)
            if other is not None:
                raise UserError(
                    f"{other} comes from another renderer; choose another --out, move {self.root}/ShapeNetRendering "
                    "away, or keep it and write only clouds with --views 0"
                )

    def begin(self) -> None:
        """Write the settings; with ``overwrite``, mark the pairs of earlier runs as unfinished.

        Raises:
            UserError: the folder cannot be written.
        """
        if self.overwrite:
            self.records = {name: record | {"source": None} for name, record in self.records.items()}
            lines = [json.dumps(record) + "\n" for record in self.records.values()]
            _replace(self.root / RECORDS_NAME, "".join(lines).encode())
        content = {"format": FORMAT, "version": VERSION, "settings": asdict(self.settings)}
        _replace(self.root / SETTINGS_NAME, json.dumps(content, indent=2).encode() + b"\n")

    def record(self, shape: ShapeFile, notes: list[str] | None = None) -> None:
        """Record that a pair is begun, or finished if ``notes`` is not None."""
        source = None if notes is None else fingerprint(shape.path)
        entry = {"name": shape.name, "file": str(shape.path), "source": source, "notes": notes or []}
        path = self.root / RECORDS_NAME
        with writing(path), open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
        self.records[shape.name] = entry


def fingerprint(path: Path) -> list[int]:
    """Return size and modification time of a file, to detect changes."""
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]


def view_names(count: int) -> list[str]:
    """Return the file names of views, ``00.png`` and so on."""
    return [f"{i:0{max(2, len(str(count - 1)))}d}.png" for i in range(count)]


def _replace(path: Path, data: bytes) -> None:
    """Write a file atomically."""
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def write_ply(path: Path, points: np.ndarray) -> None:
    """Write (N, 3) float32 as binary little-endian PLY, atomically.

    Raises:
        UserError: the file cannot be written.
    """
    vertex = np.empty(len(points), dtype=[("x", "<f4"), ("y", "<f4"), ("z", "<f4")])
    for axis, name in enumerate("xyz"):
        vertex[name] = points[:, axis]
    with replacing(path) as temporary:
        PlyData([PlyElement.describe(vertex, "vertex")], byte_order="<").write(temporary)


def write_labeled(folder: PairFolder, sides: dict[str, list[ShapeFile]]) -> dict[str, tuple[int, int]]:
    """Write the clouds of labeled shapes in the layout of ``modelnet40_ply_hdf5_2048``, for classification.

    Returns:
        Training and test size of every class.

    Raises:
        UserError: they cannot be written.
        DataError: the cloud of a pair cannot be read.
    """
    target = folder.root / LABELED_FOLDER
    with writing(target):
        target.mkdir(exist_ok=True)
    classes = sorted({shape.category for shapes in sides.values() for shape in shapes})
    for side, shapes in sides.items():
        reading = progress(shapes, text=f"labeled clouds, {side}", unit="shapes", leave=False)
        points = np.stack([read_ply(folder.paths.cloud(shape.name)) for shape in reading])
        path = target / f"ply_data_{side}0.h5"
        with replacing(path) as temporary, h5py.File(temporary, "w") as file:
            file.create_dataset("data", data=points, compression="gzip", shuffle=True)
            file["label"] = np.array([[classes.index(shape.category)] for shape in shapes], np.int64)
            ids = np.array([shape.name for shape in shapes], dtype=object)
            file.create_dataset("ids", data=ids, dtype=h5py.string_dtype("utf-8"))
        _replace(target / f"{side}_files.txt", f"{LABELED_FOLDER}/{path.name}\n".encode())
    _replace(target / "shape_names.txt", "".join(f"{name}\n" for name in classes).encode())
    count = {side: [shape.category for shape in shapes] for side, shapes in sides.items()}
    return {name: (count["train"].count(name), count["test"].count(name)) for name in classes}
