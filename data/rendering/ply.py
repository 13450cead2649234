"""Read PLY: meshes and clouds, with colors of vertices or faces or a texture, text or binary."""

from __future__ import annotations

import io
import tempfile

import numpy as np
from plyfile import PlyData, PlyElement, PlyParseError

from data.rendering.obj import MAX_TEXTURE, FileBeside, load_texture
from data.rendering.polygons import triangulate
from data.rendering.shape import Cloud, Material, Mesh, unit_colors
from utils.errors import DataError
from utils.ply_headers import check_sizes, with_plain_header

_COLORS = (("red", "green", "blue"), ("diffuse_red", "diffuse_green", "diffuse_blue"), ("r", "g", "b"))
_UVS = (("s", "t"), ("u", "v"), ("texture_u", "texture_v"))
_FACES = ("vertex_indices", "vertex_index")


def read_ply(data: bytes, where: str, beside: FileBeside) -> Mesh | Cloud:
    """Read the bytes of a PLY file: a mesh if it has faces, else a cloud.

    Raises:
        DataError: the file is not PLY, is truncated, has no vertices, or has a face that refers to a missing vertex.
    """
    ply = _parse(data, where)
    if "vertex" not in ply or not {"x", "y", "z"} <= {p.name for p in ply["vertex"].properties}:
        raise DataError(f"{where} has no vertices with x, y and z; expected a mesh or a cloud")
    vertex = ply["vertex"]
    xyz = np.stack([np.asarray(vertex[axis], np.float64) for axis in "xyz"], 1)  # (v, 3)
    colors = _colors(vertex)
    if "tristrips" in ply:
        raise DataError(f"{where} stores triangle strips, which are not supported; save it with plain faces")
    if "face" not in ply or len(ply["face"]) == 0:
        return Cloud(xyz, colors)
    return _mesh(ply, xyz, colors, where, beside)


def _parse(data: bytes, where: str) -> PlyData:
    if not data.removeprefix(b"\xef\xbb\xbf")[:3].lower() == b"ply":
        raise DataError(f"{where} does not begin with ply; it is damaged or of another format")
    try:
        check_sizes(io.BytesIO(data))
        content = with_plain_header(io.BytesIO(data)).read()
        header = content[: content.find(b"end_header")]
        if b"format ascii" not in header and header.count(b"property list") == 1:
            fast = _read_triangles(content)
            if fast is not None:
                return fast
        return PlyData.read(io.BytesIO(content))
    except MemoryError:
        raise
    except Exception as error:  # plyfile raises many kinds on malformed files
        reason = str(error) or type(error).__name__
        if "early end-of-file" in reason or "promises" in reason:
            what = f"{where} holds less than its header promises ({reason}): it is truncated; get it again"
            raise DataError(what) from error
        raise DataError(f"{where} is not a readable PLY ({reason})") from error


def _read_triangles(content: bytes) -> PlyData | None:
    """Read a binary PLY whose faces are all triangles, as in nearly every mesh, fifty times as fast as in general.

    plyfile needs a real file for that. Return None if there are other polygons or an error.
    """
    with tempfile.TemporaryFile() as file:
        file.write(content)
        file.seek(0)
        try:
            return PlyData.read(file, known_list_len={"face": dict.fromkeys(_FACES, 3)})
        except (PlyParseError, ValueError, OSError):
            return None


def _colors(element: PlyElement) -> np.ndarray | None:
    """Return the colors (n, 3) float32 in [0, 1] of an element's rows, or None."""
    names = {p.name for p in element.properties}
    for triple in _COLORS:
        if set(triple) <= names:
            color = np.stack([np.asarray(element[name]) for name in triple], 1)
            if np.issubdtype(color.dtype, np.integer):  # some programs write bytes as wider integers
                color = color / (255 if color.max(initial=0) <= 255 else 65535)
            return unit_colors(color)
    return None


def _mesh(ply: PlyData, xyz: np.ndarray, colors: np.ndarray | None, where: str, beside: FileBeside) -> Mesh:
    face = ply["face"]
    names = {p.name for p in face.properties}
    chosen = next((name for name in _FACES if name in names), None)
    if chosen is None:
        raise DataError(f"{where} has faces without a list of vertices ({' or '.join(_FACES)})")
    owner, triangles, corners = _split_lists(face[chosen], xyz, where)
    mesh = Mesh.from_triangles(xyz, triangles)
    own = _colors(face)
    if colors is not None:
        mesh.colors = colors[triangles]
    elif own is not None:
        mesh.colors = np.repeat(own[owner][:, None], 3, 1)
    uv = _uvs(ply, owner, triangles, corners)
    texture = next((c.split(None, 1)[1].strip() for c in ply.comments if c.lower().startswith("texturefile ")), None)
    if uv is not None and texture is not None:
        pixels, mesh.notes = load_texture(beside(texture), texture, MAX_TEXTURE)
        mesh.uv = uv
        mesh.materials = [Material("texture", texture=pixels)]
        mesh.colors = None if pixels is not None else mesh.colors
    if mesh.colors is not None or mesh.materials[0].texture is not None:
        mesh.materials[0].color = np.ones(3, np.float32)
    return mesh


def _split_lists(lists: np.ndarray, xyz: np.ndarray, where: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the face (t,) of every triangle, its vertices (t, 3), and its corners (t, 3) within the face."""
    if lists.ndim == 2:
        sizes = np.full(len(lists), lists.shape[1])
    else:
        sizes = np.fromiter((len(row) for row in lists), int, len(lists))
    owner, triangles, places = [], [], []
    for size in np.unique(sizes[sizes > 2]):
        rows = np.flatnonzero(sizes == size)
        index = np.stack(list(lists[rows])) if lists.ndim == 1 else lists[rows]  # (f, size)
        index = index.astype(np.int64)
        if index.min() < 0 or index.max() >= len(xyz):
            wrong = int(index.min() if index.min() < 0 else index.max())
            raise DataError(f"{where}: a face refers to vertex {wrong}, the file has {len(xyz)}; it is damaged")
        face, corners = triangulate(xyz[index])
        owner.append(rows[face])
        triangles.append(np.take_along_axis(index[face], corners, 1))
        places.append(corners)
    if not owner:
        raise DataError(f"{where} has no faces of three or more corners; a surface is needed to draw points from")
    return np.concatenate(owner), np.concatenate(triangles), np.concatenate(places)


def _uvs(ply: PlyData, owner: np.ndarray, triangles: np.ndarray, corners: np.ndarray) -> np.ndarray | None:
    """Return texture coordinates (t, 3, 2): of the vertices, or from MeshLab's list ``texcoord`` of the faces."""
    names = {p.name for p in ply["vertex"].properties}
    for pair in _UVS:
        if set(pair) <= names:
            table = np.stack([np.asarray(ply["vertex"][name], np.float32) for name in pair], 1)
            return table[triangles]
    if "texcoord" not in {p.name for p in ply["face"].properties}:
        return None
    lists = ply["face"]["texcoord"]
    result = np.zeros((*triangles.shape, 2), np.float32)
    for i, (row, places) in enumerate(zip(owner, corners, strict=True)):
        pairs = np.asarray(lists[row], np.float32).reshape(-1, 2)
        if len(pairs) > places.max():
            result[i] = pairs[places]
    return result
