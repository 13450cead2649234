r"""Read damaged and hostile files with every reader, and count the outcomes.

Each case changes one file of a small valid set, in a way that follows from the seed and the case's number alone, and
reads the set. It must end in valid samples (right shapes, finite values, labels in range) or in an error that names the
file. Anything else is a defect: another exception, a wrong sample, an error that does not name the file, a crash of the
process, more than 20 seconds, or memory that a size written in the file asks for. Reading happens in child processes
with limited memory, so that a crash is attributed to its file and the other files are still read.

commands:
  python -m tests.robustness.fuzz --files 10000 --seed 1 --json fuzz.json
  python -m tests.robustness.fuzz --only ply --files 500 --seed 2 --keep defects
  python -m tests.robustness.fuzz --only ply --case 137 --seed 2      # repeat one case, with its traceback
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import multiprocessing
import random
import re
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import warnings
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
import trimesh
from tqdm import tqdm

from datasets.modelnet import DemoShapes, ModelNet10, ModelNet40
from datasets.own_clouds import OwnClouds
from datasets.pack import pack
from datasets.pair_sources import FolderSource
from datasets.s3dis import CHANNELS, CLASS_NAMES, S3DIS, S3DISRooms
from datasets.s3dis_prepare import find_rooms, read_room
from datasets.scanobjectnn import ScanObjectNN
from datasets.shapenet_part import ShapeNetPart, official_taxonomy
from datasets.shapenet_render import ShapeNetRender
from datasets.streams import SampleStreams
from datasets.transforms import RenderAugmentation, RenderPixels
from datasets.untrusted import decode_image, read_ply
from downstream.classification.finetune import Classification
from engine.faults import Stop, data_workers
from engine.load_model import encoder_from_checkpoint, fine_tuned_from_checkpoint
from engine.loop import Meter, train_epoch
from engine.resume import resume, save
from engine.run_folder import RunFolder
from engine.task import Run
from models import build_encoder
from tests.support.checkpoints import save_encoder, save_model
from tests.support.files import write_h5
from tests.support.pairs import MODES, SIZES, cloud, png, write_demo_set, write_pairs, write_ply
from tests.support.segmentation_sets import write_part_text, write_parts, write_raw_room, write_rooms
from tests.support.shape_files import write_class_folders, write_point_cloud_datasets, write_resampled
from tests.support.small_run import arguments, small_runs
from train_crossnet_con import PretrainConfig, Pretraining, build_parser
from utils.cli import HelpFormatter, positive_int, run, write_json
from utils.errors import CheckpointError, DataError, UserError

SECONDS = 20  # for one case; reading a valid set takes milliseconds
GRACE = 40  # for a child that does not even react to its alarm
EXTRA_MEMORY = 4 << 30  # address space of a child beyond what it has when it starts
TOUCHED_MEMORY = 256 << 20  # that one case may use; the sets have some kilobytes
BATCH = 500  # cases of one child
MESSAGE_LENGTH = 1000


# --- changing bytes ---

_INTERESTING = (0, 1, -1, 2, 127, 128, 255, 256, 32767, 65535, 65536, 10**6, 10**9, 2**31 - 1, -(2**31), 2**32 - 1)
_INTERESTING += (2**40, 2**62, 2**63 - 1, -(2**63), 2**64 - 1)
_WORDS = "0 1 -1 2 255 4096 1000000 2147483648 4294967296 99999999999999999999 0.5 1e400 -1e38 nan inf 1_0 0x10"
_NUMBERS = (*(word.encode() for word in _WORDS.split()), b"", b"\xff", b"9" * 5000, b" ", b"\0")


def _span(data: bytearray, rng: random.Random) -> tuple[int, int]:
    """Draw a range of the file, mostly short: anywhere or, as often, in its first kilobyte."""
    start = rng.randrange(min(len(data), rng.choice((1024, len(data)))))
    return start, min(len(data), start + int(2 ** rng.uniform(0, 10)))


def flip_bits(data: bytearray, other: bytes, rng: random.Random) -> None:
    for _ in range(rng.randint(1, 8)):
        data[_span(data, rng)[0]] ^= 1 << rng.randrange(8)


def truncate(data: bytearray, other: bytes, rng: random.Random) -> None:
    del data[rng.randrange(len(data)) :]


def delete_range(data: bytearray, other: bytes, rng: random.Random) -> None:
    start, end = _span(data, rng)
    del data[start:end]


def insert_range(data: bytearray, other: bytes, rng: random.Random) -> None:
    """Insert random bytes, zeros, or a range of the file again."""
    start, end = _span(data, rng)
    new = rng.choice((rng.randbytes(end - start), bytes(end - start), bytes(data[start:end])))
    at = rng.randrange(len(data) + 1)
    data[at:at] = new


def overwrite_range(data: bytearray, other: bytes, rng: random.Random) -> None:
    """Overwrite a range with random bytes or one value."""
    start, end = _span(data, rng)
    data[start:end] = rng.choice((rng.randbytes(end - start), bytes([rng.choice((0, 255, 32))]) * (end - start)))


def set_integer(data: bytearray, other: bytes, rng: random.Random) -> None:
    """Overwrite a possible size with a limit of its type, or with a number slightly off."""
    size, order = rng.choice((1, 2, 4, 8)), rng.choice(("little", "big"))
    start = _span(data, rng)[0]
    value = rng.choice(_INTERESTING)
    if rng.random() < 0.3:
        value = int.from_bytes(data[start : start + size], order) + rng.choice((-1, 1, 8, 256))
    data[start : start + size] = (value % (1 << 8 * size)).to_bytes(size, order)


def swap_ranges(data: bytearray, other: bytes, rng: random.Random) -> None:
    size = rng.choice((1, 4, 8, 64))
    a, b = sorted(_span(data, rng)[0] for _ in range(2))
    first, second = bytes(data[a : a + size]), bytes(data[b : b + size])
    data[b : b + size] = first
    data[a : a + size] = second


def splice(data: bytearray, other: bytes, rng: random.Random) -> None:
    """Replace the rest of the file from some place on with another valid file, of this kind or another."""
    data[rng.randrange(len(data)) :] = other[rng.randrange(len(other) + 1) :]


def set_number_text(data: bytearray, other: bytes, rng: random.Random) -> None:
    found = list(re.finditer(rb"-?\d+(\.\d+)?", data))
    if found:
        place = rng.choice(found[: rng.choice((4, len(found)))])
        data[place.start() : place.end()] = rng.choice(_NUMBERS)


def edit_lines(data: bytearray, other: bytes, rng: random.Random) -> None:
    """Repeat, drop or exchange lines or words of a text, or of the text at the beginning of a file."""
    lines = bytes(data).split(b"\n")
    i, j = (rng.randrange(min(len(lines), 12)) for _ in range(2))
    what = rng.randrange(4)
    if what == 0:
        lines.insert(j, lines[i])
    elif what == 1:
        del lines[i]
    elif what == 2:
        lines[i], lines[j] = lines[j], lines[i]
    else:
        words = lines[i].split(b" ")
        words[rng.randrange(len(words))] = rng.choice(lines[j].split(b" "))
        lines[i] = b" ".join(words)
    data[:] = b"\n".join(lines)


MUTATORS = (flip_bits, truncate, delete_range, insert_range, overwrite_range, set_integer, swap_ranges, splice)
TEXT_MUTATORS = (set_number_text, edit_lines)


def mutate(data: bytes, other: bytes, rng: random.Random) -> tuple[bytes, str]:
    """Change a file in one to three ways; ``other`` is another valid file, for splices.

    Returns:
        The changed file and what was done.
    """
    changed, done = bytearray(data), []
    for _ in range(rng.choice((1, 1, 2, 3))):
        if not changed:
            break
        texts = TEXT_MUTATORS * 3 if b"\n" in changed[:100] else ()
        how = rng.choice(MUTATORS + texts)
        how(changed, other, rng)
        done.append(how.__name__)
    return bytes(changed), "+".join(done)


# --- changes that keep the container whole, so that readers reach the content ---


def edit_hdf5(path: Path, rng: random.Random) -> str:
    """Replace an array or an attribute by another one that HDF5 accepts."""
    with h5py.File(path, "r+") as file:
        names, attributes = list(file), list(file.attrs)
        if attributes and rng.random() < 0.2:
            name = rng.choice(attributes)
            file.attrs[name] = rng.choice((-1, 1e30, "x", np.zeros(5), np.nan, 2**62))
            return f"attribute {name}"
        name = rng.choice(names)
        old = file[name]
        shape, kind = old.shape, old.dtype
        values = old[()] if old.size else np.zeros(0)
        del file[name]
        number = kind.kind in "iuf" and values.size > 0
        what = rng.choice("drop group scalar empty shape type huge void value link text".split())
        if what == "group":
            file.create_group(name)
        elif what == "scalar":
            file[name] = 3
        elif what == "empty":
            file[name] = h5py.Empty("f4")
        elif what == "shape":
            new = list(shape)
            new[rng.randrange(len(new))] = rng.choice((0, 1, 2, 3, 5))
            file[name] = np.resize(values, new) if number else np.zeros(new, "u1")
        elif what == "type":
            file[name] = np.resize(values, shape).astype(rng.choice(("f2", "f8", "c8", "i8", "u8", "?", ">f4", "u1")))
        elif what == "huge":  # a size that the file does not hold
            size = [length * rng.choice((10**4, 10**7, 10**9)) if i == 0 else length for i, length in enumerate(shape)]
            if rng.random() < 0.3:
                size = list(shape[:-1]) + [10**12]
            stored = kind if number else "u1"
            packed = {"chunks": tuple(min(n, 1000) or 1 for n in size)} if rng.random() < 0.7 else {}
            file.create_dataset(name, size, dtype=stored, **packed)
        elif what == "void":
            file[name] = np.zeros(shape or 1, [("a", "f4"), ("b", "i8")])
        elif what == "value" and number:
            wrong = np.array(values)
            bad = rng.choice((-1, 255, 1e9, -0.5, np.nan, np.inf, -1e300, 2**62))
            if kind.kind == "f":
                wrong.flat[rng.randrange(wrong.size)] = bad
            else:
                wrong = np.asarray(values, rng.choice(("i8", "f8")))
                whole = int(np.nan_to_num(bad)) % 2**62
                wrong.flat[rng.randrange(wrong.size)] = bad if wrong.dtype.kind == "f" else whole
            file[name] = wrong
        elif what == "link":
            links = (h5py.SoftLink(f"/{name}"), h5py.SoftLink("/none"), h5py.ExternalLink("/etc/passwd", "/x"))
            file[name] = rng.choice((*links, h5py.ExternalLink(path.name, f"/{rng.choice(names)}")))
        elif what == "text":
            file[name] = ["x"] * (shape[0] if shape else 1)
        return f"array {name}: {what}"


def _chunks(data: bytes) -> list[tuple[bytes, bytes]]:
    chunks, at = [], 8
    while at < len(data):
        size, kind = struct.unpack_from(">I4s", data, at)
        chunks.append((kind, data[at + 8 : at + 8 + size]))
        at += 12 + size
    return chunks


@functools.cache
def _bomb(size: int) -> bytes:
    return zlib.compress(bytes(size), 9)


def edit_png(path: Path, rng: random.Random) -> str:
    """Change chunks of a picture and correct their checksums."""
    chunks = _chunks(path.read_bytes())
    what = rng.choice(("size", "mode", "bomb", "big", "drop", "double", "text bomb", "pixels", "palette"))
    header = list(struct.unpack(">IIBBBBB", chunks[0][1]))
    if what == "size":
        header[rng.randrange(2)] = rng.choice((0, 1, 7, 40, 5000, 30_000, 2**31 - 1, 2**32 - 1))
    elif what == "mode":
        header[rng.choice((2, 3, 4, 5, 6))] = rng.choice((0, 1, 2, 3, 4, 6, 8, 16, 255))
    elif what == "bomb":
        header[:4] = [13_000, 13_000, 1, 0]
        chunks = [chunks[0], (b"IDAT", _bomb(13_000 * 1626)), chunks[-1]]
    elif what == "big":
        header[:4] = [40_000, 40_000, 8, 6]
    elif what == "drop" and len(chunks) > 1:
        del chunks[rng.randrange(1, len(chunks))]
    elif what == "double":
        chunks.insert(rng.randrange(len(chunks)), rng.choice(chunks))
    elif what == "text bomb":
        chunks.insert(1, (rng.choice((b"zTXt", b"iCCP")), b"a\0\0" + _bomb(80 << 20)))
    elif what == "pixels":
        chunks[-2] = (b"IDAT", zlib.compress(rng.randbytes(rng.randrange(1, 3000))))
    elif what == "palette":
        chunks.insert(1, (b"PLTE", rng.randbytes(3 * rng.randrange(100))))
    if chunks and chunks[0][0] == b"IHDR":
        chunks[0] = (b"IHDR", struct.pack(">IIBBBBB", *header))
    body = b"".join(
        struct.pack(">I", len(part)) + kind + part + struct.pack(">I", zlib.crc32(kind + part)) for kind, part in chunks
    )
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    return what


_VALUES = (None, -1, 0, 2, 10**6, 10**9, 10**15, 2.5, float("nan"), True, "x", "\x1b[31m", [], {}, [1, "x"], {"a": 1})


def edit_checkpoint(path: Path, rng: random.Random) -> str:
    """Change one entry of a checkpoint somewhere in its tree."""
    payload = torch.load(path, weights_only=True)
    node: Any = payload
    while True:
        key = rng.choice(list(node)) if isinstance(node, dict) else rng.randrange(len(node))
        child = node[key]
        if not isinstance(child, dict | list) or not child or rng.random() < 0.15:
            break
        node = child
    old = child if isinstance(child, torch.Tensor) else torch.zeros(3)
    broken = old.clone().float()
    broken.reshape(-1)[:1] = rng.choice((float("nan"), float("inf")))
    tensors = (
        *(broken, old.reshape(-1)[:0], old[None], old.double(), old.to(torch.complex64), old.bool(), old.to_sparse()),
        torch.zeros(1).expand(10**12),
        torch.zeros((), device="meta"),
    )
    if rng.random() < 0.2 and len(node) > 1:
        del node[key]
        what = "drop"
    elif rng.random() < 0.2 and isinstance(node, dict):
        node[rng.choice(("surprise", 7, "module.x", "state_dict"))] = child
        what = "add"
    else:
        node[key] = rng.choice(tensors if isinstance(child, torch.Tensor) and rng.random() < 0.7 else _VALUES)
        what = f"set to {type(node[key]).__name__}"
    torch.save(payload, path, _use_new_zipfile_serialization=rng.random() < 0.8)
    return f"{key}: {what}"


# --- the readers and what counts as valid ---


def check(condition: bool, what: str) -> None:
    if not condition:
        raise AssertionError(what)


def check_points(points: Any, columns: int = 3) -> None:
    """Check that points are (N, columns) float32 with N >= 1, finite."""
    points = np.asarray(points)
    check(points.ndim == 2 and points.shape[1] == columns and len(points) > 0, f"points of shape {points.shape}")
    check(points.dtype == np.float32 and bool(np.isfinite(points).all()), f"points {points.dtype} not finite")


def check_labels(labels: Any, count: int, shape: tuple[int, ...]) -> None:
    """Check that labels are int64, of this shape, in 0 .. count - 1."""
    labels = np.asarray(labels)
    check(labels.dtype == np.int64 and labels.shape == shape, f"labels {labels.dtype} {labels.shape}")
    check(labels.size == 0 or bool(0 <= labels.min() and labels.max() < count), "labels out of range")


def read_labeled(dataset: Any) -> None:
    check(len(dataset) > 0, "no items")
    for i in range(len(dataset)):
        points, label = dataset[i]
        check_points(points)
        check_labels(np.int64(label), len(dataset.class_names), ())


def read_pairs(root: Path) -> None:
    """Read every pretraining sample, strictly and with replacements."""
    transform = RenderPixels(16)
    for strict in (False, True):
        dataset = ShapeNetRender(root, transform=transform, strict=strict)
        check(len(dataset) > 0, "no items")
        for i in range(len(dataset)):
            sample = dataset[i]
            check_points(sample["points"])
            check(len(sample["points"]) == dataset.cloud_size, "clouds of different size")
            check_image(sample["pixels"])


def check_image(pixels: torch.Tensor) -> None:
    """Check that pixels are (H, W, 3) uint8 and give a color and a gray picture of the size asked for."""
    check(pixels.dtype == torch.uint8 and 0 < pixels.shape[0] * pixels.shape[1] <= 256, f"{tuple(pixels.shape)}")
    streams = SampleStreams(seed=1, epoch=0, index=torch.zeros(1, dtype=torch.long))
    images = RenderAugmentation(16)(pixels[None], torch.tensor([pixels.shape[:2]]), streams)
    for name, channels in (("rgb", 3), ("gray", 1)):
        image = images[name][0]
        check(image.shape == (channels, 16, 16) and image.dtype == torch.float32, f"{name} {tuple(image.shape)}")
        check(bool(image.isfinite().all()), f"{name} not finite")


def read_png(root: Path) -> None:
    for path in sorted(root.glob("*.png")):
        check_image(RenderPixels(16)(decode_image(path.read_bytes(), str(path))))


def read_parts(root: Path) -> None:
    for split in ("trainval", "test"):
        dataset = ShapeNetPart(root, split, seed=1)
        check(len(dataset) > 0, "no items")
        for i in range(len(dataset)):
            points, category, parts = dataset[i]
            check_points(points)
            check_labels(np.int64(category), len(dataset.taxonomy.category_names), ())
            check_labels(parts, dataset.taxonomy.num_parts, (len(points),))
            check(set(parts.tolist()) <= set(dataset.taxonomy.parts_of(category)), "parts of another category")


def read_blocks(root: Path) -> None:
    dataset = S3DIS(root, [1, 2], in_channels=CHANNELS)
    for i in range(len(dataset)):
        points, labels = dataset[i]
        check_points(points, CHANNELS)
        check_labels(labels, len(CLASS_NAMES), (len(points),))


def read_whole_rooms(root: Path) -> None:
    """Read every block of an area, and its rooms put together."""
    dataset = S3DISRooms(root, 1, in_channels=CHANNELS)
    for i in range(len(dataset)):
        points, labels, index, room = dataset[i]
        check_points(points, CHANNELS)
        check_labels(labels, len(CLASS_NAMES), (len(points),))
        check_labels(index, dataset.room_size(room), (len(points),))
    for room in range(len(dataset.rooms)):
        points, labels = dataset.room_cloud(room)
        check_points(points, 6)
        check_labels(labels, len(CLASS_NAMES), (len(points),))


def read_raw_rooms(root: Path) -> None:
    for name, folder in find_rooms(root, (1,)).items():
        room = read_room(folder, name)
        check_points(room.rgb)
        check(room.xyz.shape == room.rgb.shape and bool(np.isfinite(room.xyz).all()), "xyz")
        check(room.labels.shape == (len(room.xyz),) and room.labels.max() < len(CLASS_NAMES), "labels")


def check_model(model: torch.nn.Module) -> None:
    """Check that weights are finite and of the usual types, and that the encoder works."""
    for name, value in model.state_dict().items():
        check(value.dtype in (torch.float32, torch.int64) and value.device.type == "cpu", f"{name}: {value.dtype}")
        check(bool(value.isfinite().all()), f"{name} not finite")
    encoder = getattr(model, "encoder", model).eval()
    if getattr(encoder, "k", 1) <= 12:  # a larger one is refused when it is used, for it may be right for larger clouds
        features = encoder(torch.rand(1, encoder.in_channels, 12))
        check(features.pooled.shape == (1, encoder.feature_dim), "features")


def read_models(load: Callable[[Path], torch.nn.Module], root: Path) -> None:
    for path in sorted(root.glob("*.pth")):
        check_model(load(path))


read_own_checkpoint = functools.partial(read_models, encoder_from_checkpoint)
read_published = functools.partial(read_models, lambda path: encoder_from_checkpoint(path, model="pointnet_cls"))
read_fine_tuned = functools.partial(read_models, lambda path: fine_tuned_from_checkpoint(path, Classification)[0])


_runs: dict[Path, Run] = {}


def _begun(root: Path) -> Run:
    """Return the run that ``write_run`` began."""
    if root not in _runs:
        args = build_parser().parse_args(arguments(root / "data", root, "--eval_every", "0", "--epochs", "9"))
        _runs[root] = Run(Pretraining(PretrainConfig.from_flags(args)), RunFolder(root / "crossnet", resume="auto"))
    return _runs[root]


def read_run(root: Path) -> None:
    begun = _begun(root)
    begun.config.resume = str(root / "crossnet" / "last.pth")
    resume(begun)
    check_model(begun.task.model.point_encoder)
    progress = begun.progress
    check(all(isinstance(n, int) and n >= 0 for n in (progress.epoch, progress.step, progress.samples)), "progress")


# --- the valid sets ---


def write_clouds(root: Path) -> None:
    """Write clouds of every form: ascii and binary, alone and with other properties and elements."""
    from plyfile import PlyData, PlyElement

    write_ply(root / "ascii.ply", cloud(1, 20), text=True)
    write_ply(root / "binary.ply", cloud(2, 20))
    rows = np.zeros(9, [("nx", "f4"), ("x", "f8"), ("red", "u1"), ("y", "f4"), ("z", "f4")])
    face = np.array([([0, 1, 2], 3)] * 4, [("vertex_indices", "i4", (3,)), ("flags", "u1")])
    elements = [PlyElement.describe(rows, "vertex"), PlyElement.describe(face, "face")]
    PlyData(elements, byte_order=">").write(root / "mesh.ply")
    PlyData(elements[::-1], text=True, comments=["made for a test"]).write(root / "mesh_ascii.ply")


def write_pictures(root: Path) -> None:
    for i, mode in enumerate(MODES):
        (root / f"{i}.png").write_bytes(png(i, mode, SIZES[i % 3]))


def write_packed(root: Path) -> None:
    """Write a packed file as written, and one with points in whole numbers, in another file."""
    write_pairs(root / "loose", 3, points=12)
    source = FolderSource(root / "loose")
    pack(source, root / "pairs.h5", chosen=[0, 1, 2], name="fuzz")
    shutil.copy(root / "pairs.h5", root / "sharded.h5")
    shutil.rmtree(root / "loose")
    with h5py.File(root / "sharded.h5", "r+") as file, h5py.File(root / "shard.h5", "w") as shard:
        points = np.round((file["points"][:] + 20) * 1000).astype("u2")
        del file["points"]
        shard.create_dataset("points", data=points, chunks=(1, 12, 3), compression="gzip", shuffle=True)
        layout = h5py.VirtualLayout(points.shape, "u2")
        layout[:] = h5py.VirtualSource("shard.h5", "points", points.shape)
        file.create_virtual_dataset("points", layout).attrs.update(scale=0.001, offset=-20.0)


def read_packed(root: Path) -> None:
    for name in ("pairs.h5", "sharded.h5"):
        read_pairs(root / name)


def write_modelnet(root: Path) -> None:
    """Write ModelNet40's layout, plain and compressed, and the demo set's."""
    folder = root / "modelnet40_ply_hdf5_2048"
    folder.mkdir()
    for i in range(2):
        with h5py.File(folder / f"ply_data_train{i}.h5", "w") as file:
            kept = {"chunks": True, "compression": "gzip", "shuffle": True} if i else {}
            file.create_dataset("data", data=np.stack([cloud(j, 12) for j in range(6)]), **kept)
            file.create_dataset("label", data=np.arange(6, dtype="u1")[:, None] * 7, **kept)
    (folder / "train_files.txt").write_text("".join(f"data/{folder.name}/ply_data_train{i}.h5\n" for i in range(2)))
    write_demo_set(root, points=12, train=2, test=1)


def read_modelnet(root: Path) -> None:
    read_labeled(ModelNet40(root, "train"))
    read_labeled(DemoShapes(root, "train"))


def write_scans(root: Path) -> None:
    """Write ScanObjectNN's OBJ_BG in its newest and oldest HDF5 form."""
    folder = root / "h5_files" / "main_split"
    folder.mkdir(parents=True)
    for name, version in (("training", "earliest"), ("test", "latest")):
        with h5py.File(folder / f"{name}_objectdataset.h5", "w", libver=version) as file:
            file["data"] = np.stack([cloud(j, 12) for j in range(5)])
            file["label"] = np.arange(5, dtype="i4") * 3
            file["mask"] = np.zeros((5, 12), "i4")


