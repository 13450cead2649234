"""List the data sets below a root, compare them with the published counts, and name broken and missing files.

Your own pairs, part data, labeled clouds, and folders of meshes or clouds are recognized too, also in folders of the
root, with the command that uses them. Exit code 0: everything found is valid. 1: something is broken; the table says
which file.

  python -m data.check_data
  python -m data.check_data --data_root /big/disk/data --md5 --json report.json
  python -m data.check_data --data_root ~/models
"""

from __future__ import annotations

import argparse
import re
import shlex
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # also run by path
from data.shape_files import SUFFIXES
from data.unpack import KNOWN_MD5, file_md5
from datasets.hdf5 import SPLITS, hdf5_file, read_labeled_clouds
from datasets.modelnet import (
    DEMO_FOLDER,
    MODELNET10_LABELS,
    MODELNET40_CLASSES,
    MODELNET40_TRAIN,
    POINT_CLOUD_DATASETS,
    RELEASED,
    RESAMPLED,
    Layout,
    ModelNet10,
    ModelNet40,
    find_modelnet,
    find_modelnet_itself,
    listed_files,
    read_first_rows,
    resampled_files,
)
from datasets.own_clouds import LABELED_FOLDER, find_class_folders, own_hdf5_files, shape_files
from datasets.pair_sources import PACKED_FORMAT, PACKED_NAME, FolderSource, PackedSource, PairSource
from datasets.s3dis import BLOCK_FOLDER, CHANNELS, FILE_LIST, PREPARE_COMMAND, ROOM_FOLDER, ROOM_LIST
from datasets.scanobjectnn import CLASSES as SCANOBJECTNN_CLASSES
from datasets.scanobjectnn import VARIANTS, candidate_files
from datasets.shape_reader import Reader, read_shape
from datasets.shapenet_part import (
    PartTaxonomy,
    TextRelease,
    file_prefix,
    find_part_folder,
    official_taxonomy,
    read_part_file,
    read_taxonomy,
)
from datasets.untrusted import decode_image
from utils.cli import HelpFormatter, run, write_json
from utils.errors import DataError
from utils.files import data_files, has_data_files, read_lines
from utils.progress import progress

SHAPENET_SHAPES = 43_783
MODELNET10_TRAIN_GAP = 3  # the HDF5 release has 9,840 of ModelNet40's 9,843 training models
SCANOBJECTNN_SIZES = {"OBJ_BG": {"train": 2309, "test": 581}}
SHAPENETPART_SIZES = {"train": 12137, "val": 1870, "test": 2874}
S3DIS_BLOCKS = 23_585
SAMPLED_SHAPES = 500  # clouds and views read without --full

_TEN_CLASSES = "only the ten classes of ModelNet10"
_LIST = "bash data/download_data.sh --list"
_PRETRAIN = "python train_crossnet_con.py --data_root {root}"
_SCORE = "python downstream/classification/main.py --dataset {name} --data_root {root} --model_path MODEL"
_PARTS = "python downstream/segmentation/main_partseg.py --data_root {root}"
_FOLDER = "python downstream/classification/main.py --dataset folder --data_root {root} --model_path MODEL"
_PREPARE_MESHES = "python -m data.prepare_meshes --meshes {folder} --out data/mine"
# Folders of the root that other rows are about, and that have HDF5 files of labeled clouds.
_HAS_ROWS = re.compile(rf"modelnet|shapenet|scanobjectnn|indoor3d|{LABELED_FOLDER}", re.IGNORECASE)
_OWN_FOLDER = Path(__file__).resolve().parent
OK, PARTIAL, MISSING, BROKEN = "ok", "partial", "missing", "broken"


@dataclass
class Finding:
    """The state of one data set.

    Attributes:
        state: ``ok``, ``partial`` (valid, but not the published count), ``missing`` or ``broken``.
        found: counts by name, for example ``{"train": 9840, "test": 2468}``.
        expected: the published counts; empty if unknown.
        where: file or folder.
        problems: broken files, each with its path.
        notes: remarks for the table.
        get: the command that downloads or makes what is missing.
        own: whether this is a set of the user's, which has no published counts.
        use: the command that uses it.
    """

    state: str = MISSING
    found: dict[str, int] = field(default_factory=dict)
    expected: dict[str, int] = field(default_factory=dict)
    where: str = ""
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    get: str = ""
    own: bool = False
    use: str = ""

    def settle(self, *, complete: bool | None = None) -> Finding:
        """Set the state from problems and counts; a complete set needs no command."""
        if self.problems:
            self.state = BROKEN
        elif self.found:
            if complete is None:
                complete = all(self.found.get(name) == count for name, count in self.expected.items())
            self.state = OK if complete else PARTIAL
        if self.state == OK:
            self.get = ""
        return self


