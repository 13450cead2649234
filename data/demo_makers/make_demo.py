"""Build the embedded demo set ``data/demo`` from the furniture libraries of Sweet Home 3D.

The libraries hold 820 colored OBJ models under CC0 and CC-BY 3.0, with a catalog of names, categories, sizes,
creators and licenses. Every usable model becomes 1,024 surface points with color and material, and small color views:

  shapenet_render.h5   the packed pretraining file, an index of the shards shapenet_render_*_N.h5 next to it
  demo_hdf5/           the models of the named classes in the layout of modelnet40_ply_hdf5_2048, for the linear SVM
  ATTRIBUTION.md       every model with creator, license and origin
  README.md            contents, formats and counts

The committed result is what everything else reads; this script is only needed to remake it. It takes about four minutes
on two cores. In addition to requirements.txt it needs, on Debian or Ubuntu:

  apt-get install sweethome3d-furniture libegl1 libgl1 libgl1-mesa-dri     the models; OpenGL without a display

Example:
  python data/demo_makers/make_demo.py --source /usr/share/sweethome3d/furniture --out data/demo
"""

from __future__ import annotations

import io
import math
import os
import re
import sys
import zipfile
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path, PurePosixPath
from typing import Any

import h5py
import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # also run by path

from data.rendering import Camera, Mesh, Renderer, sample_surface
from data.rendering.obj import read_obj
from data.rendering.renderer import create_context
from datasets.shape_reader import enclosing_sphere, to_unit_sphere
from utils import cli
from utils.errors import DataError, UserError
from utils.files import data_files
from utils.processes import worker_pool
from utils.progress import progress

LIBRARY_SUFFIXES = (".sh3f", ".zip", ".jar")
PACK_NAME = "shapenet_render.h5"
PACK_SOURCE = "Sweet Home 3D furniture libraries 1.8"
CATALOGUE = "PluginFurnitureCatalog.properties"
MAX_FILE_BYTES = 4_000_000

# Coordinates in [-1, 1] as 13-bit whole numbers: the rounding (1.2e-4) is far below the jitter of the augmentation
# (0.01), and the three spare bits compress away.
POINT_LEVELS = 8191
POINT_SCALE = 2.0 / POINT_LEVELS
POINT_OFFSET = -1.0

# Skip flat models: below this ratio of smallest to largest side, a model is a drawing on a plane, not a shape.
FLAT_RATIO = 2e-3
# Skip surfaces more transparent than this: they are modeling aids that are not meant to be seen.
INVISIBLE = 0.01
MAX_TEXTURE = 512
SAMPLES = 16  # per pixel

LICENCES = {
    "CC0": ("CC0 1.0 Universal (public domain dedication)", "https://creativecommons.org/publicdomain/zero/1.0/"),
    "CC-BY-3.0": ("Creative Commons Attribution 3.0 Unported", "https://creativecommons.org/licenses/by/3.0/"),
    "CC-BY-3.0-US": (
        "Creative Commons Attribution 3.0 United States",
        "https://creativecommons.org/licenses/by/3.0/us/",
    ),
}
# Library name (of the file) -> (license, copyright holders to name).
LIBRARIES = {
    "BlendSwap-CC-0": ("CC0", "the Blend Swap contributors; converted by Emmanuel Puybaret / eTeks"),
    "BlendSwap-CC-BY": ("CC-BY-3.0", "the Blend Swap contributors; converted by Emmanuel Puybaret / eTeks"),
    "KatorLegaz": ("CC-BY-3.0-US", "Andrew Kator & Jennifer Legaz, 2003-2008"),
    "Reallusion": ("CC-BY-3.0-US", "Reallusion, 2008-2016, http://www.reallusion.com/"),
    "Scopia": (
        "CC-BY-3.0",
        "Emmanuel Puybaret / eTeks, 2014-2020, and Scopia Visual Interfaces Systems, s.l., 2006-2020, http://www.scopia.es",
    ),
}