def read_scans(root: Path) -> None:
    for split in ("train", "test"):
        read_labeled(ScanObjectNN(root, split))


def write_text(root: Path) -> None:
    """Write ShapeNetPart's text release, both forms."""
    synsets = official_taxonomy().synsets
    shapes = {split: [(synsets[i], "abc"[i])] for i, split in enumerate(("train", "val", "test"))}
    write_part_text(root / "shapenetcore_partanno_segmentation_benchmark_v0", shapes, normals="a", size=15)


def write_blocks(root: Path) -> None:
    """Write training blocks of two areas, one file compressed and with many blocks to a chunk."""
    write_rooms(root, ["Area_1_office_1", "Area_2_hall_1"], points=8, whole=False)
    folder = root / "indoor3d_sem_seg_hdf5_data"
    with h5py.File(folder / "ply_data_all_0.h5", "r") as old, h5py.File(folder / "ply_data_all_1.h5", "w") as file:
        for name in old:
            twice = np.concatenate([old[name][:]] * 2)
            file.create_dataset(name, data=twice, chunks=(8, *twice.shape[1:]), compression="gzip")
    with open(folder / "all_files.txt", "a") as lists, open(folder / "room_filelist.txt", "a") as rooms:
        lists.write(f"{folder.name}/ply_data_all_1.h5\n")
        rooms.write("Area_1_office_1\n" * 4 + "Area_2_hall_1\n" * 4)


