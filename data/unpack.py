"""Unpack a downloaded archive safely and move its files to where the readers expect them.

The member names decide which data set it is, so the archive's file name and origin do not matter:

  python -m data.unpack ~/Downloads/modelnet40.tar.gz
  python -m data.unpack shapenet.tar.gz --data_root /big/disk/data

Everything is unpacked into a staging folder first. An archive with an absolute name, '..', a link or a device, or one
that expands too much, is refused as a whole. Existing files are kept: identical ones are skipped; different content is
an error, and nothing is changed.
"""

from __future__ import annotations

import argparse
import errno
import filecmp
import gzip
import hashlib
import io
import lzma
import os
import re
import shutil
import stat
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # also run by path
from utils.cli import HelpFormatter, run, write_json
from utils.errors import DataError
from utils.files import is_data_name
from utils.locks import locked
from utils.progress import progress

SETS = (
    "shapenet",
    "shapenet_render",
    "modelnet40",
    "modelnet10",
    "scanobjectnn",
    "shapenetpart",
    "s3dis",
    "s3dis_test",
)
STAGING = ".download"  # inside the data root, so that moving into place is a rename

# Published checksums of the HDF5 files, by data set and file name.
KNOWN_MD5 = {
    "modelnet40": {
        "ply_data_train0.h5": "3176385ffc31a7b6b5af22191fd920d1",
        "ply_data_train1.h5": "e3f613fb500559403b34925112754dc4",
        "ply_data_train2.h5": "0c56e233a090ff87c3049d4ce08e7d8b",
        "ply_data_train3.h5": "9d2af465adfa33a3285c369f3ca66c45",
        "ply_data_train4.h5": "dff38de489b2c41bfaeded86c2208984",
        "ply_data_test0.h5": "e9732e6d83b09e79e9a7617df058adee",
        "ply_data_test1.h5": "aba4b12a67c34391cc3c015a6f08ed4b",
    },
    "shapenetpart": {
        "ply_data_train0.h5": "e7152ff588ae6c87eb1156823df05855",
        "ply_data_train1.h5": "b4894a082211418b61b5a707fedb4f56",
        "ply_data_train2.h5": "508eeeee96053b90388520c37df3a8b8",
        "ply_data_train3.h5": "88574c3d5c61d0f3156b9e02cd6cda03",
        "ply_data_train4.h5": "418cb01104740bf1353b792331cb5878",
        "ply_data_train5.h5": "26e65c8827b08f7c340cd03f902e27e8",
        "ply_data_val0.h5": "628b4b3cbc17765de2114d104e51b9c9",
        "ply_data_test0.h5": "fa3fb32b179128ede32c2c948ed83efc",
        "ply_data_test1.h5": "5eb63ae378831c665282c8f22b6c1249",
    },
}

# Without these limits an archive bomb fills the disk. Data sets stay far below: clouds, PNG files and float arrays
# hardly compress more than tenfold.
MAX_BYTES = 200 * 2**30
MAX_RATIO = 100
FREE_ALLOWANCE = 64 * 2**20  # small archives may exceed the ratio up to this size
MAX_MEMBERS = 4_000_000
HEADER_BYTES = 2 * 2**20  # without a limit on headers, one member could exhaust the memory

_SYNSET = re.compile(r"\d{8}")
_SCAN_FOLDER = re.compile(r"(main_split|split[1-4])(_nobg)?")
_POINT_CLOUD_DATASETS = re.compile(r"(modelnet40|modelnet10|shapenetpart)_hdf5_2048")
_RESAMPLED = "modelnet40_normal_resampled"  # the text files of PointNet++
_MESH_SETS = ("ModelNet40", "ModelNet10")  # as published: <class>/<split>/*.off
_HDF5_FOLDERS = {
    "modelnet40": "modelnet40_ply_hdf5_2048",
    "shapenetpart": "shapenet_part_seg_hdf5_data",
    "s3dis": "indoor3d_sem_seg_hdf5_data",
    "s3dis_test": "indoor3d_sem_seg_hdf5_data_test",
}


