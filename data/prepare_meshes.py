"""Turn a folder of your own meshes into point clouds in the layout that pretraining reads.

Reads OFF, OBJ, PLY, GLB, GLTF and STL files below --meshes and writes <out>/ShapeNet/<category>/<id>.ply: points drawn
evenly by area from the surface, centred, in the unit sphere. The category is the first folder below --meshes
(00000000 for files that lie directly in it), the id is the rest of the path joined by '-'. Meshes that cannot be used
are named, counted and left out. A run that was stopped continues: clouds that are there already are kept.

Pretraining also needs pictures of each object, from any renderer and any number of views:
<out>/ShapeNetRendering/<category>/<id>/rendering/00.png, 01.png, ...

Example:
  python -m data.prepare_meshes --meshes ~/models --out data/mine --num_points 2048
  python -m data.check_data --data_root data/mine
"""

from __future__ import annotations

import argparse
import os
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import trimesh
from plyfile import PlyData, PlyElement
from tqdm import tqdm

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from datasets.untrusted import read_ply
from utils.cli import HelpFormatter, positive_int, run, write_json
from utils.errors import DataError, UserError

SUFFIXES = (".off", ".obj", ".ply", ".glb", ".gltf", ".stl")
NO_CATEGORY = "00000000"


def to_unit_sphere(points: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """Centre (N, 3) on the mean and scale the largest radius to 1; returns points, centre and radius."""
    center = points.mean(0)
    radius = float(np.linalg.norm(points - center, axis=1).max())
    return (points - center) / radius, center, radius


def find_meshes(folder: Path) -> dict[str, Path]:
    """Mesh files below a folder, by ``<category>/<id>``, sorted.

    Raises:
        DataError: there is no such folder, no mesh in it, or two files would get the same name.
    """
    if not folder.is_dir():
        raise DataError(f"{folder} is no folder; --meshes names the one with the mesh files")
    found: dict[str, Path] = {}
    for path in sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file()):
        *parents, _ = path.relative_to(folder).parts
        category = parents[0] if parents else NO_CATEGORY
        name = f"{category}/{'-'.join([*parents[1:], path.stem])}"
        if name in found:
            raise DataError(f"{found[name]} and {path} would both become {name}.ply; rename one")
        found[name] = path
    if not found:
        raise DataError(f"no mesh below {folder}; expected files ending in {', '.join(SUFFIXES)}")
    return found


def load_mesh(path: Path) -> trimesh.Trimesh:
    """Read a mesh; the parts of a scene are joined where they stand.

    Raises:
        DataError: the file cannot be read, has no faces or no area, or has coordinates that are not finite.
    """
    try:
        mesh = trimesh.load(path, force="mesh", process=False, skip_materials=True)
    except Exception as error:  # its many readers raise many kinds
        raise DataError(f"{path} is no readable mesh ({error or type(error).__name__})") from error
    faces = getattr(mesh, "faces", None)
    if faces is None or len(faces) == 0:
        raise DataError(f"{path} has no faces; a surface is needed to draw points from")
    if not np.isfinite(mesh.vertices[np.unique(faces)]).all():
        raise DataError(f"{path} has coordinates that are not finite")
    if not 0 < mesh.area < np.inf:
        raise DataError(f"{path} has no usable surface area")
    return mesh


def sample_cloud(mesh: trimesh.Trimesh, num_points: int, *, seed: int, up: str = "y") -> np.ndarray:
    """Draw points evenly by area, centre them and scale them to the unit sphere.

    Args:
        mesh: with faces of positive area.
        num_points: N.
        seed: the same seed draws the same points.
        up: axis of the mesh that points up, ``y`` or ``z``; clouds have y up.

    Returns:
        (N, 3) float32.
    """
    points, _ = trimesh.sample.sample_surface(mesh, num_points, seed=seed)
    points = np.asarray(points, dtype=np.float64)
    if up == "z":
        points = points[:, [0, 2, 1]] * [1, 1, -1]
    return to_unit_sphere(points)[0].astype(np.float32)


def write_ply(path: Path, points: np.ndarray) -> None:
    """Write (N, 3) float32 as binary little-endian PLY, in one step.

    Raises:
        UserError: the file cannot be written.
    """
    vertex = np.empty(len(points), dtype=[("x", "<f4"), ("y", "<f4"), ("z", "<f4")])
    for axis, name in enumerate("xyz"):
        vertex[name] = points[:, axis]
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        PlyData([PlyElement.describe(vertex, "vertex")], byte_order="<").write(temporary)
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Convert a folder of meshes; return counts and the meshes left out."""
    parser = argparse.ArgumentParser(
        prog="python -m data.prepare_meshes", description=__doc__, formatter_class=HelpFormatter
    )
    parser.add_argument("--meshes", required=True, metavar="DIR", help="folder with mesh files, best one per category")
    parser.add_argument("--out", required=True, metavar="DIR", help="data root to write; clouds go to DIR/ShapeNet")
    parser.add_argument("--num_points", type=positive_int, default=2048, metavar="N", help="points of a cloud")
    parser.add_argument("--up", choices=("y", "z"), default="y", help="axis of the meshes that points up")
    parser.add_argument("--seed", type=int, default=1, metavar="S", help="seed of the points")
    parser.add_argument("--overwrite", action="store_true", help="make clouds again that are there already")
    parser.add_argument("--json", metavar="FILE", help="also write the counts to FILE as one JSON object")
    args = parser.parse_args(argv)
    meshes = find_meshes(Path(args.meshes))
    report: dict[str, Any] = {"written": 0, "kept": 0, "skipped": []}
    for name, path in tqdm(meshes.items(), desc="sampling", unit="mesh", disable=not sys.stderr.isatty()):
        target = Path(args.out) / "ShapeNet" / f"{name}.ply"
        if target.exists() and not args.overwrite:
            if (found := len(read_ply(target))) != args.num_points:
                raise UserError(f"{target} has {found} points, not {args.num_points}; --overwrite makes it again")
            report["kept"] += 1
            continue
        try:
            # Seeded by name, so that a cloud does not depend on which other meshes there are.
            seed = zlib.crc32(f"{args.seed}/{name}".encode())
            cloud = sample_cloud(load_mesh(path), args.num_points, seed=seed, up=args.up)
        except DataError as error:
            report["skipped"].append(str(error))
            continue
        write_ply(target, cloud)
        report["written"] += 1
    for message in report["skipped"]:
        print(f"left out: {message}")
    if report["written"] + report["kept"] == 0:
        raise DataError(f"none of the {len(meshes)} meshes in {args.meshes} could be used")
    print(
        f"{args.out}/ShapeNet: {report['written']} clouds of {args.num_points} points written, {report['kept']} kept, "
        f"{len(report['skipped'])} meshes left out"
    )
    write_json(args.json, report)
    return report


if __name__ == "__main__":
    run(main)