def write_whole_rooms(root: Path) -> None:
    write_rooms(root, ["Area_1_office_1", "Area_1_hall_2"], points=8)


def write_raw_rooms(root: Path) -> None:
    for room in ("office_1", "hall_2"):
        write_raw_room(root, 1, room, points=24, seed=len(room), objects=("chair_1", "floor_1"))


def write_own_checkpoint(root: Path) -> None:
    for name, kwargs in (("pointnet_cls", {"emb_dims": 8}), ("dgcnn_cls", {"k": 3, "emb_dims": 8})):
        save_encoder(root / f"{name}.pth", build_encoder(name, **kwargs))


def write_published(root: Path) -> None:
    """Write bare weights, as zip and in PyTorch's older form."""
    state = build_encoder("pointnet_cls", emb_dims=8).state_dict()
    torch.save({"state_dict": {f"module.{name}": value for name, value in state.items()}}, root / "zip.pth")
    torch.save(state, root / "older.pth", _use_new_zipfile_serialization=False)


def write_fine_tuned(root: Path) -> None:
    model = Classification(build_encoder("pointnet_cls", emb_dims=8), num_classes=3)
    save_model(root / "best.pth", model, class_names=["a", "b", "c"])


def write_run(root: Path) -> None:
    """Write a run's checkpoint after one step."""
    write_pairs(root / "data", 4, points=24)
    begun = _begun(root)
    with data_workers(begun.task) as loader:
        train_epoch(begun, loader, Meter(begun), Stop())
    save(begun, "last.pth")


