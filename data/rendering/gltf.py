"""Read GLB, GLTF and STL with trimesh, and raise named errors for what trimesh would silently ignore."""

from __future__ import annotations

import importlib.util
import io
import json
import struct
from dataclasses import dataclass
from typing import Any

import numpy as np

from data.rendering.obj import FileBeside, texture_array
from data.rendering.shape import Material, Mesh, concatenate
from utils.errors import DataError, malformed

# Extensions that a file may require: they are read, or do not affect the result.
_KNOWN = {
    "KHR_draco_mesh_compression",
    "KHR_materials_pbrSpecularGlossiness",
    "KHR_materials_unlit",
    "EXT_texture_webp",
    "KHR_lights_punctual",
    "KHR_materials_ior",
    "KHR_materials_specular",
    "KHR_materials_transmission",
    "KHR_materials_emissive_strength",
    "KHR_materials_clearcoat",
    "KHR_materials_sheen",
    "KHR_materials_volume",
    "KHR_materials_variants",
    "KHR_texture_transform",
}
_GLB_HEADER = struct.Struct("<4sII")
_GLB_CHUNK = struct.Struct("<I4s")
_FANS = 6


def to_srgb(linear: np.ndarray) -> np.ndarray:
    """Encode linear light in [0, 1] as sRGB (IEC 61966-2-1)."""
    linear = np.clip(linear, 0, 1)
    return np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def to_linear(srgb: np.ndarray) -> np.ndarray:
    """Decode sRGB in [0, 1] to linear light (IEC 61966-2-1)."""
    srgb = np.clip(srgb, 0, 1)
    return np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)


# ------------------------------------------------------------------------------------------------------------- glTF


def read_gltf(data: bytes, where: str, beside: FileBeside, *, binary: bool) -> Mesh:
    """Read the bytes of a GLB (``binary``) or GLTF file: all nodes of the scene, instances included, in place.

    Raises:
        DataError: the file is damaged or truncated, has a compression that cannot be decoded, or has no triangles.
    """
    header = _glb_header(data, where) if binary else _json(data, where)
    with malformed(f"{where} is not a readable glTF"):
        _check_extensions(header, where)
        transforms = _texture_transforms(header)
        if transforms:
            data = _with_numbered_materials(data, header, binary=binary)
    scene = _load_scene(data, where, beside, "glb" if binary else "gltf")
    materials: dict[int, Material] = {}
    parts = []
    for node in scene.graph.nodes_geometry:
        matrix, name = scene.graph[node]
        geometry = scene.geometry[name]
        if len(getattr(geometry, "faces", ())):
            part = _part(geometry, materials, where)
            if (transform := transforms.get(part.materials[0].name)) is not None:
                part.uv = transform(part.uv)
            parts.append(part.transformed(matrix))
    if not parts:
        raise DataError(f"{where} has no triangles in its scene; a surface is needed to draw points from")
    return concatenate(parts)


def _glb_header(data: bytes, where: str) -> dict[str, Any]:
    """Return the JSON chunk of a GLB file; all its chunks must be complete."""
    if len(data) < 20 or data[:4] != b"glTF":
        raise DataError(f"{where} is not a GLB file: it does not begin with glTF")
    _, version, length = _GLB_HEADER.unpack_from(data)
    if version != 2:
        raise DataError(f"{where} is glTF version {version}; only version 2 is read")
    if length > len(data):
        raise DataError(f"{where} promises {length} bytes and has {len(data)}: it is truncated; get it again")
    size, kind = _GLB_CHUNK.unpack_from(data, _GLB_HEADER.size)
    if kind != b"JSON":
        raise DataError(f"{where} is a damaged GLB file: its first part is not JSON")
    return _json(data[20 : 20 + size], where)


def _json(data: bytes, where: str) -> dict[str, Any]:
    try:
        header = json.loads(data.decode("utf-8-sig"))
        if not isinstance(header, dict):
            raise ValueError("not an object")
        return header
    except (ValueError, UnicodeDecodeError) as error:
        raise DataError(f"{where} is not a readable glTF: its JSON is damaged or truncated ({error})") from error