# The classes of the linear SVM: catalog names of each class, then models that the name would wrongly include or exclude
# (judged by their pictures). Classes with fewer than ten models and models between two classes are not used.
CLASSES: dict[str, tuple[set[str], set[str]]] = {
    "armchair": ({"Armchair", "Modern armchair", "Rattan armchair", "Winchester armchair"}, set()),
    "bed": ({"Bed", "Bunk bed", "Captain's bed", "Child bed", "Crib", "Day bed", "Hospital bed", "Iron bed"}, set()),
    "bottle": (
        {"Baby bottle", "Beer bottle", "Bottle", "Flacon", "Medicine bottle", "Spray bottle", "Wine bottle"}
        | {"Yogurt bottle"},
        set(),
    ),
    "cabinet": (
        {"Bedside table", "Chest", "Cupboard", "Drawers cabinet", "Dresser with drawers", "Filing cabinet"}
        | {"Glass door cabinet", "High cabinet", "Locked locker", "Lower cabinet", "Lower corner cabinet"}
        | {"Small lower cabinet", "Small upper cabinet", "Upper cabinet", "Wardrobe"},
        set(),
    ),
    "car": (
        {"Chevrolet", "Concept Sedan 01", "Concept Sedan 02", "Concept Sedan 02 Sport", "Ford Focus", "Peugeot 308 CC"}
        | {"Renault Scenic", "SUV", "Seat Leon", "Smart car", "VW new beetle", "Van"},
        set(),
    ),
    "chair": (
        {"Cafe chair", "Chair", "Chair with cushion", "Child chair", "Children chair", "Class seat", "Folding chair"}
        | {"Oak chair", "Osaka chair", "Plastic chair", "Teck chair"},
        # a folding stool; a square lounge seat
        {"blendswap-cc-0-foldingchair", "scopia-ext_chair"},
    ),
    "cup": ({"Beer glass", "Cocktail glass", "Coffee cup", "Coffee mug", "Cup", "Glass", "Plastic cup"}, set()),
    "door": (
        {"Door", "Double door", "Double door with panes", "Exterior door", "Glass door", "Screen door", "Shower door"},
        set(),
    ),
    "lamp": (
        {"Chandelier lamp", "Classic lamppost", "Desk lamp", "Hanging light", "Lamp", "Little lamp", "Park light"}
        | {"Pedestal vase lamp", "Pendant lamp", "Street lamp", "Street light"},
        set(),
    ),
    "person": (
        {"Boy", "Female", "Girl", "Holding female", "Holding male", "Lying down boy", "Lying down female"}
        | {"Lying down male", "Male", "Mannequin female", "Mannequin male", "Sitting boy", "Sitting female"}
        | {"Sitting girl", "Sitting male"},
        set(),
    ),
    "plant": (
        {"Cactus", "Decorative plant", "Flowers", "Indoor plant", "Little plant", "Orchids", "Plant", "Spathiphyllum"}
        | {"Spider plant", "Succulent plant", "Tulips", "White lily", "Yucca"},
        set(),
    ),
    "sofa": (
        {"Burlap sofa", "Clear sofa", "Convertible sofa BZ", "Corner sofa", "Couch", "Futon couch", "Rattan sofa"}
        | {"Sofa", "Sofa 2 seats", "Sofa 3 seats", "Winchester sofa"},
        set(),
    ),
    "table": (
        {"Bar table", "Black table", "Cafe table", "Children table", "Coffee table", "Folding table", "Glass table"}
        | {"Oak table", "Round table", "Table", "Table on trestles", "Technical table", "Wooden alder table"}
        | {"Wooden table", "Wooden teak table"},
        set(),
    ),
    "tree": (
        {"Acacia", "Bended coconut tree", "Blue pine under snow", "Christmas tree", "Coconut tree", "Copper beech"}
        | {"Cypress", "Ficus", "Japanese maple", "Palm tree", "Peach blossom", "Pine", "Pine under snow", "Poplar"}
        | {"Sycamore maple"},
        {"scopia-ficus"},  # a pot plant: see EXTRA_MEMBERS
    ),
    "window": (
        {"Double French window 3 panes", "Double French window small panes", "Double arched window"}
        | {"Double window 3 panes", "Double window 4 panes", "Double window with large pane", "Double-hung window"}
        | {"Quadruple French window", "Quadruple French window 3 panes", "Quadruple French window small panes"}
        | {"Quadruple arched window", "Sliding window", "Triple French window", "Turn window"},
        set(),
    ),
}
EXTRA_MEMBERS = {"scopia-ficus": "plant", "blendswap-cc-by-luckybamboo": "plant"}


@dataclass(kw_only=True)
class Content(cli.Settings):
    """Settings of the set; the defaults are those of the committed one."""

    points: int = cli.flag(1024, group="content", type=cli.positive_int, metavar="N", help="points per cloud")
    views: int = cli.flag(2, type=cli.positive_int, metavar="V", help="pictures per model")
    size: int = cli.flag(96, type=cli.positive_int, metavar="PX", help="side of a picture in pixels")
    colours: int = cli.flag(64, type=cli.positive_int, metavar="C", help="palette of a picture, at most 256")
    test_fraction: float = cli.flag(0.35, type=cli.share, metavar="F", help="part of each class that is for testing")


@dataclass(kw_only=True)
class DemoSettings(Content):
    """Settings of this script.

    Raises:
        UserError: the palette is too small or too large.
    """

    source: Path = cli.flag(
        group="files",
        required=True,
        type=Path,
        metavar="DIR_OR_FILE",
        help="folder with the furniture libraries (.sh3f, .zip, .jar), or one of them; from Debian: "
        "/usr/share/sweethome3d/furniture",
    )
    out: Path = cli.flag(Path("data/demo"), type=Path, metavar="DIR", help="folder to write; replaces a set there")
    seed: int = cli.flag(1, group="run", type=int, metavar="S", help="seed of points, views and split")
    workers: int = cli.flag(
        os.cpu_count() or 1, type=cli.positive_int, metavar="W", help="processes; does not change the result"
    )

    def __post_init__(self) -> None:
        if not 2 <= self.colours <= 256:
            raise UserError(f"--colours {self.colours}: a palette has 2 to 256 colors")


