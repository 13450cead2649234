"""Readers of single files that anybody may have made: a damaged or hostile one is a ``DataError``, never a crash."""

from __future__ import annotations

import io
import os
import re

import numpy as np
from PIL import Image, UnidentifiedImageError
from plyfile import PlyData

from utils.errors import DataError
from utils.ply_headers import PLY_HEADER as PLY_HEADER
from utils.ply_headers import check_sizes, with_plain_header

PLY_VERTICES = re.compile(rb"[\r\n]element[ \t]+vertex[ \t]+(\d{1,12})[ \t]*[\r\n]")


_IMAGE_FORMATS = ("PNG", "JPEG")  # Pillow would also start other programs, for pictures in PostScript


_MAX_PIXELS = 1 << 24  # a file of some kilobytes can claim many more, which decoding would fill


GET_PAIRS = (
    "Get them with: bash data/download_data.sh shapenet shapenet_render (python -m data.check_data shows what is there)"
)


def read_ply(path: str | os.PathLike[str]) -> np.ndarray:
    """Coordinates of a PLY file, ascii or binary.

    Returns:
        (N, 3) float32.

    Raises:
        DataError: no PLY, truncated, without x y z, empty, or with coordinates that are not finite.
    """
    try:
        with open(path, "rb") as file:
            check_sizes(file)
            vertex = PlyData.read(with_plain_header(file))["vertex"]
        points = np.stack([np.asarray(vertex[axis], dtype=np.float32) for axis in "xyz"], axis=1)
    except FileNotFoundError as error:
        raise DataError(f"{path} is gone", fix=GET_PAIRS) from error
    except Exception as error:  # plyfile raises many kinds on malformed files
        reason = str(error) or type(error).__name__
        raise DataError(
            f"{path} is no readable PLY with an element 'vertex' of x, y, z ({reason}); fetch or convert it again"
        ) from error
    return check_cloud(points, str(path))


def check_cloud(points: np.ndarray, name: str) -> np.ndarray:
    """Return the cloud, or say what is wrong with it.

    Raises:
        DataError: empty, or coordinates that are not finite.
    """
    if len(points) == 0:
        raise DataError(f"{name} holds no points")
    if not np.isfinite(points).all():
        bad = ~np.isfinite(points).all(axis=1)
        raise DataError(f"{name}: {bad.sum()} of {len(points)} points are not finite (NaN or infinite coordinates)")
    return points


def decode_image(data: bytes, name: str) -> Image.Image:
    """Decode a rendering.

    Raises:
        DataError: not a readable image.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=_IMAGE_FORMATS)
        if image.width * image.height > _MAX_PIXELS:
            raise ValueError(f"{image.width} x {image.height} pixels are more than {_MAX_PIXELS:,}")
        image.load()
    except Exception as error:  # Pillow raises many kinds on malformed files
        reason = "it begins like no image format" if isinstance(error, UnidentifiedImageError) else error
        raise DataError(f"{name} is no readable PNG image ({reason}); fetch or render it again") from error
    return image