class _Checker:
    """Checks the data sets below one root."""

    def __init__(self, root: Path, *, full: bool = False, md5: bool = False) -> None:
        self.root, self.full, self.md5 = root, full, md5

    def command(self, *names: str) -> str:
        """Return the command that downloads sets into this root."""
        place = [] if self.root.resolve() == _OWN_FOLDER else ["--dir", str(self.root)]
        return shlex.join(["bash", "data/download_data.sh", *place, *names])

    def attempt(self, finding: Finding, action: Callable[[], Any]) -> Any:
        """Run a reader; record a DataError as a problem of the set, without its advice on how to get the file."""
        try:
            return action()
        except DataError as error:
            if error.problem not in finding.problems:
                finding.problems.append(error.problem)
            return None

    def listed_or_found(self, finding: Finding, folder: Path, index: str, pattern: str) -> list[Path]:
        """Return the files in a list (by base name, as lists name folders of other machines), or those of a pattern."""
        path = folder / index
        if not path.is_file():
            return data_files(folder, pattern)
        names = self.attempt(finding, lambda: _read_list(path)) or []
        return [folder / name.replace("\\", "/").rsplit("/", 1)[-1] for name in names]

    def to_read(self, count: int, what: str, finding: Finding) -> list[int]:
        """Return the numbers of the files to read: all with --full, otherwise an evenly spaced subset, with a note."""
        if self.full or count <= SAMPLED_SHAPES:
            return list(range(count))
        finding.notes.append(f"read {SAMPLED_SHAPES} of {count:,} {what}; --full reads all")
        return np.unique(np.linspace(0, count - 1, SAMPLED_SHAPES).round().astype(int)).tolist()

    # --- pretraining pairs ---

    def pairs(self, source: PairSource, finding: Finding) -> None:
        """Read clouds and first views of a source; without --full, an evenly spaced subset."""
        finding.found["pairs"] = len(source.ids)
        chosen = self.to_read(len(source.ids), "shapes", finding)
        sizes: set[int] = set()
        for i in progress(chosen, text="reading pairs", unit="shapes", leave=False):
            cloud = self.attempt(finding, lambda i=i: source.points(i))
            if cloud is not None:
                sizes.add(len(cloud))
            views = range(len(source.view_names(i))) if self.full else (0,)
            for view in views:
                self.attempt(
                    finding, lambda i=i, v=view: decode_image(source.image_file(i, v), source.where(i, v)) and None
                )
        if sizes:
            spread = f"{min(sizes):,}" if len(sizes) == 1 else f"{min(sizes):,} to {max(sizes):,}"
            finding.notes.append(f"clouds of {spread} points")
        if source.skipped:
            finding.notes.append(f"{len(source.skipped):,} clouds have no rendering, {source.skipped[0]} for one")

    def folder_pairs(self) -> Finding:
        """Check ``ShapeNet/`` and ``ShapeNetRendering/``, which may hold the user's own objects."""
        clouds, views = self.root / "ShapeNet", self.root / "ShapeNetRendering"
        has_clouds, has_views = has_data_files(clouds, "*/*.ply"), has_data_files(views, "*/*/rendering/*.png")
        finding = Finding(where=f"{clouds} + {views.name}")
        finding.own = has_clouds and _are_own(path.name for path in data_files(clouds))
        if finding.own:
            finding.get = _PREPARE_MESHES.format(folder=_quoted(clouds))
        else:
            finding.expected = {"pairs": SHAPENET_SHAPES}
            wanted = [name for name, there in (("shapenet", has_clouds), ("shapenet_render", has_views)) if not there]
            finding.get = self.command(*(wanted or ("shapenet", "shapenet_render")))
        if has_clouds and has_views:
            finding.use = _PRETRAIN.format(root=_quoted(self.root)) if finding.own else ""
            source = self.attempt(finding, lambda: FolderSource(self.root))
            if source is not None:
                self.pairs(source, finding)
        elif has_clouds or has_views:
            finding.found["pairs"] = 0
            finding.notes.append(f"{clouds if has_views else views} is missing")
        return finding.settle(complete=None if has_clouds and has_views else False)

    def packed(self, path: Path) -> Finding:
        """Check a file written by ``python -m datasets.pack`` or ``python -m data.make_shapes``."""
        finding = Finding(where=str(path))
        source = self.attempt(finding, lambda: PackedSource(path))
        if source is not None:
            finding.own = _are_own(name.split("/")[0] for name in source.ids)
            self.pairs(source, finding)
        if finding.own:
            finding.use = _PRETRAIN.format(root=_quoted(path))
        else:
            finding.expected = {"pairs": SHAPENET_SHAPES}
        return finding.settle()

    # --- labeled clouds ---

    def _labeled(
        self, folder: Path, split: str, finding: Finding, num_classes: int | None, prefix: str = "ply_data_"
    ) -> np.ndarray:
        """Return the labels in the readable files of one split; record the others as problems."""
        files = self.attempt(finding, lambda: listed_files(folder, split, prefix=prefix))
        if files is None:
            files = data_files(folder, f"{prefix}{split}*.h5")
        labels = [np.empty(0, np.int64)]
        for file in files:
            read = self.attempt(finding, lambda f=file: read_labeled_clouds(f, num_classes=num_classes))
            if read is not None:
                labels.append(read[1])
        return np.concatenate(labels)

    def modelnet(self) -> tuple[Finding, Finding]:
        """Check ModelNet40, and ModelNet10 in the same files."""
        get = self.command("modelnet40")
        forty = Finding(expected=dict(ModelNet40.official_sizes), get=get)
        ten = Finding(expected=dict(ModelNet10.official_sizes), get=get)
        layout, own = find_modelnet_itself(self.root), find_modelnet(self.root, "modelnet10")
        if layout is not None:
            forty.where = ten.where = str(layout.folder)
            if layout.name != RELEASED:
                forty.expected["train"] = MODELNET40_TRAIN
                forty.notes.append(layout.name)
            classes: set[int] = set()
            for split in SPLITS:
                labels = self._modelnet_labels(layout, "modelnet40", split, forty)
                forty.found[split] = len(labels)
                ten.found[split] = int(np.isin(labels, MODELNET10_LABELS).sum())
                classes.update(labels.tolist())
            ten.problems = list(forty.problems)
            if classes <= set(MODELNET10_LABELS):  # not the release whose checksums are known
                forty.notes.append(_TEN_CLASSES)
            elif layout.name == RELEASED:
                self.compare_md5("modelnet40", data_files(layout.folder, "*.h5"), forty)
        if own is not None and (layout is None or layout.name == own.name == RESAMPLED):
            ten.where, ten.problems = str(own.folder), []
            ten.notes.append(own.name)
            for split in SPLITS:
                ten.found[split] = len(self._modelnet_labels(own, "modelnet10", split, ten))
        elif layout is None:
            return forty, ten
        gap = ten.expected["train"] - ten.found["train"]
        return forty.settle(), ten.settle(
            complete=0 <= gap <= MODELNET10_TRAIN_GAP and ten.found["test"] == ten.expected["test"]
        )

    def _modelnet_labels(self, layout: Layout, name: str, split: str, finding: Finding) -> np.ndarray:
        """Return the ModelNet40 labels of the readable clouds of one split, in any layout."""
        folder = layout.folder
        if layout.name in (RELEASED, POINT_CLOUD_DATASETS):
            prefix = "ply_data_" if layout.name == RELEASED else "*"
            if name == "modelnet40":
                return self._labeled(folder, split, finding, len(MODELNET40_CLASSES), prefix)
            return np.array(MODELNET10_LABELS)[self._labeled(folder, split, finding, len(MODELNET10_LABELS), prefix)]
        if layout.name == RESAMPLED:
            listed = self.attempt(finding, lambda: resampled_files(folder, name, split))
            files, labels = ([], []) if listed is None else listed
            return self._read_files(files, np.array(labels, dtype=str), finding, read_first_rows, MODELNET40_CLASSES)
        found = find_class_folders(folder)
        listed = self.attempt(finding, lambda: found.files(split)) if found else None
        files, numbers = ([], np.empty(0, int)) if listed is None else listed
        names = np.array(found.class_names if found else (), dtype=str)[numbers]
        return self._read_files(files, names, finding, read_shape, MODELNET40_CLASSES)

    def _read_files(
        self, files: Sequence[Path], names: np.ndarray, finding: Finding, read: Reader, classes: Sequence[str]
    ) -> np.ndarray:
        """Return the labels of existing files; read them all with --full, otherwise an evenly spaced subset."""
        number = {name: i for i, name in enumerate(classes)}
        there = [i for i, file in enumerate(files) if file.is_file() and str(names[i]) in number]
        if gone := [file for file in files if not file.is_file()]:
            finding.problems.append(f"{len(gone):,} of {len(files):,} listed files are missing, {gone[0]} for one")
        chosen = [there[i] for i in self.to_read(len(there), "files", finding)]
        broken = set()
        for i in progress(chosen, text="reading files", unit="files", leave=False):
            if self.attempt(finding, lambda i=i: read(files[i], 64, files[i].name)) is None:
                broken.add(i)
        return np.array([number[str(names[i])] for i in there if i not in broken], dtype=np.int64)

    def own_clouds(self, folder: Path) -> Finding:
        """Check class folders or HDF5 files of the user."""
        finding = Finding(where=str(folder), own=True, use=_FOLDER.format(root=_quoted(folder)))
        if found := find_class_folders(folder):
            for split in SPLITS:
                files, labels = self.attempt(finding, lambda s=split: found.files(s)) or ([], np.empty(0, int))
                names = np.array(found.class_names, dtype=str)[labels]
                finding.found[split] = len(self._read_files(files, names, finding, read_shape, found.class_names))
            finding.notes.append(f"{len(found.class_names)} classes")
            finding.notes.append(f"for pretraining: {_PREPARE_MESHES.format(folder=_quoted(folder))}")
        elif files := own_hdf5_files(folder):
            for split in SPLITS:
                read = [
                    self.attempt(finding, lambda f=file: read_labeled_clouds(f, num_classes=None))
                    for file in files[split]
                ]
                finding.found[split] = sum(len(part[1]) for part in read if part is not None)
        return finding.settle()

    def own_shapes(self) -> Finding:
        """Check meshes and clouds of the user that are neither pairs nor split into training and test set."""
        files = [path for path in data_files(self.root, "**/*") if path.suffix.lower() in SUFFIXES and path.is_file()]
        finding = Finding(where=str(self.root), own=True)
        classes = [folder for folder in data_files(self.root) if folder.is_dir() and len(shape_files(folder)) > 1]
        divide = f"python -m data.prepare_clouds --clouds {_quoted(self.root)} --test_fraction 0.2 --out data/mine"
        if files:
            kind = np.array(["shape"] * len(files))
            finding.found["shapes"] = len(self._read_files(files, kind, finding, read_shape, ("shape",)))
            finding.get = _PREPARE_MESHES.format(folder=_quoted(self.root))
            finding.notes.append("not pairs for pretraining yet")
        if len(classes) > 1:
            finding.found["class folders"] = len(classes)
            finding.notes.append(f"not split into training and test set yet; for --dataset folder: {divide}")
            finding.get = finding.get or divide
        return finding.settle(complete=False)

    def inner_sets(self) -> dict[str, Finding]:
        """Check pairs, labeled clouds and ModelNet in the files and folders of the root, one level down."""
        rows: dict[str, Finding] = {}
        for path in data_files(self.root):
            if path.is_dir() and not (path / DEMO_FOLDER).is_dir():
                rows |= _Checker(path, full=self.full).prepared_sets()
            elif path.name != PACKED_NAME and _is_packed(path):
                rows[f"pairs in {path.name}"] = _as_own(self.packed(path), path)
        return rows

    def prepared_sets(self) -> dict[str, Finding]:
        """Check pairs and labeled clouds directly in the root, such as ``data.prepare_meshes`` writes, and ModelNet."""
        packed = [path for path in data_files(self.root, "*.h5") if _is_packed(path)]
        rows = {f"pairs in {path.parent.name}/{path.name}": _as_own(self.packed(path), path) for path in packed}
        if not packed and has_data_files(self.root / "ShapeNet", "*/*.ply"):
            rows[f"pairs in {self.root.name}"] = _as_own(self.folder_pairs(), self.root)
        if not _HAS_ROWS.match(self.root.name):
            inner = self.root / LABELED_FOLDER
            rows[f"labeled clouds in {self.root.name}"] = self.own_clouds(inner if inner.is_dir() else self.root)
        forty, ten = self.modelnet()
        published = {"ModelNet10": ten} if _TEN_CLASSES in forty.notes else {"ModelNet40": forty, "ModelNet10": ten}
        for name, row in published.items():
            if row.where == str(self.root):  # the folder of a layout, of which the root's own rows tell
                continue
            row.use = _SCORE.format(name=name.lower(), root=_quoted(self.root))
            rows[f"{name} in {self.root.name}"] = row
        return {name: row for name, row in rows.items() if row.state != MISSING}

    def scanobjectnn(self, variant: str) -> Finding:
        """Check one variant of ScanObjectNN."""
        finding = Finding(expected=dict(SCANOBJECTNN_SIZES.get(variant, {})))
        released = variant == "OBJ_BG"  # the only variant in the released archives; the others need a form
        finding.get = self.command("scanobjectnn") if released else _LIST
        for split in ("train", "test"):
            files = [file for file in candidate_files(self.root, split, variant) if file.is_file()]
            if not files:
                continue
            finding.where = str(files[0].parent)
            read = self.attempt(
                finding, lambda f=files[0]: read_labeled_clouds(f, num_classes=len(SCANOBJECTNN_CLASSES))
            )
            finding.found[split] = 0 if read is None else len(read[1])
        if finding.found:
            finding.notes += [f"no {split} file" for split in ("train", "test") if split not in finding.found]
        return finding.settle(complete=None if finding.expected else len(finding.found) == 2)

    def demo_labeled(self, folder: Path) -> Finding:
        """Check the demo set for the linear SVM."""
        finding = Finding(where=str(folder))
        for split in ("train", "test"):
            finding.found[split] = len(self._labeled(folder, split, finding, None))
        return finding.settle()

    # --- segmentation ---

    def parts(self, root: Path) -> Finding:
        """Check ShapeNetPart in any layout, or a part data set with its own tables."""
        finding = Finding(expected=dict(SHAPENETPART_SIZES), get=self.command("shapenetpart"))
        found = find_part_folder(root)
        if found is None:
            return finding
        folder, layout = found
        finding.where = str(folder)
        finding.found = dict.fromkeys(SHAPENETPART_SIZES, 0)
        taxonomy = self.attempt(finding, lambda: read_taxonomy(folder))
        if taxonomy is None:
            return finding.settle()
        if not _is_published(taxonomy):
            finding.own, finding.expected, finding.get = True, {}, ""
            count = len(taxonomy.category_names)
            finding.notes.append(f"{count} categories and {taxonomy.num_parts} parts of the tables in {folder}")
            finding.use = _PARTS.format(root=_quoted(root))
        if layout == "text":
            finding.notes.append("text release")
            self._text_parts(TextRelease(folder, taxonomy), finding)
        else:
            self._hdf5_parts(folder, taxonomy, finding)
        return finding.settle()

    def _hdf5_parts(self, folder: Path, taxonomy: PartTaxonomy, finding: Finding) -> None:
        prefix = file_prefix(folder)
        if prefix == "*":
            finding.notes.append("HDF5 of PointCloudDatasets")
        for split in SHAPENETPART_SIZES:
            files = self.listed_or_found(finding, folder, f"{split}_hdf5_file_list.txt", f"{prefix}{split}*.h5")
            read = [self.attempt(finding, lambda f=file: read_part_file(f, taxonomy)) for file in files]
            finding.found[split] = sum(len(arrays[1]) for arrays in read if arrays is not None)
            if not files:
                finding.notes.append(f"no files of the {split} split")
        if not finding.own and prefix != "*":
            self.compare_md5("shapenetpart", data_files(folder, "*.h5"), finding)

    def _text_parts(self, release: TextRelease, finding: Finding) -> None:
        listed = {s: self.attempt(finding, lambda s=s: release.shapes(s)) or [] for s in SHAPENETPART_SIZES}
        finding.found = {split: len(shapes) for split, shapes in listed.items()}
        shapes = [shape for split in listed.values() for shape in split]
        chosen = self.to_read(len(shapes), "shapes", finding)
        for i in progress(chosen, text="reading parts", unit="shapes", leave=False):
            self.attempt(finding, lambda i=i: release.read(*shapes[i]))

    def s3dis(self, folder: Path, arrays: Mapping[str, tuple[int | None, ...]], **fields: Any) -> Finding:
        """Check S3DIS as blocks of points."""
        finding = Finding(**fields)
        files = self.listed_or_found(finding, folder, FILE_LIST, "*.h5")
        if not files:
            return finding
        finding.where = str(folder)
        rows = [self.attempt(finding, lambda f=file: _check_arrays(f, arrays)) for file in files]
        finding.found["blocks"] = sum(count or 0 for count in rows)
        rooms = folder / ROOM_LIST
        if not rooms.is_file():
            finding.problems.append(f"{rooms} is missing; it names the room of every block, one per line")
        elif None not in rows:
            names = self.attempt(finding, lambda: _read_list(rooms))
            lines = 0 if names is None else len(names)
            if names is not None and lines != finding.found["blocks"]:
                finding.problems.append(f"{rooms} has {lines} lines for {finding.found['blocks']} blocks")
        return finding.settle()

    def compare_md5(self, name: str, files: Sequence[Path], finding: Finding) -> None:
        """With --md5, compare files with the published checksums."""
        if not self.md5:
            return
        for file in progress(files, text=f"MD5 of {name}", unit="files", leave=False):
            expected = KNOWN_MD5[name].get(file.name)
            if expected is not None and (md5 := file_md5(file)) != expected:
                finding.problems.append(f"{file} has MD5 {md5}, the published file has {expected}")

    def all(self) -> dict[str, Finding]:
        """Check every set, in the order of the table."""
        rows: dict[str, Finding] = {}
        if self.root.is_file():
            return _named("pairs, packed", self.packed(self.root))
        is_demo = (self.root / DEMO_FOLDER).is_dir()
        demo = self.root if is_demo else self.root / "demo"
        if not is_demo:
            folder, packed = self.folder_pairs(), self.root / PACKED_NAME
            if packed.is_file():
                rows |= _named("pairs, packed", self.packed(packed))
            if folder.state != MISSING or not packed.is_file():
                rows |= _named("pairs", folder)
        rows["ModelNet40"], rows["ModelNet10"] = self.modelnet()
        for variant in VARIANTS:
            finding = self.scanobjectnn(variant)
            if finding.state != MISSING or variant in ("OBJ_BG", "OBJ_ONLY", "PB_T50_RS"):
                rows[f"ScanObjectNN {variant}"] = finding
        if not is_demo:
            rows |= self.segmentation()
        published_root = self.root.resolve() == _OWN_FOLDER  # data/ of the repository, which must have the demo set
        classes = find_class_folders(self.root)
        # One class alone does not make a labeled set: <root>/scans/train/<class>/* is one in the folder scans.
        has_classes = classes is not None and len(classes.class_names) > 1
        inner = {} if is_demo or has_classes else self.inner_sets()
        if not is_demo and all(row.own or row.state == MISSING for row in rows.values()):
            own = {name: row for name, row in rows.items() if row.own}
            own |= self.labeled_or_loose(pairs_or_parts=bool(own or inner), loose=not published_root) | inner
            rows = rows | own if published_root else own or rows
        else:
            rows |= inner
        if is_demo:
            rows = {name: row for name, row in rows.items() if row.state != MISSING}
        rows |= {name: row for name, row in self.demo(demo).items() if published_root or row.state != MISSING}
        return rows

    def labeled_or_loose(self, *, pairs_or_parts: bool, loose: bool) -> dict[str, Finding]:
        """Check the user's labeled clouds or, if there is nothing else, files that no script reads yet."""
        labeled = self.own_clouds(self.root / LABELED_FOLDER if pairs_or_parts else self.root)
        if labeled.state != MISSING:
            return {"own labeled clouds": labeled}
        shapes = self.own_shapes() if loose and not pairs_or_parts else Finding()
        return {} if shapes.state == MISSING else {"own meshes and clouds": shapes}

    def segmentation(self) -> dict[str, Finding]:
        """Check ShapeNetPart and S3DIS."""
        prepare = PREPARE_COMMAND.format(root=shlex.quote(str(self.root)))
        blocks, rooms = self.root / BLOCK_FOLDER, self.root / ROOM_FOLDER
        parts = self.parts(self.root)
        return {
            "own parts" if parts.own else "ShapeNetPart": parts,
            "S3DIS blocks": self.s3dis(
                blocks, _BLOCK_ARRAYS, expected={"blocks": S3DIS_BLOCKS}, get=self.command("s3dis")
            ),
            "S3DIS whole rooms": self.s3dis(rooms, _ROOM_ARRAYS, get=prepare),
        }

    def demo(self, folder: Path) -> dict[str, Finding]:
        """Check the sets of the demo, which have no published counts."""
        packed, labeled = folder / PACKED_NAME, folder / DEMO_FOLDER
        rows = {
            "demo pairs": self.packed(packed) if packed.is_file() else Finding(),
            "demo labeled": self.demo_labeled(labeled) if labeled.is_dir() else Finding(),
            "demo parts": self.parts(folder),
            "demo rooms, blocks": self.s3dis(folder / BLOCK_FOLDER, _BLOCK_ARRAYS),
            "demo rooms, whole": self.s3dis(folder / ROOM_FOLDER, _ROOM_ARRAYS),
        }
        for row in rows.values():
            row.use = ""
            if row.state != OK:
                row.get = "git checkout -- data/demo"
        return rows