@dataclass(frozen=True)
class Model:
    """One catalog entry: the location of a model and its metadata."""

    collection: Path
    key: str  # unique: "<library>-<catalog id>", lower case
    name: str
    category: str
    tags: str
    creator: str
    licence: str
    source: str
    obj: str  # path inside the library
    size_cm: tuple[float, float, float]  # width (x), height (y), depth (z)
    rotation: tuple[float, ...] | None  # 3 x 3, row by row, applied before the size

    @property
    def id(self) -> str:
        """Name in the pack, "<category>/<key>"."""
        return f"{slug(self.category)}/{self.key}"


@dataclass
class Shape:
    """A converted model: two independent clouds, colors, materials, encoded views, real size."""

    points: np.ndarray  # (N, 3) float32 in the unit sphere
    svm_points: np.ndarray  # (N, 3) float32, another draw from the same surface
    colors: np.ndarray  # (N, 3) uint8
    material: np.ndarray  # (N,) uint8 index into material_names
    material_names: list[str]
    views: list[bytes]
    center_m: np.ndarray  # (3,) meters = points * radius_m + centre_m; y = 0 is the underside
    radius_m: float


class SkippedModelError(Exception):
    """Raised for a model that cannot be converted; the message is the reason."""


def slug(text: str) -> str:
    """Return ``text`` in lower case, with runs of anything but letters, digits and dots replaced by an underscore."""
    return re.sub(r"[^a-z0-9.]+", "_", text.lower()).strip("_")


# ---------------------------------------------------------------------------------------------------- catalogue


def find_libraries(source: Path) -> list[Path]:
    """Return the furniture library files of ``source``, which is one of them or a folder that holds them.

    Raises:
        DataError: there are none.
    """
    if source.is_dir():
        found = [path for path in data_files(source) if path.suffix.lower() in LIBRARY_SUFFIXES]
    else:
        found = [source] if source.is_file() else []
    if not found:
        raise DataError(
            f"no furniture library ({', '.join(LIBRARY_SUFFIXES)}) at {source}; "
            "`apt-get install sweethome3d-furniture` puts them into /usr/share/sweethome3d/furniture"
        )
    return found


def read_properties(text: str) -> dict[str, str]:
    r"""Parse a Java properties text: ``key=value`` lines, ``#`` comments, ``\uXXXX`` escapes."""
    values = {}
    for line in text.splitlines():
        key, found, value = line.strip().partition("=")
        if found and not key.startswith(("#", "!")):
            values[key.strip()] = re.sub(r"\\u([0-9a-fA-F]{4})", lambda m: chr(int(m[1], 16)), value.strip())
    return values


def read_catalogue(library: Path) -> list[Model]:
    """Read every entry of one library.

    Raises:
        DataError: the file is not a furniture library, or one whose license is not known here.
    """
    if library.stem not in LIBRARIES:
        raise DataError(f"{library}: its license is not known here; known libraries: {', '.join(LIBRARIES)}")
    try:
        archive = zipfile.ZipFile(library)
        values = read_properties(archive.read(CATALOGUE).decode("latin-1"))
    except (zipfile.BadZipFile, KeyError, OSError) as error:
        raise DataError(f"{library} is not a furniture library with a {CATALOGUE} ({error})") from error
    licence = LIBRARIES[library.stem][0]
    models = []
    with archive:
        names = set(archive.namelist())
        for number in sorted(int(key[3:]) for key in values if key.startswith("id#")):
            entry = {key.partition("#")[0]: value for key, value in values.items() if key.endswith(f"#{number}")}
            obj = entry["model"].lstrip("/")
            models.append(
                Model(
                    collection=library,
                    key=f"{library.stem.lower()}-{slug(entry['id'].split('#', 1)[1])}",
                    name=entry["name"],
                    category=entry["category"],
                    tags=entry.get("tags", ""),
                    creator=entry.get("creator", ""),
                    licence=licence,
                    source=read_source(archive, names, obj, licence),
                    obj=obj,
                    size_cm=(float(entry["width"]), float(entry["height"]), float(entry["depth"])),
                    rotation=tuple(map(float, entry["modelRotation"].split())) if "modelRotation" in entry else None,
                )
            )
    return models


def read_source(archive: zipfile.ZipFile, names: set[str], obj: str, licence: str) -> str:
    """Return title, author and address from the license note next to a Blend Swap model; empty without a note.

    Raises:
        DataError: the note requires more than the library's license does.
    """
    note = str(PurePosixPath(obj).parent / "BLENDSWAP_LICENSE.txt")
    if note not in names:
        return ""
    text = archive.read(note).decode("utf-8", "replace")
    stated = "CC0" if "Creative Commons Zero" in text else "CC-BY-3.0" if "Attribution 3.0" in text else "unknown"
    # A note may be freer than its library: the stricter of the two is kept.
    if stated not in (licence, "CC0"):
        raise DataError(f"{note}: license {stated}, but its library says {licence}")
    title = re.search(r'downloading "(.*?)" by (.*)', text)
    address = re.search(r"Downloaded from (\S+)", text)
    words = [f'"{" ".join(title[1].split())}" by {title[2].strip()}'] if title else []
    return ", ".join(words + ([address[1]] if address else []))