class _Member(NamedTuple):
    """One archive member: its name as parts, its size in bytes, and its content (None for a folder)."""

    parts: tuple[str, ...]
    size: int
    content: BinaryIO | None


def size_text(count: float) -> str:
    """Format a byte count with decimal units."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def file_md5(path: Path) -> str:
    """Return a file's MD5 checksum in hexadecimal."""
    digest = hashlib.md5(usedforsecurity=False)
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _refused(archive: Path, name: str, why: str) -> DataError:
    return DataError(f"{archive} is refused, nothing was unpacked from it: its member {name!r} {why}")


def _safe_parts(archive: Path, name: str) -> tuple[str, ...]:
    """Split a member's name, refusing one that could lead out of the target folder."""
    if "\0" in name or "\\" in name:
        raise _refused(archive, name, "has a name that is not a plain path")
    if name.startswith("/") or re.match(r"[A-Za-z]:", name):
        raise _refused(archive, name, "has an absolute name")
    parts = tuple(part for part in name.split("/") if part not in ("", "."))
    if ".." in parts:
        raise _refused(archive, name, "leads out of the folder by '..'")
    return parts


class _Metered(io.RawIOBase):
    """A stream that raises when more is read than allowed, so that no header can exhaust the memory."""

    def __init__(self, source: BinaryIO, archive: Path) -> None:
        self._source = source
        self._archive = archive
        self.allowed = HEADER_BYTES

    def read(self, size: int = -1) -> bytes:
        """Read up to ``size`` bytes."""
        block = self._source.read(size)
        self.allowed -= len(block)
        if self.allowed < 0:
            raise DataError(f"{self._archive} is refused: a header in it is larger than {size_text(HEADER_BYTES)}")
        return block


def _tar_members(path: Path) -> Iterator[_Member]:
    """Yield the members of a tar file, gzip-compressed or not, in one pass and without keeping a list of them."""
    with open(path, "rb") as raw:
        packed = raw.read(2) == b"\x1f\x8b"
        raw.seek(0)
        stream = _Metered(gzip.GzipFile(fileobj=raw) if packed else raw, path)
        with tarfile.open(fileobj=stream, mode="r|") as tar:
            while (info := tar.next()) is not None:
                parts = _safe_parts(path, info.name)
                if info.islnk() or info.issym():
                    raise _refused(path, info.name, "is a link")
                plain = info.type in (tarfile.REGTYPE, tarfile.AREGTYPE) and not info.issparse() and info.size >= 0
                if not (plain or info.isdir()):
                    raise _refused(path, info.name, "is not a regular file")
                stream.allowed = info.size + HEADER_BYTES
                yield _Member(parts, info.size, None if info.isdir() else tar.extractfile(info))
                stream.allowed = info.size + HEADER_BYTES  # what was not read is skipped by next()
                tar.members.clear()  # a million members would take a gigabyte
            # Read to the end: gzip then verifies its checksum, and we see whether the listing stopped early.
            while block := tar.fileobj.read(1 << 16):
                if block.strip(b"\0"):
                    raise tarfile.ReadError("data after the end of the member list")


def _zip_members(path: Path) -> Iterator[_Member]:
    """Yield the members of a zip file."""
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            if not info.filename:
                raise _refused(path, info.filename, "has no name")
            parts = _safe_parts(path, info.filename)
            mode = stat.S_IFMT(info.external_attr >> 16)
            if mode not in (0, stat.S_IFREG, stat.S_IFDIR):
                raise _refused(path, info.filename, "is a link" if mode == stat.S_IFLNK else "is not a regular file")
            if info.is_dir():
                yield _Member(parts, 0, None)
                continue
            with archive.open(info) as content:
                yield _Member(parts, info.file_size, content)


@contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    """Convert exceptions of the archive modules, while listing or reading a member, to errors that name the file."""
    try:
        yield
    except FileNotFoundError as error:
        raise DataError(f"{path} is missing") from error
    except (tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, gzip.BadGzipFile, EOFError) as error:
        reason = str(error) or type(error).__name__
        raise DataError(
            f"{path} is truncated or damaged ({reason}); resume the download, or download it again"
        ) from error
    except (NotImplementedError, RuntimeError, ValueError) as error:  # unknown compression, encryption, absurd numbers
        raise DataError(f"{path} cannot be unpacked: {error}") from error


def archive_members(path: Path) -> Iterator[_Member]:
    """Yield the members of a ``.tar``, ``.tar.gz`` or ``.zip`` file, recognized by its content, not its name.

    Raises:
        DataError: the file is missing, damaged or not such an archive, or a member is not safe.
    """
    with _damage_named(path):
        with open(path, "rb") as file:
            start = file.read(512)
        if start.startswith(b"PK"):
            yield from _zip_members(path)
        elif start.startswith(b"\x1f\x8b") or start[257:262] == b"ustar":
            yield from _tar_members(path)
        else:
            hint = " (it looks like a web page: the server refused the download)" if b"<" in start.lstrip()[:1] else ""
            raise DataError(f"{path} is neither a tar.gz nor a zip file{hint}")


def extract(path: Path, folder: Path, *, max_bytes: int = MAX_BYTES) -> int:
    """Unpack an archive into a new folder; on any error the folder is removed.

    Args:
        path: the archive.
        folder: must not exist yet.
        max_bytes: refuse an archive whose content is larger.

    Returns:
        Bytes written.

    Raises:
        DataError: the archive is damaged, unsafe or too large, or the disk is full.
    """
    try:
        limit = min(max_bytes, max(FREE_ALLOWANCE, MAX_RATIO * path.stat().st_size))
    except FileNotFoundError as error:
        raise DataError(f"{path} is missing") from error
    folder.mkdir(parents=True)
    free = shutil.disk_usage(folder).free
    written = 0
    try:
        for number, member in enumerate(progress(archive_members(path), text="unpacking", unit="files")):
            if number >= MAX_MEMBERS:
                raise DataError(f"{path} is refused: it holds more than {MAX_MEMBERS} files")
            if not all(map(is_data_name, member.parts)) or not member.parts:
                continue  # the archive's root, and files that operating systems add
            target = folder.joinpath(*member.parts)
            if member.content is None:
                target.mkdir(parents=True, exist_ok=True)
                continue
            written += member.size
            if written > limit:
                raise DataError(
                    f"{path} is refused: {size_text(path.stat().st_size)} unpack to more than {size_text(limit)}, "
                    "more than any data set here"
                )
            if written > free:
                raise DataError(f"{path} needs more than the {size_text(free)} that are free in {folder.parent}")
            target.parent.mkdir(parents=True, exist_ok=True)
            with open(target, "xb") as file, _damage_named(path):
                shutil.copyfileobj(member.content, file, 1 << 20)
    except BaseException as error:
        shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, (OSError, UnicodeError)):
            full = isinstance(error, OSError) and error.errno == errno.ENOSPC
            reason = "the disk is full" if full else str(error)
            raise DataError(f"{path} cannot be unpacked into {folder.parent}: {reason}") from error
        raise
    return written