def _check_extensions(header: dict[str, Any], where: str) -> None:
    """Refuse content that would be read as zeros or not at all.

    Raises:
        DataError: Draco without the package DracoPy, another required extension that is not read, or triangle fans.
    """
    required = {*map(str, header.get("extensionsRequired") or ())}
    primitives = [p for mesh in header.get("meshes") or () for p in mesh.get("primitives") or ()]
    if any("KHR_draco_mesh_compression" in (p.get("extensions") or {}) for p in primitives):
        if importlib.util.find_spec("DracoPy") is None:
            raise DataError(f"{where} is Draco-compressed; decoding needs a package: pip install DracoPy")
    unknown = sorted(required - _KNOWN)
    if unknown:
        raise DataError(f"{where} needs the glTF extension {', '.join(unknown)}, which is not read; export without it")
    if any(p.get("mode") == _FANS for p in primitives):
        raise DataError(f"{where} stores triangle fans, which are not supported; export plain triangles")


@dataclass(frozen=True)
class _TextureTransform:
    """Where a texture lies on its part (KHR_texture_transform), with v = 0 at the top."""

    offset: np.ndarray  # (2,)
    scale: np.ndarray  # (2,)
    rotation: float  # radians, counterclockwise

    def __call__(self, uv: np.ndarray) -> np.ndarray:
        """Return texture coordinates (..., 2) with v = 0 at the bottom, as this module's are."""
        cos, sin = np.cos(self.rotation), np.sin(self.rotation)
        moved = _upside_down(uv) * self.scale @ [[cos, -sin], [sin, cos]] + self.offset
        return _upside_down(moved).astype(np.float32)


def _upside_down(uv: np.ndarray) -> np.ndarray:
    return uv * [1, -1] + [0, 1]


def _texture_transforms(header: dict[str, Any]) -> dict[str, _TextureTransform]:
    """Return the transforms of the materials' color textures by the material's number; trimesh ignores them."""
    transforms = {}
    for number, material in enumerate(header.get("materials") or ()):
        glossy = (material.get("extensions") or {}).get("KHR_materials_pbrSpecularGlossiness") or {}
        plain = material.get("pbrMetallicRoughness") or {}
        texture = glossy.get("diffuseTexture") or plain.get("baseColorTexture") or {}
        found = (texture.get("extensions") or {}).get("KHR_texture_transform")
        if found:
            offset, scale = (np.array(found.get(key, (n, n)), float) for key, n in (("offset", 0), ("scale", 1)))
            transforms[str(number)] = _TextureTransform(offset, scale, float(found.get("rotation", 0)))
    return transforms


def _with_numbered_materials(data: bytes, header: dict[str, Any], *, binary: bool) -> bytes:
    """Return a file whose materials are named by their numbers, which trimesh does not keep."""
    materials = [material | {"name": str(number)} for number, material in enumerate(header["materials"])]
    text = json.dumps(header | {"materials": materials}).encode()
    if not binary:
        return text
    text += b" " * (-len(text) % 4)
    size, kind = _GLB_CHUNK.unpack_from(data, _GLB_HEADER.size)
    rest = data[_GLB_HEADER.size + _GLB_CHUNK.size + size :]
    begin = _GLB_CHUNK.pack(len(text), kind)
    return _GLB_HEADER.pack(b"glTF", 2, _GLB_HEADER.size + len(begin) + len(text) + len(rest)) + begin + text + rest


def _load_scene(data: bytes, where: str, beside: FileBeside, kind: str) -> Any:
    import trimesh

    try:
        return trimesh.load_scene(
            io.BytesIO(data), file_type=kind, resolver=_Resolver(beside), process=False, ignore_broken=False
        )
    except FileNotFoundError as error:
        raise DataError(f"{where} names the file {error}, which is missing from its folder") from error
    except Exception as error:  # its readers raise many kinds on malformed files
        raise DataError(f"{where} is not a readable {kind.upper()} ({error or type(error).__name__})") from error


class _Resolver:
    """Resolver through which trimesh loads the files that a GLTF names."""

    def __init__(self, beside: FileBeside) -> None:
        self.beside = beside

    def get(self, name: str) -> bytes:
        """Return a file's bytes.

        Raises:
            FileNotFoundError: the file is missing.
        """
        data = self.beside(name)
        if data is None:
            raise FileNotFoundError(name)
        return data

    def __getitem__(self, name: str) -> bytes:
        """Return a file's bytes."""
        return self.get(name)


