"""Find a user's meshes and clouds, with the category and the split of each."""

from __future__ import annotations

import os
import re
import zlib
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePath

from data.rendering.meshes import MESH_SUFFIXES
from utils.cloud_files import CLOUD_SUFFIXES
from utils.errors import DataError
from utils.files import check_name, data_files, read_lines

SUFFIXES = (*MESH_SUFFIXES, *CLOUD_SUFFIXES)
NO_CATEGORY = "00000000"
SPLITS = ("train", "test")
# ShapeNetCore's ids are names of folders: <synset>/<id>/models/model_normalized.obj, <synset>/<id>/model.obj in v1.
_SHAPENET_CORE = re.compile(r"model(_normalized)?$")
_SYNSET = re.compile(r"\d{8}$")


@dataclass(frozen=True)
class ShapeFile:
    """One file that becomes a pair.

    Attributes:
        path: of the file.
        category: first part of the pair's name.
        id: second part.
        split: ``train`` or ``test`` if folders or labels say so, else None.
        labeled: whether the category is a label of the shape.
    """

    path: Path
    category: str
    id: str
    split: str | None = None
    labeled: bool = True

    @property
    def name(self) -> str:
        """Return the name of the pair, ``<category>/<id>``."""
        return f"{self.category}/{self.id}"


def find_shapes(folder: Path, labels: Sequence[Path] = (), *, written: Collection[Path] = ()) -> list[ShapeFile]:
    """List the meshes and clouds below a folder, sorted by name, without the files ``written`` by earlier calls.

    The category is the first folder, the id is the rest of the path joined by ``-``, with the suffix if several files
    would have one name. Folders ``train`` and ``test``,
    above or below the category, define the split. With label files, the category comes only from them.

    Raises:
        DataError: the folder is missing or contains no shape, two files would get the same name, a name is not UTF-8,
            or a label file cannot be used.
    """
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder; pass the one with the mesh files as --meshes")
    paths = [p for p in data_files(folder, "**/*") if p.suffix.lower() in SUFFIXES and p.is_file()]
    if written:  # the output may be below the input
        ours = {os.path.realpath(path) for path in written}
        paths = [path for path in paths if os.path.realpath(path) not in ours]
    if not paths:
        raise DataError(f"no mesh or cloud below {folder}; expected files ending in {', '.join(SUFFIXES)}")
    shapes = [_by_folders(folder, path) for path in paths]
    if labels:
        shapes = _by_labels(folder, shapes, labels)
    # Names that differ only in case are one file on macOS and Windows.
    often = Counter(shape.name.lower() for shape in shapes)
    by_name: dict[str, ShapeFile] = {}
    for shape in shapes:
        if often[shape.name.lower()] > 1:  # chair.obj and chair.glb
            shape = replace(shape, id=f"{shape.id}-{shape.path.suffix[1:].lower()}")
        check_name(shape.name, shape.path)
        other = by_name.setdefault(shape.name.lower(), shape)
        if other is not shape:
            raise DataError(f"{other.path} and {shape.path} would both become {shape.name}.ply; rename one")
    return sorted(by_name.values(), key=lambda shape: shape.name)


def _by_folders(folder: Path, path: Path) -> ShapeFile:
    parents, stem = list(path.relative_to(folder).parts[:-1]), path.stem
    core = _shapenet_core(folder, parents, stem)
    if core is not None:
        return ShapeFile(path, *core, labeled=core[0] != NO_CATEGORY)
    split = None
    if len(parents) > 1 and parents[0].lower() in SPLITS:
        split = parents.pop(0).lower()
        parents.insert(1, split)  # keep it in the id, since both splits may use the same name
    elif len(parents) > 1 and parents[1].lower() in SPLITS:
        split = parents[1].lower()
    category = parents[0] if parents else NO_CATEGORY
    return ShapeFile(path, category, "-".join([*parents[1:], stem]), split, labeled=bool(parents))


def _shapenet_core(folder: Path, parents: list[str], stem: str) -> tuple[str, str] | None:
    """Return category and id of a file in ShapeNetCore's layout (``folder`` may be one synset's), else None."""
    if not parents or not _SHAPENET_CORE.match(stem):
        return None
    in_models = parents[-1] == "models"
    *_, category, name = "", folder.name, *(parents[:-1] if in_models else parents)
    if not name or not (in_models or _SYNSET.match(category)):
        return None
    told = len(parents) > 1 + in_models or _SYNSET.match(category)
    return category if told else NO_CATEGORY, name


# -------------------------------------------------------------------------------------------------------------- labels