def identify_folder(parts: Sequence[str], names: Sequence[str]) -> tuple[str, tuple[str, ...]] | None:
    """Identify the data set that a folder of an archive belongs to.

    Args:
        parts: path of the folder inside the archive, for example ``("data", "ShapeNet", "02691156")``.
        names: names of the files in it.

    Returns:
        The set's name and the folder's path below the data root, or None for a folder that belongs to no set.
    """
    last = parts[-1] if parts else ""
    path = "/".join(parts).lower()
    if len(parts) >= 3 and last == "rendering" and _SYNSET.fullmatch(parts[-3]):
        return "shapenet_render", ("ShapeNetRendering", *parts[-3:])
    if _SYNSET.fullmatch(last) and any(name.endswith(".ply") for name in names):
        return "shapenet", ("ShapeNet", last)
    arrays = [name for name in names if name.endswith(".h5")]
    if _SCAN_FOLDER.fullmatch(last) and arrays:
        return "scanobjectnn", ("ScanObjectNN", last)
    if place := _identify_copy(parts, names, arrays):
        return place
    name = None
    if any(array.startswith("ply_data_all_") for array in arrays):
        name = "s3dis_test" if "_test" in path else "s3dis"
    elif any(array.startswith("ply_data_") for array in arrays):
        # ModelNet40 and ShapeNetPart use the same file names; the small files next to them differ.
        if "modelnet" in path or "shape_names.txt" in names:
            name = "modelnet40"
        elif "part" in path or any(n.endswith("_hdf5_file_list.txt") or n.startswith("ply_data_val") for n in names):
            name = "shapenetpart"
    return (name, (_HDF5_FOLDERS[name],)) if name else None


def _identify_copy(
    parts: Sequence[str], names: Sequence[str], arrays: Sequence[str]
) -> tuple[str, tuple[str, ...]] | None:
    """Identify a folder of an archive that has another than the released layout of ModelNet or ShapeNetPart."""
    last = parts[-1] if parts else ""
    if arrays and (match := _POINT_CLOUD_DATASETS.fullmatch(last)):  # PointCloudDatasets
        return match[1], (last,)
    for i, part in enumerate(parts):
        if part == _RESAMPLED and any(name.endswith(".txt") for name in names):
            return "modelnet40", tuple(parts[i:])
        if part in _MESH_SETS and len(parts) == i + 3 and last in ("train", "test"):
            if any(name.lower().endswith(".off") for name in names):
                return part.lower(), tuple(parts[i:])
    return None


def peek(path: Path) -> str | None:
    """Identify the data set of an archive by its first bytes, truncated anywhere; return None if unclear.

    Raises:
        DataError: the file does not exist.
    """
    folders: dict[tuple[str, ...], list[str]] = {}
    with _damage_named(path):
        path.stat()
    try:
        for member in archive_members(path):
            if member.content is None:
                continue
            *parent, name = member.parts
            folders.setdefault(tuple(parent), []).append(name)
    except DataError:
        pass  # truncated, as expected; an unsafe archive is refused when it is unpacked
    found = {place[0] for parts, names in folders.items() if (place := identify_folder(parts, names))}
    return found.pop() if len(found) == 1 else None


def _check_md5(name: str, folder: Path, files: Sequence[str], archive: Path) -> None:
    """Compare a folder's files with the published checksums."""
    for file in files:
        expected = KNOWN_MD5.get(name, {}).get(file)
        if expected is not None and (found := file_md5(folder / file)) != expected:
            raise DataError(
                f"{file} in {archive} has MD5 {found}, the published {name} file has {expected}; nothing was "
                f"installed. If you mean to use this file: python -m data.unpack {archive} --no_md5"
            )