_BLOCK_ARRAYS = {"data": (None, None, CHANNELS), "label": (None, None)}
_ROOM_ARRAYS = {**_BLOCK_ARRAYS, "index": (None, None)}


def _named(kind: str, finding: Finding) -> dict[str, Finding]:
    return {f"{'own' if finding.own else 'ShapeNet'} {kind}": finding}


def _is_packed(path: Path) -> bool:
    """Return whether a file has the mark of packed pairs, of any version."""
    if path.suffix.lower() not in (".h5", ".hdf5") or not path.is_file():
        return False
    try:
        with hdf5_file(path) as file:
            return file.attrs.get("format") == PACKED_FORMAT
    except (DataError, OSError):
        return False


def _as_own(pairs: Finding, root: Path) -> Finding:
    """Take pairs in a place of the user's choice for complete, though some of ShapeNet may be missing."""
    if not pairs.own and pairs.found.get("pairs"):
        pairs.own, pairs.expected, pairs.get, pairs.use = True, {}, "", _PRETRAIN.format(root=_quoted(root))
        pairs.settle()
    return pairs


def _are_own(categories: Iterable[str]) -> bool:
    """Return whether no category is a synset of ShapeNet (00000000: unknown)."""
    return not any(re.fullmatch(r"\d{8}", name) and int(name) for name in categories)


