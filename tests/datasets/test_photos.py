import numpy as np
import pytest
from PIL import Image

from datasets.photos import cut_out, framed, read_photo
from utils.errors import DataError


def disc(background=(240, 240, 240), *, noise=0, size=(60, 40)):
    """Return a red disc with a hole that shows the background, in the upper left of an opaque picture."""
    y, x = np.mgrid[: size[1], : size[0]]
    far = np.hypot(x - 18, y - 15)
    pixels = np.empty((size[1], size[0], 3), np.int16)
    pixels[:] = background
    pixels += np.random.default_rng(0).integers(-noise, noise + 1, pixels.shape, dtype=np.int16)
    pixels[(far < 12) & (far > 4)] = (200, 30, 30)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).convert("RGBA")


def test_a_plain_background_becomes_transparent_and_so_does_a_hole_that_shows_it():
    image, how = cut_out(disc(noise=8))
    alpha = np.asarray(image)[:, :, 3] > 0
    far = np.hypot(*(np.mgrid[:40, :60] - np.array([15, 18])[:, None, None]))
    assert how == "plain" and alpha[(far < 11) & (far > 5)].all() and not alpha[(far >= 12) | (far < 3)].any()
    small = cut_out(disc(size=(300, 200)))[0]
    assert np.asarray(small)[15, 18, 3] == 255  # less than 0.2 % of this picture may be a highlight


def test_any_other_background_stays():
    noisy = disc(noise=120)
    assert cut_out(noisy) == (noisy, "kept")
    empty = Image.new("RGBA", (20, 20), "white")
    assert cut_out(empty)[1] == "kept"
    transparent = Image.new("RGBA", (20, 20), (0, 0, 0, 0))
    assert cut_out(transparent) == (transparent, "transparent")


def test_the_object_is_centered_and_fills_the_square():
    image = framed(cut_out(disc())[0], fill=0.5)
    alpha = np.asarray(image)[:, :, 3] > 0
    rows, columns = np.flatnonzero(alpha.any(1)), np.flatnonzero(alpha.any(0))
    assert image.size == (42, 42) and len(rows) == len(columns) == 21
    assert abs(rows.mean() - 20.5) < 1 and abs(columns.mean() - 20.5) < 1
    whole = np.asarray(framed(disc()))
    assert whole.shape == (60, 60, 4) and not whole[:10].any() and whole[10:50, :, 3].all()


def test_a_hidden_color_does_not_come_back():
    image = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    image.putpixel((1, 1), (0, 255, 0, 255))
    assert np.asarray(framed(image)).sum() == 2 * 255


def test_pictures_of_every_kind_are_read_and_turned_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned
    disc().convert("RGB").save(tmp_path / "turned.jpg", exif=exif)
    assert read_photo(tmp_path / "turned.jpg").size == (40, 60)
    for name, image in (
        ("p.png", disc().convert("P")),
        ("l.bmp", disc().convert("L")),
        ("deep.png", Image.fromarray(np.full((4, 4), 257 * 200, np.uint16))),
        ("w.webp", disc()),
    ):
        image.save(tmp_path / name)
        assert read_photo(tmp_path / name).mode == "RGBA"
    assert read_photo(tmp_path / "deep.png").getpixel((0, 0)) == (200, 200, 200, 255)
    Image.new("RGB", (2000, 1000)).save(tmp_path / "large.png")
    assert read_photo(tmp_path / "large.png").size == (512, 256)
    Image.new("RGBA", (5, 5), (9, 9, 9, 0)).save(tmp_path / "empty.png")
    with pytest.raises(DataError, match=r"empty\.png is transparent all over"):
        read_photo(tmp_path / "empty.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "p.png").read_bytes()[:60])
    (tmp_path / "no.jpg").write_text("no picture")
    for name in ("cut.png", "no.jpg", "missing.png"):
        with pytest.raises(DataError, match=f"{name} is not a readable picture"):
            read_photo(tmp_path / name)