@dataclass(frozen=True)
class Target:
    """A reader.

    Attributes:
        write: writes a valid set into an empty folder.
        read: reads all of it; raises AssertionError at a sample that is not as promised.
        files: pattern of the files that are changed.
        edit: changes one file's content without damaging its container.
    """

    write: Callable[[Path], None]
    read: Callable[[Path], None]
    files: str = "**/*"
    edit: Callable[[Path, random.Random], str] | None = None


def write_own_clouds(root: Path) -> None:
    """Write class folders of clouds and meshes in every format, and a compressed PCD and a binary mesh."""
    write_class_folders(root, train=3, test=2)
    box = trimesh.creation.box((1, 2, 3))
    for suffix in ("stl", "glb", "obj", "ply"):
        box.export(root / "train" / "rod" / f"box.{suffix}")
    points = cloud(7, 20)
    header = b"VERSION .7\nFIELDS x y z\nSIZE 4 4 4\nTYPE F F F\nCOUNT 1 1 1\nWIDTH 20\nHEIGHT 1\nPOINTS 20\nDATA "
    (root / "train" / "egg" / "b.pcd").write_bytes(header + b"binary\n" + points.tobytes())
    # LZF that stores runs of at most 32 bytes as they are.
    plain = points.T.tobytes()
    runs = [plain[i : i + 32] for i in range(0, len(plain), 32)]
    packed = b"".join(bytes([len(run) - 1]) + run for run in runs)
    sizes = struct.pack("<II", len(packed), len(plain))
    (root / "train" / "egg" / "c.pcd").write_bytes(header + b"binary_compressed\n" + sizes + packed)