def _is_published(taxonomy: PartTaxonomy) -> bool:
    """Return whether these are the categories and parts of ShapeNetPart."""
    official = official_taxonomy()
    return (taxonomy.category_names, taxonomy.part_counts) == (official.category_names, official.part_counts)


def _quoted(path: Path) -> str:
    return shlex.quote(str(path))


def _check_arrays(path: Path, wanted: Mapping[str, tuple[int | None, ...]]) -> int:
    """Check the arrays of one HDF5 file without reading more than their last rows.

    Args:
        path: the file.
        wanted: array name -> shape, None for any size; a trailing axis of one is allowed.

    Returns:
        The number of rows.

    Raises:
        DataError: the file is missing or damaged, or an array is missing or has another shape.
    """
    if not path.is_file():
        raise DataError(f"{path} is missing, but a list in its folder names it")
    try:
        with hdf5_file(path) as file:
            shapes = {}
            for key, shape in wanted.items():
                array = file.get(key)
                if not isinstance(array, h5py.Dataset):
                    raise DataError(f"{path} has no array '{key}' (it holds {', '.join(file) or 'nothing'})")
                found = array.shape[:-1] if len(array.shape) == len(shape) + 1 and array.shape[-1] == 1 else array.shape
                fits = len(found) == len(shape) and all(s in (None, f) for s, f in zip(shape, found, strict=True))
                if not fits or 0 in found:
                    expected = " x ".join("any" if size is None else str(size) for size in shape)
                    raise DataError(f"{path}: '{key}' has shape {array.shape}, expected {expected}")
                array[-1]
                shapes[key] = found
    except (OSError, RuntimeError) as error:
        raise DataError(f"{path} cannot be read, it may be truncated ({str(error).splitlines()[0]})") from error
    for axis, what in ((0, "rows"), (1, "points")):
        if len({shape[axis] for shape in shapes.values() if len(shape) > axis}) > 1:
            raise DataError(f"{path}: its arrays differ in their number of {what}: {shapes}")
    return shapes["data"][0]


