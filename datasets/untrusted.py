"""Read single untrusted files: a damaged or hostile one raises ``DataError`` instead of crashing the process."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Sequence

import numpy as np
from PIL import Image, UnidentifiedImageError
from plyfile import PlyData

from utils.errors import DataError
from utils.ply_headers import PLY_HEADER as PLY_HEADER
from utils.ply_headers import check_sizes, with_plain_header

PLY_VERTICES = re.compile(rb"[\r\n]element[ \t]+vertex[ \t]+(\d{1,12})[ \t]*[\r\n]")


_IMAGE_FORMATS = ("PNG", "JPEG")  # without this, Pillow would start Ghostscript for PostScript files


_MAX_PIXELS = 1 << 24  # without a limit, decoding a file of a few kilobytes can exhaust memory


GET_PAIRS = (
    "Get them with: bash data/download_data.sh shapenet shapenet_render (python -m data.check_data shows what is there)"
)


def read_ply(path: str | os.PathLike[str]) -> np.ndarray:
    """Read the coordinates of an ascii or binary PLY file.

    Returns:
        (N, 3) float32.

    Raises:
        DataError: the file is not a PLY, truncated, empty, lacks x y z, or has non-finite coordinates.
    """
    try:
        with open(path, "rb") as file:
            check_sizes(file)
            vertex = PlyData.read(with_plain_header(file))["vertex"]
        points = np.stack([np.asarray(vertex[axis], dtype=np.float32) for axis in "xyz"], axis=1)
    except FileNotFoundError as error:
        raise DataError(f"{path} is gone", fix=GET_PAIRS) from error
    except Exception as error:  # plyfile raises many exception types on malformed files
        reason = str(error) or type(error).__name__
        raise DataError(
            f"{path} is not a readable PLY with an element 'vertex' of x, y, z ({reason}); download or convert it again"
        ) from error
    return check_cloud(points, str(path))


def check_cloud(points: np.ndarray, name: str) -> np.ndarray:
    """Return the cloud (N, 3) if it is usable.

    Raises:
        DataError: the cloud is empty or has non-finite coordinates.
    """
    if len(points) == 0:
        raise DataError(f"{name} contains no points")
    if not np.isfinite(points).all():
        bad = ~np.isfinite(points).all(axis=1)
        raise DataError(f"{name}: {bad.sum()} of {len(points)} points are not finite (NaN or infinite coordinates)")
    return points


def open_picture(data: bytes, *, formats: Sequence[str] = _IMAGE_FORMATS, max_pixels: int = _MAX_PIXELS) -> Image.Image:
    """Decode a picture of one of some formats, of limited size.

    Raises:
        Exception: the data is not such a picture; Pillow raises many types.
    """
    image = Image.open(io.BytesIO(data), formats=formats)
    if image.width * image.height > max_pixels:
        raise ValueError(f"{image.width} x {image.height} pixels are more than {max_pixels:,}")
    image.load()
    return image


def decode_image(data: bytes, name: str) -> Image.Image:
    """Decode a rendering.

    Raises:
        DataError: the data is not a readable image.
    """
    try:
        image = open_picture(data)
    except Exception as error:  # Pillow raises many exception types on malformed files
        reason = "unknown image format" if isinstance(error, UnidentifiedImageError) else error
        raise DataError(f"{name} is not a readable PNG image ({reason}); download or render it again") from error
    return image