def write_lists(root: Path) -> None:
    """Write ModelNet's text files, whose lists have a byte-order mark or are UTF-16."""
    folder = write_resampled(root, points=12)
    for split, encoding in (("train", "utf-8-sig"), ("test", "utf-16")):
        index = folder / f"modelnet40_{split}.txt"
        index.write_bytes(index.read_text().replace("\n", "\r\n").encode(encoding))


def read_lists(root: Path) -> None:
    for kind in (ModelNet40, ModelNet10):
        for split in ("train", "test"):
            read_labeled(kind(root, split, num_points=8))


def read_class_folders(root: Path) -> None:
    for split in ("train", "test"):
        read_labeled(OwnClouds(root, split, num_points=16))


def write_other_hdf5(root: Path) -> None:
    """Write ModelNet40 and ShapeNetPart as PointCloudDatasets has them."""
    write_point_cloud_datasets(root, points=12)
    for split in ("train", "test"):
        arrays = {"label": np.array([[0], [1], [15]], "u1"), "seg": np.arange(36).reshape(3, 12) % 2}
        path = root / "shapenetpart_hdf5_2048" / f"{split}0.h5"
        write_h5(path, data=np.stack([cloud(j, 12) for j in range(3)]), **arrays)


def read_other_hdf5(root: Path) -> None:
    read_labeled(ModelNet40(root, "train"))
    read_parts(root)


