"""ScanObjectNN (Uy et al., ICCV 2019): objects cut out of indoor scans, 15 classes, 2,048 points each.

The variants of the set differ by many points in accuracy, and files of one name have different meanings, so the variant
is always explicit and ``source`` records the file that was read.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from datasets.hdf5 import CHECK_COMMAND, CloudArrays, ReadClouds, read_hdf5_clouds
from utils.errors import DataError, UserError

GET = f"bash data/download_data.sh scanobjectnn (to see what is present: {CHECK_COMMAND})"
CLASSES = "bag bin box cabinet chair desk display door shelf table bed pillow sink sofa toilet".split()

# Variant -> (folder, suffix of the official file name). With and without background; the PB variants shift the bounding
# box of each object by 25 or 50 % and optionally rotate (R) and scale (S) it.
VARIANTS = {
    "OBJ_BG": ("main_split", ""),
    "OBJ_ONLY": ("main_split_nobg", ""),
    "PB_T25": ("main_split", "_augmented25_norot"),
    "PB_T25_R": ("main_split", "_augmented25rot"),
    "PB_T50_R": ("main_split", "_augmentedrot"),
    "PB_T50_RS": ("main_split", "_augmentedrot_scale75"),
}
_OFFICIAL_SPLIT = {"train": "training", "test": "test"}
_PARENTS = (".", "h5_files", "ScanObjectNN", "ScanObjectNN/h5_files", "scanobjectnn", "scanobjectnn/h5_files")


def resolve_variant(name: str) -> str:
    """Return the variant's full name; ``T25``, ``T25_R``, ``T50_R`` and ``T50_RS`` are short for the PB variants.

    Raises:
        UserError: the variant does not exist.
    """
    full = name.upper()
    for candidate in (full, f"PB_{full}"):
        if candidate in VARIANTS:
            return candidate
    raise UserError(f"ScanObjectNN has no variant {name!r}; it has {', '.join(VARIANTS)}")


def candidate_files(root: str | Path, split: str, variant: str) -> list[Path]:
    """Return the possible files of a split, best first: official names in all known folders, then the released code's.

    CrossPoint and CrossNet distribute OBJ_BG as ``ScanObjectNN/main_split/{train,test}.h5``.
    """
    folder, ending = VARIANTS[variant]
    official = f"{_OFFICIAL_SPLIT[split]}_objectdataset{ending}.h5"
    parents = [Path(root) / parent for parent in _PARENTS]
    # The root may be the split folder itself.
    if Path(root).name == folder:
        parents.append(Path(root).parent)
    files = [parent / folder / official for parent in parents]
    if variant == "OBJ_BG":
        files += [parent / folder / f"{split}.h5" for parent in parents]
    return files


class ScanObjectNN(ReadClouds):
    """One variant of ScanObjectNN; clouds are not normalized, as in the released evaluation.

    Attributes:
        source: the file read.
        variant: the variant's full name.

    Shape:
        each item: points (N, 3) float32, label int in 0..14
    """

    def __init__(self, root: str | Path, split: str, *, variant: str = "OBJ_BG", **options: Any) -> None:
        """Read one split.

        Args:
            root: the data root, ``ScanObjectNN``, ``h5_files`` or the split's folder.
            split: ``"train"`` or ``"test"``.
            variant: a name in ``VARIANTS``.
            options: ``num_points`` and ``transform``, as in :class:`ReadClouds`.

        Raises:
            DataError: the file is missing or not as expected.
            UserError: the variant is unknown, or ``num_points`` is larger than the clouds.
        """
        self.variant = resolve_variant(variant)
        if self.variant == "OBJ_BG":
            self.official_sizes = {"train": 2309, "test": 581}
        super().__init__(root, split, **options)

    def _read(self, root: Path, split: str, num_points: int | None) -> CloudArrays:
        found = [file for file in candidate_files(root, split, self.variant) if file.is_file()]
        if not found:
            folder, ending = VARIANTS[self.variant]
            expected = f"h5_files/{folder}/{_OFFICIAL_SPLIT[split]}_objectdataset{ending}.h5"
            released = f" or ScanObjectNN/{folder}/{split}.h5" if self.variant == "OBJ_BG" else ""
            problem = f"no ScanObjectNN {self.variant} ({split}) in {root}"
            raise DataError(f"{problem}; expected {expected}{released}", fix=f"Get it: {GET}")
        self.source = found[0]
        return read_hdf5_clouds(found[:1], class_names=CLASSES, num_points=num_points, get=GET, layout=self.variant)