# -------------------------------------------------------------------------------------------------------- meshes


def read_model(archive: zipfile.ZipFile, path: str) -> Mesh:
    """Read a model with its materials and textures from a library.

    Raises:
        SkippedModelError: the file cannot be used.
    """
    folder = PurePosixPath(path).parent
    try:
        return read_obj(
            archive.read(path), path, lambda name: read_member(archive, folder / name), max_texture=MAX_TEXTURE
        )
    except DataError as error:
        raise SkippedModelError("no usable faces") from error


def read_member(archive: zipfile.ZipFile, path: PurePosixPath) -> bytes | None:
    """Read a file of the library by its name, in any case; return None if it is missing."""
    wanted = os.path.normpath(str(path).replace("\\", "/")).lower()
    for name in archive.namelist():
        if name.lower() == wanted:
            return archive.read(name)
    return None


def place(mesh: Mesh, model: Model) -> Mesh:
    """Return the mesh y up, in meters, at the catalog's size, without invisible or empty faces.

    Its footprint is centered on the origin, its underside is at y = 0 and its front faces +z.

    Raises:
        SkippedModelError: nothing is left, a coordinate is not finite, or the model is flat.
    """
    xyz = mesh.vertices
    if model.rotation is not None:
        xyz = xyz @ np.reshape(model.rotation, (3, 3)).T
    visible = np.asarray([material.opacity > INVISIBLE for material in mesh.materials])[mesh.material]
    corners = xyz[mesh.triangles]
    area = np.linalg.norm(np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]), axis=1)
    keep = visible & (area > 0)
    if not keep.any():
        raise SkippedModelError("no visible surface")
    used = xyz[mesh.triangles[keep]].reshape(-1, 3)
    if not np.isfinite(used).all():
        raise SkippedModelError("coordinates that are not finite")
    low, high = used.min(0), used.max(0)
    extent = high - low
    size = np.asarray(model.size_cm) / 100
    scale = size / np.maximum(extent, 1e-12)
    scale = np.where(extent > 1e-6 * extent.max(), scale, 1.0)
    if (extent * scale).min() < FLAT_RATIO * (extent * scale).max():
        raise SkippedModelError("flat")
    origin = np.array([(low[0] + high[0]) / 2, low[1], (low[2] + high[2]) / 2])
    return Mesh((xyz - origin) * scale, mesh.triangles[keep], mesh.uv[keep], mesh.material[keep], mesh.materials)


# --------------------------------------------------------------------------------------------------------------- views


def nearest(values: np.ndarray, centers: np.ndarray) -> np.ndarray:
    """Return the index (n,) of the center (k, c) that is closest to each of the values (n, c)."""
    return (np.square(centers).sum(1) - 2 * values @ centers.T).argmin(1)


def cluster_colors(values: np.ndarray, count: int) -> np.ndarray:
    """Return at most ``count`` colors (k, 4) that represent ``values`` (n, 4): all of them, or k-means centers."""
    centers = np.unique(values, axis=0)
    if len(centers) <= count:
        return centers
    centers = centers[np.linspace(0, len(centers) - 1, count).astype(int)]
    for _ in range(12):
        owner = nearest(values, centers)
        size = np.bincount(owner, minlength=count)
        total = np.stack([np.bincount(owner, channel, minlength=count) for channel in values.T], 1)
        centers = np.where(size[:, None] > 0, total / np.maximum(size, 1)[:, None], centers).astype(np.float32)
    return centers


def encode_view(picture: np.ndarray, colors: int) -> bytes:
    """Encode RGBA (h, w, 4) uint8 as a PNG with a palette of at most ``colors`` colors, including the background."""
    pixels = picture.reshape(-1, 4).astype(np.float32)
    pixels[pixels[:, 3] < 8] = 0
    # Weight colors by their opacity.
    weighted = np.concatenate([pixels[:, :3] * pixels[:, 3:] / 255, pixels[:, 3:]], 1)
    seen = pixels[:, 3] > 0
    centers = cluster_colors(weighted[seen], colors - 1)
    index = np.zeros(len(pixels), np.uint8)
    index[seen] = nearest(weighted[seen], centers) + 1
    centers = np.concatenate([np.zeros((1, 4), np.float32), centers])
    rgb = centers[:, :3] * 255 / np.maximum(centers[:, 3:], 1)
    image = Image.fromarray(index.reshape(picture.shape[:2]), mode="P")
    image.putpalette(rgb.round().clip(0, 255).astype(np.uint8).tobytes(), "RGB")
    alpha = centers[:, 3].round().clip(0, 255).astype(np.uint8).tobytes()
    out = io.BytesIO()
    image.save(out, "PNG", optimize=True, transparency=alpha)
    return out.getvalue()


# ----------------------------------------------------------------------------------------------------- one model

_renderer: Renderer | None = None


def _make_renderer(view_size: int) -> None:
    """Create this process's renderer."""
    global _renderer
    _renderer = Renderer(view_size, samples=SAMPLES)