def read_clouds(root: Path) -> None:
    for path in sorted(root.glob("*.ply")):
        check_points(read_ply(path))


TARGETS = {
    "ply": Target(write_clouds, read_clouds),
    "png": Target(write_pictures, read_png, edit=edit_png),
    "pairs": Target(lambda root: write_pairs(root, 2, points=12) and None, read_pairs, "ShapeNet*/**/*"),
    "packed": Target(write_packed, read_packed, edit=edit_hdf5),
    "modelnet": Target(write_modelnet, read_modelnet, "**/*train*", edit=edit_hdf5),
    "modelnet_text": Target(write_lists, read_lists),
    "own_clouds": Target(write_own_clouds, read_class_folders),
    "other_hdf5": Target(write_other_hdf5, read_other_hdf5, edit=edit_hdf5),
    "scanobjectnn": Target(write_scans, read_scans, edit=edit_hdf5),
    "parts_hdf5": Target(lambda root: write_parts(root, points=12) and None, read_parts, edit=edit_hdf5),
    "parts_text": Target(write_text, read_parts),
    "s3dis_blocks": Target(write_blocks, read_blocks, "*/*", edit=edit_hdf5),
    "s3dis_rooms": Target(write_whole_rooms, read_whole_rooms, "*_test/*", edit=edit_hdf5),
    "s3dis_raw": Target(write_raw_rooms, read_raw_rooms),
    "checkpoint": Target(write_own_checkpoint, read_own_checkpoint, edit=edit_checkpoint),
    "published": Target(write_published, read_published, edit=edit_checkpoint),
    "fine_tuned": Target(write_fine_tuned, read_fine_tuned, edit=edit_checkpoint),
    "run": Target(write_run, read_run, "crossnet/last.pth", edit=edit_checkpoint),
}


