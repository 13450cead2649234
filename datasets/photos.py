"""A user's picture in the form that image encoders saw in pretraining: the object alone, centered, on transparency.

Pretraining sees renderings with a transparent background, composited on one color. A photo of an object on a plain
background, such as a catalog picture, can be brought into that form; any other background stays in the picture.
"""

from __future__ import annotations

import os

import numpy as np
from PIL import Image, ImageOps
from scipy.ndimage import binary_dilation, label, median

from datasets.untrusted import open_picture
from utils.errors import DataError

PHOTO_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
PHOTO_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF")
MAX_PIXELS = 1 << 26  # of a camera; without a limit, a file of a few kilobytes can exhaust memory
WORKING_SIZE = 512  # longer sides are reduced first; image encoders see 224 pixels or fewer
# Levels by which a background may deviate from its color (JPEG noise, soft shadows), and the share of the border that
# must have the color for the background to count as plain.
TOLERANCE, PLAIN_BORDER = 20, 0.9
# A hole in the object: levels by which its median deviation may exceed the border's, and its least share of pixels.
HOLE_TOLERANCE, HOLE_SIZE = 3, 0.002
VISIBLE = 8  # alpha from which a pixel belongs to the object


def read_photo(path: str | os.PathLike[str]) -> Image.Image:
    """Read a picture, turned as its EXIF tag says.

    Returns:
        An RGBA image whose longer side has at most ``WORKING_SIZE`` pixels.

    Raises:
        DataError: the file cannot be read as a picture, or is transparent all over.
    """
    try:
        with open(path, "rb") as file:
            image = open_picture(file.read(), formats=PHOTO_FORMATS, max_pixels=MAX_PIXELS)
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):  # 16-bit gray, which Pillow would clip at 255 instead of scaling
            image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
        image = image.convert("RGBA")
    except Exception as error:  # Pillow raises many exception types on malformed files
        reason = getattr(error, "strerror", None) or error
        raise DataError(
            f"{path} is not a readable picture ({reason}); expected PNG, JPEG, WebP, BMP or TIFF"
        ) from error
    image.thumbnail((WORKING_SIZE, WORKING_SIZE))
    if image.getchannel("A").getextrema()[1] < VISIBLE:
        raise DataError(f"{path} is transparent all over")
    return image


def cut_out(image: Image.Image) -> tuple[Image.Image, str]:
    """Make a plain background transparent: regions of its color at the border, and holes that show it.

    A region inside the object counts as a hole if it is not small and its color is nearly the background's own.

    Args:
        image: RGBA.

    Returns:
        The RGBA image, and what its background was: ``transparent`` (nothing was changed), ``plain`` (it is removed) or
        ``kept``.
    """
    pixels = np.array(image)  # (H, W, 4)
    if (pixels[:, :, 3] < VISIBLE).any():
        return image, "transparent"
    colors = pixels[:, :, :3].astype(np.int16)
    border = np.concatenate([colors[0], colors[-1], colors[:, 0], colors[:, -1]])
    difference = np.abs(colors - np.median(border, axis=0)).max(2)  # (H, W)
    near = difference <= TOLERANCE
    at_border = np.zeros_like(near)
    at_border[[0, -1]] = at_border[:, [0, -1]] = True
    if near[at_border].mean() < PLAIN_BORDER:
        return image, "kept"
    regions, count = label(near)  # (H, W), 0 where the color is another one
    sizes = np.bincount(regions.ravel(), minlength=count + 1)
    usual = median(difference, regions, np.arange(count + 1))  # JPEG's ringing at edges does not count
    removed = (sizes >= HOLE_SIZE * near.size) & (usual <= np.median(difference[at_border]) + HOLE_TOLERANCE)
    removed[regions[at_border]] = True
    removed[0] = False
    background = removed[regions]
    if background.all():
        return image, "kept"
    # One pixel more: the object's edge is mixed with the background, which would leave a bright line.
    pixels[binary_dilation(background)] = 0
    return Image.fromarray(pixels), "plain"


def framed(image: Image.Image, *, fill: float = 0.0) -> Image.Image:
    """Put an RGBA picture into the middle of a transparent square.

    Args:
        image: RGBA, not transparent all over.
        fill: share of the square's side that the visible part of the picture takes; 0 keeps everything around it.

    Returns:
        RGBA, black where nothing is visible.
    """
    pixels = np.array(image)
    hidden = pixels[:, :, 3] < VISIBLE
    pixels[hidden] = 0
    if fill:
        rows, columns = (np.flatnonzero(~hidden.all(axis)) for axis in (1, 0))
        pixels = pixels[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    height, width = pixels.shape[:2]
    side = round(max(height, width) / (fill or 1))
    square = np.zeros((side, side, 4), np.uint8)
    top, left = (side - height) // 2, (side - width) // 2
    square[top : top + height, left : left + width] = pixels
    return Image.fromarray(square)