def _read_list(path: Path) -> list[str]:
    try:
        return read_lines(path)
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as a list with one name per line ({error})") from error


def check(data_root: str | Path, *, full: bool = False, md5: bool = False) -> dict[str, Finding]:
    """Check every data set below a root.

    Args:
        data_root: folder of the data sets, or a packed pretraining file.
        full: read every pretraining pair instead of an evenly spaced subset.
        md5: compare with the published checksums.

    Returns:
        Row name -> finding.

    Raises:
        DataError: the root does not exist.
    """
    root = Path(data_root)
    if not root.exists():
        raise DataError(f"{root} does not exist; create and fill it with: bash data/download_data.sh --dir {root} SET")
    return _Checker(root, full=full, md5=md5).all()


def _listed_counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {name}" for name, count in counts.items()) or "-"


def format_table(rows: Mapping[str, Finding]) -> str:
    """Format the findings: the table, then broken files, then the commands that download what is missing."""
    head = ("data set", "state", "found", "published")
    cells = [head] + [
        (name, row.state, _listed_counts(row.found), _listed_counts(row.expected)) for name, row in rows.items()
    ]
    widths = [max(len(line[column]) for line in cells) for column in range(len(head))]
    lines = []
    for number, line in enumerate(cells):
        lines.append("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip())
        if number == 0:
            lines.append("  ".join("-" * width for width in widths))
    notes = [f"  {name}: {'; '.join(row.notes)}" for name, row in rows.items() if row.notes]
    if notes:
        lines += ["", "Notes:", *notes]
    broken = [f"  {problem}" for problem in dict.fromkeys(p for row in rows.values() for p in row.problems)]
    if broken:
        shown = broken[:20] + ([f"  ... and {len(broken) - 20} more (--json lists all)"] if len(broken) > 20 else [])
        lines += ["", "Broken:", *shown]
    lines += _commands("To use your own:", {name: row.use for name, row in rows.items() if row.state != MISSING})
    lines += _commands("To get what is missing:", {name: row.get for name, row in rows.items()})
    return "\n".join(lines)


def _commands(heading: str, by_row: Mapping[str, str]) -> list[str]:
    """Return lines of commands, each with the rows that it belongs to."""
    rows: dict[str, list[str]] = {}
    for name, command in by_row.items():
        if command:
            rows.setdefault(command, []).append(name)
    width = max(map(len, rows), default=0)
    lines = [f"  {command.ljust(width)}  # {', '.join(names)}" for command, names in rows.items()]
    return ["", heading, *lines] if lines else []


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Check the data sets; return the findings as plain types."""
    parser = argparse.ArgumentParser(
        prog="python -m data.check_data", description=__doc__, formatter_class=HelpFormatter
    )
    parser.add_argument("--data_root", default="data", metavar="DIR", help="folder of the data sets, or a packed file")
    parser.add_argument(
        "--full",
        action="store_true",
        help=f"read every cloud and view instead of {SAMPLED_SHAPES} evenly spaced shapes",
    )
    parser.add_argument("--md5", action="store_true", help="compare ModelNet40 and ShapeNetPart with the published MD5")
    parser.add_argument("--json", metavar="FILE", help="also write the findings to FILE as one JSON object")
    args = parser.parse_args(argv)
    rows = check(args.data_root, full=args.full, md5=args.md5)
    print(f"data root: {args.data_root}\n\n{format_table(rows)}")
    report = {
        "data_root": args.data_root,
        "broken": sum(row.state == BROKEN for row in rows.values()),
        "sets": {name: asdict(row) for name, row in rows.items()},
    }
    write_json(args.json, report)
    return report


if __name__ == "__main__":
    run(main, failed=lambda report: report["broken"])