# --- one case ---


class TimeoutReached(BaseException):
    """Not a subclass of Exception, so that no reader mistakes it for damage."""


@dataclass
class Outcome:
    """Outcome of a case: ``valid``, ``refused``, or a kind of defect with details."""

    target: str
    case: int
    kind: str
    how: str = ""
    text: str = ""


@dataclass
class Copy:
    """A valid set on disk, one file of which is changed for each case and put back after it."""

    name: str
    target: Target
    root: Path
    files: list[Path] = field(default_factory=list)

    def prepare(self) -> None:
        """Write the set and check that it is valid."""
        self.root.mkdir(parents=True)
        self.target.write(self.root)
        self.files = sorted(path for path in self.root.glob(self.target.files) if path.is_file())
        self.target.read(self.root)

    def change(self, case: int, seed: int) -> tuple[Path, bytes, str]:
        """Change a file; return its path, its valid content and what was done."""
        rng = random.Random(f"{seed} {self.name} {case}")
        path = rng.choice(self.files)
        valid = path.read_bytes()
        how = ""
        if self.target.edit and path.suffix in (".h5", ".png", ".pth") and rng.random() < 0.4:
            try:
                how = self.target.edit(path, rng)
            except Exception:  # the library refuses to write what the edit asks for
                path.write_bytes(valid)
        if not how or rng.random() < 0.05:
            changed, done = mutate(path.read_bytes(), rng.choice(self.files).read_bytes(), rng)
            path.write_bytes(changed)
            how = f"{how}, {done}" if how else done
        return path, valid, f"{path.relative_to(self.root)}: {how}"


def memory_peak(*, reset: bool = False) -> int:
    """Return the peak bytes of memory of this process since the last reset."""
    if reset:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) << 10


def _judge(copy: Copy, path: Path) -> tuple[str, str]:
    """Read a changed set; return the kind of outcome and its details."""
    before = memory_peak(reset=True)
    kind, text = "valid", ""
    try:
        copy.target.read(copy.root)
    except (DataError, CheckpointError) as error:
        kind, text = "refused", str(error)
        # Tables of a set name other files; what they lead to is named by its own path.
        listing = path.suffix in (".txt", ".json")
        named = str(copy.root) in text and (listing or path.name in text)
        if not named:
            kind = "unnamed"
        elif len(text) > MESSAGE_LENGTH or not text.isprintable():
            kind = "unreadable message"
        while error is not None:
            if isinstance(error, MemoryError):
                kind = "memory"
            error = error.__cause__ or error.__context__
    except AssertionError as error:
        kind, text = "wrong sample", str(error)
    except TimeoutReached:
        kind = "hang"
    except Exception as error:
        kind, text = type(error).__name__, str(error)
    if memory_peak() - before > TOUCHED_MEMORY:
        kind, text = "memory", f"{(memory_peak() - before) >> 20} MB; {kind} {text}"
    return kind, text


def _child(channel: Any, copy: Copy, cases: list[int], seed: int, keep: Path | None) -> None:
    """Read the cases of one child; report which one begins, and its outcome."""

    def stop(*_: object) -> None:
        raise TimeoutReached

    warnings.simplefilter("ignore")
    signal.signal(signal.SIGALRM, stop)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + EXTRA_MEMORY, -1))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    gc.collect()
    gc.freeze()
    for case in cases:
        gc.collect()  # a reader that failed may hold a file: HDF5 would take what it has read of it for the changed one
        path, valid, how = copy.change(case, seed)
        channel.send((case, how))
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        try:
            kind, text = _judge(copy, path)
        except TimeoutReached:  # between the reader's end and the line below
            kind, text = "hang", ""
        signal.setitimer(signal.ITIMER_REAL, 0)
        if keep and kind not in ("valid", "refused"):
            shutil.copy(path, keep / f"{copy.name}_{case}_{path.name}")
        path.write_bytes(valid)
        channel.send((case, kind, text))
    channel.close()