def view_angles(rng: np.random.Generator, count: int) -> list[tuple[float, float]]:
    """Draw azimuths and elevations in degrees; views show the front half, from alternating sides."""
    side = 1.0 if rng.random() < 0.5 else -1.0
    return [(side * (-1) ** i * rng.uniform(15, 60), rng.uniform(20, 30)) for i in range(count)]


def build_shape(job: tuple[Model, int, int, int, int]) -> Shape | str:
    """Turn (model, seed, points, views, colors) into a shape, or into the reason why it cannot be one.

    A pure function of its arguments: neither the order of models nor the number of processes matters.
    """
    model, seed, count, views, colors = job
    assert _renderer is not None, "runs in a process that _make_renderer has prepared"
    rng = np.random.default_rng([seed, zlib.crc32(model.key.encode())])
    first, second = (int(s) for s in rng.integers(2**31, size=2))
    try:
        with zipfile.ZipFile(model.collection) as archive:
            mesh = place(read_model(archive, model.obj), model)
        meters, color, material, _ = sample_surface(mesh, count, first)
        center, radius = enclosing_sphere(meters)
        second_meters = sample_surface(mesh, count, second).points
    except SkippedModelError as error:
        return str(error)
    except DataError:  # of sample_surface
        return "almost everything is cut away by transparent textures"
    used = np.unique(material)
    cameras = [Camera(*angles) for angles in view_angles(rng, views)]
    return Shape(
        points=((meters - center) / radius).astype(np.float32),
        svm_points=to_unit_sphere(second_meters).astype(np.float32),
        colors=color,
        material=np.searchsorted(used, material).astype(np.uint8),
        material_names=[mesh.materials[index].name for index in used],
        views=[encode_view(picture, colors) for picture in _renderer.views(mesh, cameras)],
        center_m=center.astype(np.float32),
        radius_m=radius,
    )


def build_shapes(models: Sequence[Model], args: DemoSettings) -> list[Shape | str]:
    """Build every model in several processes; return one :class:`Shape` or reason per model, in order."""
    jobs = [(model, args.seed, args.points, args.views, args.colours) for model in models]
    # Spawn, not fork: an OpenGL context does not survive a fork.
    with worker_pool(args.workers, get_context("spawn"), _make_renderer, (args.size,)) as pool:
        return list(progress(pool.map(build_shape, jobs), total=len(jobs), text="models", unit="models"))


# ------------------------------------------------------------------------------------------- classes and their split


def class_of(model: Model) -> str | None:
    """Return the class of a model for the linear SVM, by its catalog name; None for most models."""
    if model.key in EXTRA_MEMBERS:
        return EXTRA_MEMBERS[model.key]
    for name, (names, excluded) in CLASSES.items():
        if model.name in names and model.key not in excluded:
            return name
    return None


def family(model: Model) -> str:
    """Return the name shared by variants of a design: ``lamp1``, ``lamp2``; ``window_2x3``, ``window_2x3_arched``."""
    stem = re.sub(r"_?(arched|bended|rect|regular|snow|sport|2seats)$", "", model.key)
    return re.sub(r"(_0\d|(?<!\dx)v?\d+|_f)$", "", re.sub(r"_0\d$", "", stem)) + "|" + model.creator


def near_duplicates(shapes: Sequence[Shape]) -> list[tuple[int, int]]:
    """Return the pairs whose clouds are as close to each other as two draws from one surface."""
    from sklearn.neighbors import KDTree

    trees = [KDTree(shape.points) for shape in shapes]

    def gap(tree: Any, points: np.ndarray) -> float:
        return float(tree.query(points)[0].mean())

    own = [gap(tree, shape.svm_points) for tree, shape in zip(trees, shapes, strict=True)]
    pairs = []
    for i in range(len(shapes)):
        for j in range(i):
            apart = max(gap(trees[i], shapes[j].points), gap(trees[j], shapes[i].points))
            if apart < 1.1 * (own[i] + own[j]) / 2:
                pairs.append((i, j))
    return pairs


def split_class(
    models: Sequence[Model], shapes: Sequence[Shape], *, test_fraction: float, rng: np.random.Generator
) -> np.ndarray:
    """Choose the test members of one class: (n,) bool, variants of a design always on the same side."""
    group = list(range(len(models)))
    families = [family(model) for model in models]
    same = [(i, j) for i in range(len(models)) for j in range(i) if families[i] == families[j]]
    for i, j in same + near_duplicates(shapes):
        group = [group[j] if g == group[i] else g for g in group]
    wanted = max(1, round(test_fraction * len(models)))
    test = np.zeros(len(models), bool)
    for g in rng.permutation(np.unique(group)):
        members = np.asarray(group) == g
        if test.sum() + members.sum() <= wanted:
            test |= members
    return test


# ------------------------------------------------------------------------------------------------------- writing


def quantize(points: np.ndarray) -> np.ndarray:
    """Return coordinates in [-1, 1] as uint16: value = q * POINT_SCALE + POINT_OFFSET."""
    return (
        np.rint((np.asarray(points, np.float64) - POINT_OFFSET) / POINT_SCALE).clip(0, POINT_LEVELS).astype(np.uint16)
    )