def _part(geometry: Any, materials: dict[int, Material], where: str) -> Mesh:
    """Return one primitive of a file in its own coordinates."""
    visual = geometry.visual
    faces = np.asarray(geometry.faces, np.int64)
    count = len(geometry.vertices)
    if faces.min() < 0 or faces.max() >= count:
        raise DataError(f"{where}: a face refers to vertex {int(faces.max())}, its part has {count}; it is damaged")
    mesh = Mesh.from_triangles(geometry.vertices, faces)
    source = getattr(visual, "material", None)
    colors = getattr(visual, "vertex_attributes", {}).get("color")
    if source is None and getattr(visual, "kind", None) == "vertex":
        colors = visual.vertex_colors
    if source is not None:
        # Without this cache, a material that parts share would be converted (with its texture) once per part.
        if id(source) not in materials:
            materials[id(source)] = _material(source)
        mesh.materials = [materials[id(source)]]
        uv = getattr(visual, "uv", None)
        if uv is not None and len(uv) == count:
            mesh.uv = np.asarray(uv, np.float32)[faces]
    if colors is not None and len(colors) == count:
        colors = np.asarray(colors)
        scale = np.iinfo(colors.dtype).max if np.issubdtype(colors.dtype, np.integer) else 1
        mesh.colors = to_srgb(colors[:, :3].astype(np.float64) / scale).astype(np.float32)[faces]
        if source is None:
            mesh.materials[0].color = np.ones(3, np.float32)
    return mesh


def _material(source: Any) -> Material:
    """Convert trimesh's PBR material: the factor is linear light, the picture sRGB."""
    name = str(getattr(source, "name", None) or "none")
    factor = getattr(source, "baseColorFactor", None)
    factor = np.ones(4) if factor is None else np.asarray(factor)
    factor = factor / 255.0 if np.issubdtype(factor.dtype, np.integer) else factor.astype(np.float64)
    factor = np.concatenate([factor, np.ones(4)])[:4] if len(factor) == 3 else factor
    opacity = float(factor[3]) if getattr(source, "alphaMode", None) == "BLEND" else 1.0
    image = getattr(source, "baseColorTexture", None)
    material = Material(name, to_srgb(factor[:3]).astype(np.float32), opacity)
    if image is not None:
        material.texture = _tinted(texture_array(image), factor[:3])
        material.color = np.ones(3, np.float32)
        if getattr(source, "alphaMode", None) in (None, "OPAQUE"):
            material.texture[..., 3] = 255
    return material


def _tinted(texture: np.ndarray, factor: np.ndarray) -> np.ndarray:
    """Multiply a texture's light by a linear factor."""
    if np.allclose(factor, 1):
        return texture
    levels = to_srgb(to_linear(np.arange(256) / 255)[:, None] * factor)  # (256, 3)
    table = (levels * 255).round().clip(0, 255).astype(np.uint8)
    for channel in range(3):
        texture[..., channel] = table[texture[..., channel], channel]
    return texture


# -------------------------------------------------------------------------------------------------------------- STL


def read_stl(data: bytes, where: str) -> Mesh:
    """Read the bytes of an STL file, text or binary; it has no colors.

    Raises:
        DataError: the file is damaged, or holds fewer triangles than its header states.
    """
    import trimesh

    text = data.lstrip()[:5].lower() == b"solid" and b"facet" in data[:2000].lower()
    if not text and len(data) < 84:
        raise DataError(f"{where} is not an STL file: {len(data)} bytes are fewer than its header has")
    if text and b"endsolid" not in data[-2000:].lower():
        raise DataError(f"{where} does not end in a line endsolid: it is truncated; get it again")
    if not text:
        (count,) = struct.unpack_from("<I", data, 80)
        if len(data) < 84 + 50 * count:
            held = (len(data) - 84) // 50
            raise DataError(f"{where} promises {count} triangles and holds {held}: it is truncated; get it again")
    with malformed(f"{where} is not a readable STL"):
        loaded = trimesh.load_mesh(io.BytesIO(data), file_type="stl_ascii" if text else "stl", process=False)
        return Mesh.from_triangles(np.asarray(loaded.vertices), np.asarray(loaded.faces))