def fuzz(
    name: str, target: Target, cases: range, *, seed: int, folder: Path, keep: Path | None = None, shown: Any = None
) -> list[Outcome]:
    """Read mutated files with one reader, in child processes.

    Args:
        name: of the reader.
        target: the reader.
        cases: numbers of the cases; with the seed they decide everything.
        seed: of the mutations.
        folder: scratch space.
        keep: where to put files that showed a defect.
        shown: a progress bar.

    Returns:
        An outcome for every case.
    """
    context = multiprocessing.get_context("fork")
    outcomes: list[Outcome] = []
    left, attempt = list(cases), 0
    while left:
        # A set for every child: what one leaves after a crash must not matter to the next.
        copy = Copy(name, target, folder / f"{name}_{attempt}")
        attempt += 1
        copy.prepare()
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_child, args=(theirs, copy, left[:BATCH], seed, keep))
        process.start()
        theirs.close()
        how = ""
        while left and process:
            try:
                message = ours.recv() if ours.poll(SECONDS + GRACE) else None
            except EOFError:
                message = ()
            if message is None:
                process.kill()
            process.join(0 if message else None)
            if not message:
                if message is None or process.exitcode:
                    kind = "hang" if message is None else f"crash ({process.exitcode})"
                    outcomes.append(Outcome(name, left.pop(0), kind, how))
                    if shown:
                        shown.update()
                break
            if len(message) == 2:
                how = message[1]
                continue
            outcomes.append(Outcome(name, left.pop(0), message[1], how, message[2]))
            if shown:
                shown.update()
        ours.close()
        process.join()
        shutil.rmtree(copy.root)
    return outcomes


def repeat(name: str, case: int, seed: int) -> None:
    """Run one case in this process and let its error through."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Copy(name, TARGETS[name], Path(folder) / name)
        copy.prepare()
        print(copy.change(case, seed)[2])
        copy.target.read(copy.root)
        print("valid")


def table(outcomes: list[Outcome]) -> str:
    """Format the counts by reader as text."""
    lines = [f"{'reader':<14}{'files':>8}{'valid':>8}{'refused':>9}{'defects':>9}"]
    names = list(dict.fromkeys(outcome.target for outcome in outcomes))
    for name in (*names, "all"):
        kinds = Counter(outcome.kind for outcome in outcomes if name in (outcome.target, "all"))
        files, valid, refused = kinds.total(), kinds["valid"], kinds["refused"]
        lines.append(f"{name:<14}{files:>8}{valid:>8}{refused:>9}{files - valid - refused:>9}")
    return "\n".join(lines)


def defects(outcomes: list[Outcome]) -> list[Outcome]:
    return [outcome for outcome in outcomes if outcome.kind not in ("valid", "refused")]


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Fuzz the readers; return the counts."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.robustness.fuzz", description=__doc__, formatter_class=HelpFormatter
    )
    parser.add_argument(
        "--files", type=positive_int, default=10_000, metavar="N", help="mutated files, over all readers"
    )
    parser.add_argument("--seed", type=int, default=1, metavar="S", help="of the mutations")
    parser.add_argument("--only", nargs="+", choices=list(TARGETS), default=list(TARGETS), help="these readers only")
    parser.add_argument("--case", type=int, metavar="C", help="repeat this case of the reader, here")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="put files that show a defect here")
    parser.add_argument("--json", metavar="FILE", help="also write the counts to FILE as one JSON object")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    with small_runs():
        if args.case is None:
            return fuzz_all(args)
        for name in args.only:
            repeat(name, args.case, args.seed)
    return {}


def fuzz_all(args: argparse.Namespace) -> dict[str, Any]:
    """Fuzz the readers that the flags name, print the table and write the counts.

    Raises:
        UserError: a file showed a defect.
    """
    if args.keep:
        args.keep.mkdir(parents=True, exist_ok=True)
    outcomes: list[Outcome] = []
    begun = time.perf_counter()
    share, more = divmod(args.files, len(args.only))
    with tempfile.TemporaryDirectory() as folder, tqdm(total=args.files, disable=not sys.stderr.isatty()) as bar:
        for i, name in enumerate(args.only):
            cases = range(share + (i < more))
            found = fuzz(name, TARGETS[name], cases, seed=args.seed, folder=Path(folder), keep=args.keep, shown=bar)
            for outcome in defects(found):
                print(
                    f"{name} --case {outcome.case}: {outcome.kind}; {outcome.how}; {outcome.text[:200]!r}", flush=True
                )
            outcomes += found
    print(table(outcomes))
    kinds = Counter(outcome.kind for outcome in outcomes)
    result = {
        "files": len(outcomes),
        "seed": args.seed,
        "valid": kinds["valid"],
        "refused": kinds["refused"],
        "defects": len(defects(outcomes)),
        "seconds": round(time.perf_counter() - begun),
        "readers": {
            name: dict(Counter(outcome.kind for outcome in outcomes if outcome.target == name)) for name in args.only
        },
    }
    write_json(args.json, result)
    if result["defects"]:
        raise UserError(f"{result['defects']} of {result['files']} files showed a defect")
    return result


if __name__ == "__main__":
    run(main)