def build_palette(colors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Map colors (n, N, 3) uint8 to a common palette; return indices (n, N) uint8 and the palette (256, 3) uint8."""
    picture = Image.fromarray(colors)
    reduced = picture.quantize(256, method=Image.Quantize.MEDIANCUT, kmeans=2, dither=Image.Dither.NONE)
    palette = np.zeros((256, 3), np.uint8)
    entries = np.asarray(reduced.getpalette("RGB"), np.uint8).reshape(-1, 3)[:256]
    palette[: len(entries)] = entries
    return np.asarray(reduced).copy(), palette


def write_shards(out: Path, name: str, data: np.ndarray, *, budget: int, **storage: Any) -> h5py.VirtualLayout:
    """Spread ``data`` over files of about ``budget`` stored bytes each; return the dataset that joins them."""
    rows = max(1, math.floor(budget / (data.nbytes / len(data))))
    count = math.ceil(len(data) / rows)
    layout = h5py.VirtualLayout(shape=data.shape, dtype=data.dtype)
    for index, part in enumerate(np.array_split(np.arange(len(data)), count)):
        path = out / f"shapenet_render_{name}_{index}.h5"
        with h5py.File(path, "w") as file:
            file.create_dataset("data", data=data[part[0] : part[-1] + 1], **storage)
        layout[part[0] : part[-1] + 1] = h5py.VirtualSource(path.name, "data", shape=(len(part), *data.shape[1:]))
    return layout


def write_text_table(file: h5py.Group, name: str, values: Sequence[str]) -> None:
    """Write a list of strings as variable-length UTF-8."""
    file.create_dataset(name, data=np.asarray(values, dtype=object), dtype=h5py.string_dtype("utf-8"))


def write_pack(out: Path, models: Sequence[Model], shapes: Sequence[Shape]) -> None:
    """Write ``shapenet_render.h5`` and its shards: "crossnet-pack" version 1 with additional items of the demo."""
    for old in out.glob("shapenet_render*.h5"):
        old.unlink()
    views = [view for shape in shapes for view in shape.views]
    color, palette = build_palette(np.stack([shape.colors for shape in shapes]))
    packed = {"shuffle": True, "compression": "gzip", "compression_opts": 9}
    points = quantize(np.stack([shape.points for shape in shapes]))
    per_row = points.shape[1:]
    with h5py.File(out / PACK_NAME, "w") as file:
        file.attrs.update({"format": "crossnet-pack", "version": 1, "source": PACK_SOURCE})
        # Only thirteen of sixteen bits are used: a shard of 4.2 MB is stored in less than 3.6.
        layout = write_shards(out, "points", points, budget=4_200_000, chunks=(1, *per_row), **packed)
        file.create_virtual_dataset("points", layout).attrs.update({"scale": POINT_SCALE, "offset": POINT_OFFSET})
        layout = write_shards(out, "images", np.frombuffer(b"".join(views), np.uint8), budget=3_500_000)
        file.create_virtual_dataset("image_bytes", layout)
        file["image_offset"] = np.cumsum([0] + [len(view) for view in views], dtype=np.int64)
        file["view_offset"] = np.cumsum([0] + [len(shape.views) for shape in shapes], dtype=np.int64)
        write_text_table(file, "ids", [model.id for model in models])
        write_text_table(file, "view_names", [f"{i:02d}.png" for shape in shapes for i in range(len(shape.views))])

        chunks = (min(64, len(color)), color.shape[1])
        file.create_dataset("point_colour", data=color, chunks=chunks, **packed)
        file["palette"] = palette
        material = np.stack([shape.material for shape in shapes])
        file.create_dataset("point_material", data=material, chunks=chunks, **packed)
        file["material_offset"] = np.cumsum([0] + [len(shape.material_names) for shape in shapes], dtype=np.int64)
        write_text_table(file, "material_names", [name for shape in shapes for name in shape.material_names])
        file["centre_m"] = np.stack([shape.center_m for shape in shapes])
        file["radius_m"] = np.asarray([shape.radius_m for shape in shapes], np.float32)
        file["size_m"] = np.asarray([model.size_cm for model in models], np.float32) / 100
        catalogue = file.create_group("catalogue")
        for name in ("name", "category", "tags", "creator", "licence", "source"):
            write_text_table(catalogue, name, [getattr(model, name) for model in models])
        write_text_table(catalogue, "library", [model.collection.stem for model in models])
        write_text_table(catalogue, "class", [class_of(model) or "" for model in models])


def class_members(models: Sequence[Model]) -> dict[str, list[int]]:
    """Return the indices of the models of every class.

    Raises:
        DataError: a class has fewer than two, so that it cannot be split.
    """
    members: dict[str, list[int]] = {name: [] for name in sorted(CLASSES)}
    for index, model in enumerate(models):
        name = class_of(model)
        if name is not None:
            members[name].append(index)
    for name, indices in members.items():
        if len(indices) < 2:
            raise DataError(f"class {name} has {len(indices)} models; are all libraries in --source?")
    return members


def write_svm(
    out: Path,
    models: Sequence[Model],
    shapes: Sequence[Shape],
    members: Mapping[str, Sequence[int]],
    *,
    test_fraction: float,
    seed: int,
) -> dict[str, tuple[int, int]]:
    """Write ``demo_hdf5`` and return the training and test size of every class."""
    folder = out / "demo_hdf5"
    split: dict[str, list[tuple[int, int]]] = {"train": [], "test": []}
    sizes = {}
    for label, (name, indices) in enumerate(members.items()):
        rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
        chosen = [models[i] for i in indices], [shapes[i] for i in indices]
        test = split_class(*chosen, test_fraction=test_fraction, rng=rng)
        split["test"] += [(i, label) for i in np.asarray(indices)[test]]
        split["train"] += [(i, label) for i in np.asarray(indices)[~test]]
        sizes[name] = int((~test).sum()), int(test.sum())
    for side, chosen in split.items():
        order = np.random.default_rng([seed, len(side)]).permutation(len(chosen))
        index, label = np.asarray(chosen)[order].T
        clouds = np.stack([shapes[i].svm_points for i in index])
        with h5py.File(folder / f"ply_data_{side}0.h5", "w") as file:
            # Steps of 1/2048 are exact in float16 and compress better than its finer steps near zero.
            file.create_dataset(
                "data",
                data=(np.rint(clouds * 2048) / 2048).astype(np.float16),
                shuffle=True,
                compression="gzip",
                compression_opts=9,
                chunks=(min(16, len(clouds)), *clouds.shape[1:]),
            )
            file["label"] = label[:, None].astype(np.uint8)
            write_text_table(file, "ids", [models[i].id for i in index])
        (folder / f"{side}_files.txt").write_text(f"demo_hdf5/ply_data_{side}0.h5\n", encoding="utf-8")
    (folder / "shape_names.txt").write_text("".join(f"{name}\n" for name in members), encoding="utf-8")
    return sizes


def write_attribution(out: Path, models: Sequence[Model]) -> None:
    """Write ``ATTRIBUTION.md``: creator, license and origin of every model."""
    lines = [
        "# Attribution",
        "",
        f"The demo set is derived from {len(models)} 3-D models of the furniture libraries 1.8 of",
        "[Sweet Home 3D](http://www.sweethome3d.com/importModels.jsp), as packed by Debian (`sweethome3d-furniture`).",
        "They were changed: scaled to the catalogue's size, sampled as points, normalized and drawn as pictures.",
        "",
        "Their creators do not endorse this project. Each model's licence covers its points and pictures here too:",
        "",
        *(f"- `{short}`: [{name}]({link})" for short, (name, link) in LICENCES.items()),
        "",
    ]
    for library, (licence, holders) in LIBRARIES.items():
        chosen = [model for model in models if model.collection.stem == library]
        if chosen:
            lines += ["", f"## {library}: {len(chosen)} models, `{licence}`", "", f"Copyright: {holders}.", ""]
            lines += ["| id | name | creator | licence | origin |", "| --- | --- | --- | --- | --- |"]
            for model in chosen:
                cells = [model.id, model.name, model.creator, model.licence, model.source or f"{library}, {model.obj}"]
                lines.append("| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |")
    (out / "ATTRIBUTION.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


README = """# The demo set

{count} furniture models as point clouds with renderings, so that everything in this repository runs without a download.
They come from the furniture libraries of Sweet Home 3D under CC0 and CC-BY 3.0; `ATTRIBUTION.md` names the creator,
license and origin of each. This folder is a valid `--data_root`. It was made with

```
{command}
```

which reads the 820 models of the Debian package `sweethome3d-furniture`; {skipped} of them were skipped
({reasons}). y is up, the front faces +z.

## shapenet_render.h5: pretraining pairs

The packed pretraining file (`crossnet-pack` version 1), an index of the shards `shapenet_render_points_*.h5` and
`shapenet_render_images_*.h5`, which must stay beside it.

| dataset | shape | meaning |
| --- | --- | --- |
| `points` | ({count}, {points}, 3) uint16 | surface points, uniform by area: value = q * `scale` + `offset` (attributes), in the unit sphere |
| `ids` | ({count},) text | `<catalogue category>/<library>-<model>` |
| `image_bytes`, `image_offset` | | {images} PNG files of {size} x {size} pixels, RGBA with a palette, concatenated |
| `view_offset`, `view_names` | | views of shape i are images `view_offset[i]` up to, not including, `view_offset[i + 1]` |
| `point_colour`, `palette` | ({count}, {points}) uint8, (256, 3) uint8 | color of every point: `palette[point_colour]` |
| `point_material` | ({count}, {points}) uint8 | its material: `material_names[material_offset[i] + point_material[i]]` |
| `centre_m`, `radius_m` | ({count}, 3), ({count},) float32 | meters = points * `radius_m` + `centre_m`; underside at y = 0 |
| `size_m` | ({count}, 3) float32 | width (x), height (y), depth (z) in the catalog, meters |
| `catalogue/*` | ({count},) text | name, category, tags, creator, licence, source, library, and class (empty for most) |

Materials: {materials} in all, named as in the models. Views: object centered, azimuth within 60 degrees of the front,
on alternating sides, elevation 20 to 30 degrees, transparent background.

## demo_hdf5: {classes} classes for the linear SVM

In the layout of `modelnet40_ply_hdf5_2048`, float16, {points} points redrawn from the same surfaces, in the unit
sphere; `ids` (not in the original layout) names every row's model. The classes follow the catalog names, checked by
eye. Variants of a design, and models with nearly the same surface, stay on one side of the split. The test models are
among the pretraining pairs too, without labels.

| class | train | test |
| --- | --- | --- |
{table}
"""  # noqa: E501


def write_readme(
    out: Path,
    shapes: Sequence[Shape],
    skipped: Counter[str],
    sizes: dict[str, tuple[int, int]],
    size: int,
    command: str,
) -> None:
    """Write ``README.md`` with the counts of this build."""
    total = tuple(map(sum, zip(*sizes.values(), strict=True)))
    rows = [f"| {name} | {train} | {test} |" for name, (train, test) in sizes.items()]
    text = README.format(
        count=len(shapes),
        points=len(shapes[0].points),
        images=sum(len(shape.views) for shape in shapes),
        size=size,
        skipped=skipped.total(),
        reasons=", ".join(f"{count} {reason}" for reason, count in skipped.items()) or "none",
        materials=sum(len(shape.material_names) for shape in shapes),
        classes=len(sizes),
        table="\n".join([*rows, f"| all | {total[0]} | {total[1]} |"]),
        command=command,
    )
    (out / "README.md").write_text(text, encoding="utf-8")


def check_replaceable(path: Path, source: str) -> None:
    """Check that a file is one of the demo set's, so that it may be replaced.

    Raises:
        UserError: it is from another source.
    """
    try:
        with h5py.File(path, "r") as file:
            found = file.attrs.get("source")
    except OSError:
        found = None
    if found != source:
        raise UserError(f"{path} exists and is not a demo set; choose another --out, so that it is not lost")


def check_sizes(out: Path) -> int:
    """Return the bytes under ``out``.

    Raises:
        DataError: one of its files is too large to commit.
    """
    files = {path: path.stat().st_size for path in sorted(out.rglob("*")) if path.is_file()}
    for path, size in files.items():
        if size > MAX_FILE_BYTES:
            raise DataError(
                f"{path} has {size} bytes, more than {MAX_FILE_BYTES}; try fewer --colours or a smaller --size"
            )
    return sum(files.values())


def prepare(out: Path) -> None:
    """Create the folder, and check that everything is available before the long part starts.

    Raises:
        UserError: the folder cannot be written or holds another packed file, or a package is missing.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "demo_hdf5").mkdir(exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {out}: {error.strerror}") from error
    if not os.access(out, os.W_OK):
        raise UserError(f"cannot write to {out}: no permission")
    pack = out / PACK_NAME
    if pack.exists():
        check_replaceable(pack, PACK_SOURCE)
    create_context().release()  # report missing OpenGL before the long part


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Build the set; return its counts."""
    args = DemoSettings.from_flags(DemoSettings.parser(__doc__).parse_args(argv))
    models = [model for library in find_libraries(args.source) for model in read_catalogue(library)]
    # Sorted as every source of pairs is.
    models.sort(key=lambda model: model.id)
    prepare(args.out)
    class_members(models)  # fail before the long part
    built = build_shapes(models, args)
    for model, reason in zip(models, built, strict=True):
        if isinstance(reason, str):
            print(f"left out: {model.id}: {reason}")
    skipped = Counter(reason for reason in built if isinstance(reason, str))
    kept = [(model, shape) for model, shape in zip(models, built, strict=True) if isinstance(shape, Shape)]
    models, shapes = [model for model, _ in kept], [shape for _, shape in kept]
    members = class_members(models)  # before an earlier set is replaced
    write_pack(args.out, models, shapes)
    sizes = write_svm(args.out, models, shapes, members, test_fraction=args.test_fraction, seed=args.seed)
    write_attribution(args.out, models)
    script = "data/demo_makers/make_demo.py"
    command = f"python {script} --source /usr/share/sweethome3d/furniture --out data/demo --seed {args.seed}"
    changed = {name: getattr(args, name) for name, usual in vars(Content()).items() if getattr(args, name) != usual}
    command += "".join(f" --{name} {value}" for name, value in changed.items())
    write_readme(args.out, shapes, skipped, sizes, args.size, command)
    total = check_sizes(args.out)
    counts = f"{len(models)} of {len(built)} models, {skipped.total()} left out, {len(sizes)} classes"
    print(f"{counts}, {total / 1e6:.1f} MB in {args.out}")
    for name, (train, test) in sizes.items():
        print(f"  {name:10s} {train:3d} train {test:3d} test")
    return {"models": len(models), "left_out": skipped.total(), "bytes": total, "classes": sizes}


if __name__ == "__main__":
    cli.run(main)