def _by_labels(folder: Path, shapes: Iterable[ShapeFile], files: Sequence[Path]) -> list[ShapeFile]:
    """Give shapes the categories of label files; shapes that no file names are unlabeled."""
    known: dict[str, tuple[str, str | None]] = {}
    for file in files:
        for key, value in read_labels(file).items():
            if known.setdefault(key, value) != value:
                raise DataError(f"{file} gives {key} the label {value[0]}, another file {known[key][0]}; keep one")
    result, used = [], set()
    for shape in shapes:
        relative = shape.path.relative_to(folder)
        key = next((key for key in _keys(relative) if key in known), None)
        rest = "-".join([*relative.parts[:-1], relative.stem])
        if key is None:
            result.append(ShapeFile(shape.path, NO_CATEGORY, rest, labeled=False))
            continue
        used.add(key)
        category, split = known[key]
        result.append(ShapeFile(shape.path, category, rest, split))
    if not used:
        first = next(iter(known), "nothing")
        raise DataError(
            f"{files[0]} names none of the files below {folder} ({first}, for example); expected paths relative to it, "
            "file names, or names without suffix"
        )
    return result


def _keys(relative: PurePath) -> list[str]:
    """Return the names by which a label file may refer to a shape, the longest first."""
    names = [relative.as_posix(), relative.with_suffix("").as_posix(), relative.name, relative.stem]
    if re.fullmatch(r"m\d+", relative.stem):  # the Princeton Shape Benchmark's m123.off is number 123 in its lists
        names.append(relative.stem[1:])
    return names


def read_labels(path: Path) -> dict[str, tuple[str, str | None]]:
    """Read a label file: the category and, if given, the split of each shape, by name.

    Either the Princeton Shape Benchmark's ``.cla``, whose split is ``train`` or ``test`` if that is in the file's name,
    or text with ``name category [split]`` on each line, separated by tabs, commas or spaces; ``#`` begins a comment.

    Raises:
        DataError: the file cannot be read or a line is not as described.
    """
    try:
        lines = read_lines(path)
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read the labels {path}: {getattr(error, 'strerror', None) or error}") from error
    if lines and lines[0].split()[0] == "PSB":
        return _read_cla(lines, path)
    labels: dict[str, tuple[str, str | None]] = {}
    for number, line in enumerate(lines, 1):
        if line.startswith("#"):
            continue
        words = next((w for w in (line.split("\t"), line.split(",")) if len(w) > 1), line.split())
        words = [word.strip() for word in words]
        split = words[2].lower() if len(words) == 3 else None
        if len(words) not in (2, 3) or not all(words) or split not in (None, *SPLITS):
            raise DataError(f"{path}, line {number}: expected 'name category' and perhaps train or test, got {line!r}")
        labels[words[0].replace("\\", "/")] = (_safe(words[1]), split)
    if not labels:
        raise DataError(f"{path} contains no labels; expected 'name category' on each line")
    return labels


def _read_cla(lines: list[str], path: Path) -> dict[str, tuple[str, str | None]]:
    """Read the Princeton Shape Benchmark's classification: classes with a parent and the numbers of their models."""
    split = next((s for s in SPLITS if s in path.stem.lower()), None)
    labels: dict[str, tuple[str, str | None]] = {}
    try:
        promised = int(lines[1].split()[1])
        i = 2
        while i < len(lines):
            name, _, count = lines[i].split()
            members = lines[i + 1 : i + 1 + int(count)]
            if len(members) < int(count):
                raise ValueError(f"class {name} promises {count} models and lists {len(members)}")
            labels |= {member: (_safe(name), split) for member in members}
            i += 1 + int(count)
        if len(labels) != promised:
            raise ValueError(f"it promises {promised} models and lists {len(labels)}")
    except (ValueError, IndexError) as error:
        raise DataError(f"{path} is not a usable .cla file ({error}); it may be truncated") from error
    return labels


def _safe(category: str) -> str:
    """Return a category as a valid folder name."""
    return re.sub(r'[/\\:*?"<>|\s]+', "_", category).strip("._") or NO_CATEGORY


# --------------------------------------------------------------------------------------------------------------- split


def split_shapes(shapes: Sequence[ShapeFile], *, test_fraction: float, seed: int) -> dict[str, list[ShapeFile]]:
    """Split labeled shapes into a training and a test set.

    If folders or labels give the split of any shape, only they count. Otherwise ``test_fraction`` of each category, at
    least one shape, is for testing, chosen by a hash of the name, so that adding shapes hardly changes the choice.
    Categories with fewer than two shapes are skipped.
    """
    labeled = [shape for shape in shapes if shape.labeled]
    if any(shape.split for shape in labeled):
        return {side: [shape for shape in labeled if shape.split == side] for side in SPLITS}
    members: dict[str, list[ShapeFile]] = defaultdict(list)
    for shape in labeled:
        members[shape.category].append(shape)
    sides: dict[str, list[ShapeFile]] = {side: [] for side in SPLITS}
    for _, group in sorted(members.items()):
        if len(group) < 2:
            continue
        order = sorted(group, key=lambda shape: zlib.crc32(f"{seed}/{shape.name}".encode()))
        count = min(len(group) - 1, max(1, round(test_fraction * len(group))))
        sides["test"] += order[:count]
        sides["train"] += order[count:]
    return sides