def _move(source: Path, target: Path) -> None:
    """Move a file, even if the target's folder is on another disk, without ever leaving a partial file."""
    try:
        os.rename(source, target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        temporary = target.with_name(target.name + ".tmp")
        shutil.copyfile(source, temporary)
        os.replace(temporary, target)


def unpack(
    archive: str | Path, data_root: str | Path, *, expect: str | None = None, md5: bool = True
) -> dict[str, Any]:
    """Unpack one archive and move its files to where the readers expect them.

    Args:
        archive: a ``.tar.gz`` or ``.zip`` file.
        data_root: folder of the data sets.
        expect: name of the set it must contain; None accepts any.
        md5: compare with the published checksums, if known.

    Returns:
        ``{"sets": {name: files installed}, "kept": existing identical files, "left_out": files of no known set}``.

    Raises:
        DataError: the archive is damaged, unsafe or of no known set, a checksum differs, or a file with different
            content exists. Nothing is installed then.
        UserError: another process unpacks an archive of this name there.
    """
    archive, data_root = Path(archive), Path(data_root)
    with _damage_named(archive):
        archive.stat()  # now: the lock makes folders
    with locked(data_root / STAGING / archive.name):
        return _unpack(archive, data_root, expect=expect, md5=md5)


def _unpack(archive: Path, data_root: Path, *, expect: str | None, md5: bool) -> dict[str, Any]:
    staging = data_root / STAGING / f"{archive.name}.unpacked"
    try:
        shutil.rmtree(staging, ignore_errors=True)  # left by a run that was killed
        extract(archive, staging)
    except OSError as error:
        raise DataError(f"cannot write in {data_root}: {error.strerror or error}") from error
    try:
        report: dict[str, Any] = {"sets": {}, "kept": 0, "left_out": 0}
        moves: list[tuple[str, Path, tuple[str, ...], list[str]]] = []
        conflicts: list[Path] = []
        for current, folders, names in os.walk(staging):
            folders.sort()
            names.sort()
            folder = Path(current)
            place = identify_folder(folder.relative_to(staging).parts, names)
            if place is None:
                report["left_out"] += len(names)
                continue
            name, target = place
            report["sets"].setdefault(name, 0)
            if md5:
                _check_md5(name, folder, names, archive)
            new = []
            for file in names:
                existing = data_root.joinpath(*target, file)
                if not os.path.lexists(existing):
                    new.append(file)
                elif existing.is_file() and filecmp.cmp(existing, folder / file, shallow=False):
                    report["kept"] += 1
                else:
                    conflicts.append(existing)
            moves.append((name, folder, target, new))
        if not moves or (expect is not None and expect not in report["sets"]):
            names = sorted(entry.name for entry in staging.iterdir())
            top = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
            wanted = f"the data set {expect}" if expect else "one of " + ", ".join(SETS)
            raise DataError(f"{archive} does not hold {wanted}; at its top there is: {top or 'nothing'}")
        if conflicts:
            shown = ", ".join(str(path) for path in conflicts[:3]) + (", ..." if len(conflicts) > 3 else "")
            raise DataError(
                f"{len(conflicts)} files exist already with different content ({shown}); nothing was changed. "
                "Move them away, or choose another folder with --data_root"
            )
        for name, folder, target, names in moves:
            destination = data_root.joinpath(*target)
            destination.mkdir(parents=True, exist_ok=True)
            for file in names:
                _move(folder / file, destination / file)
            report["sets"][name] += len(names)
        return report
    except OSError as error:
        raise DataError(f"cannot install {archive} in {data_root}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Unpack the archives named on the command line; return what was installed."""
    parser = argparse.ArgumentParser(prog="python -m data.unpack", description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("archives", nargs="+", metavar="ARCHIVE", help="a .tar.gz or .zip file")
    parser.add_argument("--data_root", default="data", metavar="DIR", help="folder that holds the data sets")
    expect_help = "stop unless the archive holds this set: " + ", ".join(SETS)
    parser.add_argument("--expect", choices=SETS, metavar="SET", help=expect_help)
    parser.add_argument("--no_md5", action="store_true", help="do not compare with the published checksums")
    parser.add_argument("--peek", action="store_true", help="only print which set it is; the file may be truncated")
    parser.add_argument("--json", metavar="FILE", help="also write the result to FILE as one JSON object")
    args = parser.parse_args(argv)
    results: dict[str, Any] = {}
    for archive in args.archives:
        if args.peek:
            results[archive] = peek(Path(archive))
            print(results[archive] or "unknown")
            continue
        result = results[archive] = unpack(archive, args.data_root, expect=args.expect, md5=not args.no_md5)
        for name, count in result["sets"].items():
            print(f"{name}: {count} files installed in {args.data_root}")
        if result["kept"]:
            print(f"{result['kept']} files existed already with the same content")
        if result["left_out"]:
            print(f"{result['left_out']} files of {archive} belong to no data set and were skipped")
    write_json(args.json, results)
    return results


if __name__ == "__main__":
    run(main)
