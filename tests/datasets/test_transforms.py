import io
import math

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import (
    adjust_brightness,
    adjust_contrast,
    adjust_saturation,
    hflip,
    normalize,
    resize,
    to_tensor,
)

from datasets.shapenet_render import collate_pairs
from datasets.streams import SampleStreams
from datasets.transforms import (
    BACKGROUNDS,
    IMAGENET_MEAN,
    IMAGENET_STD,
    NormalizeToUnitSphere,
    PointAugmentation,
    RandomInputDropout,
    RandomJitter,
    RandomRotateY,
    RandomScale,
    RandomSubset,
    RandomTranslate,
    RenderAugmentation,
    RenderPixels,
    jitter_colors,
    luminance,
    plain_images,
    pretraining_augmentation,
)
from tests.support.pairs import MODES, cloud, png

POINT_TRANSFORMS = [
    NormalizeToUnitSphere(),
    RandomScale(),
    RandomRotateY(),
    RandomTranslate(),
    RandomJitter(),
    RandomInputDropout(),
    RandomSubset(20),
    pretraining_augmentation(20),
]


def clouds(count=3, size=40):
    return torch.stack([torch.from_numpy(cloud(seed, size)) for seed in range(count)])


def streams(count=3, **kwargs):
    return SampleStreams(**({"seed": 1, "epoch": 0} | kwargs), index=torch.arange(count))


@pytest.mark.parametrize("transform", POINT_TRANSFORMS, ids=repr)
def test_transforms_are_pure_seeded_and_independent_of_neighbors(transform):
    points = clouds()
    before = points.clone()
    out = transform(points, streams())
    assert torch.equal(points, before)
    assert torch.equal(out, transform(points, streams()))
    assert out.dtype == torch.float32 and out.isfinite().all()
    assert torch.equal(out[:1], transform(points[:1], streams(1)))
    assert isinstance(transform, NormalizeToUnitSphere) or not torch.equal(out, transform(points, streams(epoch=1)))


def test_normalize_centers_and_reaches_distance_one():
    points = clouds()
    out = NormalizeToUnitSphere()(points)
    torch.testing.assert_close(out.mean(1), torch.zeros(3, 3), atol=1e-6, rtol=0)
    torch.testing.assert_close(out.norm(dim=2).amax(1), torch.ones(3))
    torch.testing.assert_close(NormalizeToUnitSphere()(5 * points - 3), out, atol=2e-6, rtol=0)
    assert torch.equal(NormalizeToUnitSphere()(torch.ones(1, 4, 3)), torch.zeros(1, 4, 3))


def test_scale_multiplies_each_cloud_by_its_first_draw():
    points = clouds()
    expected = points * (0.5 + 1.5 * streams().uniform(1))[:, :, None]
    torch.testing.assert_close(RandomScale()(points, streams()), expected)
    assert torch.equal(RandomScale(1, 1)(points, streams()), points)
    factors = RandomScale()(torch.ones(2000, 1, 3), streams(2000))
    assert torch.equal(factors[..., :1].expand_as(factors), factors)
    assert 0.5 <= factors.min() < 0.51 and 1.99 < factors.max() < 2 and abs(factors.mean() - 1.25) < 0.03


def test_rotate_is_a_full_turn_about_y():
    points = clouds()
    out = RandomRotateY()(points, streams())
    angle = 2 * math.pi * streams().uniform(1)[0].item()
    x, y, z = points[0].T
    expected = torch.stack([math.cos(angle) * x + math.sin(angle) * z, y, math.cos(angle) * z - math.sin(angle) * x], 1)
    torch.testing.assert_close(out[0], expected)
    assert torch.equal(out[..., 1], points[..., 1])
    torch.testing.assert_close(out[..., [0, 2]].norm(dim=2), points[..., [0, 2]].norm(dim=2))
    turned = RandomRotateY()(torch.tensor([[[1.0, 0, 0]]]).expand(2000, 1, 3), streams(2000))[:, 0]
    angles = torch.atan2(-turned[:, 2], turned[:, 0])
    assert angles.min() < -3.1 and angles.max() > 3.1 and abs(angles.mean()) < 0.15


def test_translate_shifts_by_a_share_of_the_extent_of_each_axis():
    points = clouds()
    shift = RandomTranslate()(points, streams()) - points
    extent = points.amax(1) - points.amin(1)
    expected = (extent * (streams().uniform(3) - 0.5))[:, None].expand_as(shift)
    torch.testing.assert_close(shift, expected, atol=1e-5, rtol=0)
    assert torch.equal(RandomTranslate(0.0)(points, streams()), points)


def test_jitter_adds_clipped_normal_noise():
    points = torch.zeros(50, 400, 3)
    noise = RandomJitter()(points, streams(50))
    torch.testing.assert_close(noise, (0.01 * streams(50).normal(400, 3)).clamp(-0.05, 0.05))
    assert abs(noise.std() - 0.01) < 2e-4 and abs(noise.mean()) < 2e-4
    tight = RandomJitter(std=0.01, clip=0.02)(points, streams(50))
    assert tight.abs().max().item() == pytest.approx(0.02) and (tight.abs() == tight.abs().max()).sum() > 100
    assert torch.equal(RandomJitter(std=0.0)(clouds(), streams()), clouds())


def test_dropout_turns_dropped_points_into_point_zero_at_a_ratio_of_its_own():
    points = clouds(400, 200)
    out = RandomInputDropout()(points, streams(400))
    kept = (out == points).all(2)
    assert torch.equal(out[~kept], points[:, :1].expand_as(points)[~kept])
    dropped = 1 - kept.double().mean(1)
    torch.testing.assert_close(dropped, 0.875 * streams(400).uniform(1)[:, 0].double(), atol=0.15, rtol=0)
    assert dropped.max() < 0.95 and abs(dropped.mean() - 0.4375) < 0.04
    assert torch.equal(RandomInputDropout(0.0)(points, streams(400)), points)


def test_subset_draws_points_without_replacement_and_evenly():
    points = torch.arange(40.0)[None, :, None].expand(500, 40, 3)
    out = RandomSubset(10)(points, streams(500))[..., 0].long()
    assert out.shape == (500, 10) and all(len(set(row)) == 10 for row in out.tolist())
    counts = out.flatten().bincount(minlength=40)
    assert counts.min() > 80 and counts.max() < 170  # 125 expected
    whole = clouds()
    assert torch.equal(RandomSubset(40)(whole, streams()), whole)
    with pytest.raises(ValueError, match="cannot draw 41 points from clouds of 40"):
        RandomSubset(41)(whole, streams())


def test_a_subset_takes_repetitions_only_where_the_points_are_too_few():
    points = torch.arange(40.0)[None, :, None].expand(3, 40, 3)
    whole = RandomSubset(10)(points, streams(3))
    counts = torch.tensor([40, 12, 7])
    drawn = RandomSubset(10)(points, streams(3), counts)[..., 0].long()
    assert torch.equal(drawn[0], whole[0, :, 0].long())  # a cloud of full size is drawn from as ever
    assert drawn[1].max() < 12 and len(set(drawn[1].tolist())) == 10
    assert set(range(7)) < set(drawn[2].tolist()) and len(set(drawn[2].tolist())) == 10


def test_released_order_and_views_that_differ():
    assert repr(pretraining_augmentation(16)) == (
        "PointAugmentation(transforms=[RandomSubset(num_points=16), NormalizeToUnitSphere(), RandomScale(low=0.5, "
        "high=2.0), RandomRotateY(), RandomTranslate(fraction=0.5), RandomJitter(std=0.01, clip=0.05), "
        "RandomInputDropout(max_ratio=0.875)])"
    )
    assert repr(RenderAugmentation(64)) == "RenderAugmentation(size=64, modality='both', strength=0.4, flip=0.5)"
    rest = [NormalizeToUnitSphere(), RandomTranslate(), RandomJitter()]
    assert pretraining_augmentation(without=["scale", "rotate", "dropout", "color"]).transforms == rest
    points, both = clouds(), streams()
    view1, view2 = (pretraining_augmentation()(points, both) for _ in range(2))
    assert view1.shape == view2.shape == points.shape and not torch.equal(view1, view2)
    steps, one = points, streams()
    for transform in pretraining_augmentation().transforms:
        steps = transform(steps, one)
    assert torch.equal(steps, view1)
    assert torch.equal(PointAugmentation([])(points, both), points)


def image(pixels):
    return Image.fromarray(np.asarray(pixels, np.uint8))


def saved(picture, **options):
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", **options)
    return Image.open(io.BytesIO(buffer.getvalue()))


@pytest.mark.parametrize("background", [name for name, color in BACKGROUNDS.items() if color])
def test_transparency_is_composited_on_the_background(background):
    color = BACKGROUNDS[background]
    flatten = RenderPixels(4, background=background).flatten
    rgba = image([[[200, 100, 50, 255], [200, 100, 50, 0], [200, 100, 50, 51]]])
    mixed = [round(0.2 * a + 0.8 * b) for a, b in zip((200, 100, 50), color, strict=True)]
    np.testing.assert_allclose(np.asarray(flatten(rgba))[0], [[200, 100, 50], color, mixed], atol=1)
    la = image([[[90, 255], [90, 0]]])
    assert np.asarray(flatten(la))[0].tolist() == [[90] * 3, list(color)]
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putpixel((1, 0), 1)
    assert np.asarray(flatten(saved(palette, transparency=1)))[0].tolist() == [[10, 20, 30], list(color)]
    assert np.asarray(flatten(saved(palette)))[0].tolist() == [[10, 20, 30], [40, 50, 60]]
    keyed = saved(image([[[1, 2, 3], [4, 5, 6]]]), transparency=(4, 5, 6))
    assert np.asarray(flatten(keyed))[0].tolist() == [[1, 2, 3], list(color)]


def test_the_released_background_is_the_hidden_color():
    flatten = RenderPixels(4, background="released").flatten
    rgba = image([[[200, 100, 50, 255], [200, 100, 50, 0], [1, 2, 3, 51]]])
    assert np.asarray(flatten(saved(rgba)))[0].tolist() == [[200, 100, 50], [200, 100, 50], [1, 2, 3]]
    assert np.asarray(flatten(image([[[90, 255], [70, 0]]])))[0].tolist() == [[90] * 3, [70] * 3]
    keyed = saved(image([[[1, 2, 3], [4, 5, 6]]]), transparency=(4, 5, 6))
    assert np.asarray(flatten(keyed))[0].tolist() == [[1, 2, 3], [4, 5, 6]]


def test_gray_pictures_of_any_depth_keep_their_brightness():
    flatten = RenderPixels(4).flatten
    assert np.asarray(flatten(image([[7, 200]])))[0].tolist() == [[7] * 3, [200] * 3]
    sixteen = saved(Image.fromarray(np.array([[0, 257 * 7, 257 * 200, 65535]], np.uint16)))
    assert np.asarray(flatten(sixteen))[0].tolist() == [[0] * 3, [7] * 3, [200] * 3, [255] * 3]
    assert np.asarray(flatten(Image.fromarray(np.array([[False, True]]))))[0].tolist() == [[0] * 3, [255] * 3]


def photo(seed, size):
    """Make noise on a gradient of colors, (width, height) in Pillow's order."""
    slope = np.asarray(Image.open(io.BytesIO(png(seed, size=size))).convert("RGB"), np.int16)
    noise = np.random.default_rng(seed).integers(-60, 60, slope.shape)
    return image((slope + noise).clip(0, 255))


def batch(*pictures, size=16):
    pixels = RenderPixels(size)
    sample = {"index": 0, "points": torch.zeros(1, 3), "count": 1, "bad": []}
    return collate_pairs([{**sample, "pixels": pixels(p)} for p in pictures])


def augment(transform, pictures, numbers):
    made = batch(*pictures, size=transform.size)
    return transform(made["pixels"], made["sizes"], numbers)


def plain_form(picture, size, factors, order, flips):
    """Transform one image like the released code, with Pillow, torchvision and the given random numbers."""
    jitters = (adjust_brightness, adjust_contrast, adjust_saturation)
    rgb = resize(picture, [size, size])
    for which in order:
        rgb = jitters[which](rgb, factors[which])
    gray = resize(picture.convert("L"), [size, size])
    rgb, gray = (hflip(x) if flip else x for x, flip in zip((rgb, gray), flips, strict=True))
    return (
        normalize(to_tensor(rgb), IMAGENET_MEAN, IMAGENET_STD),
        normalize(to_tensor(gray), IMAGENET_MEAN[:1], IMAGENET_STD[:1]),
    )


def drawn(count, **kwargs):
    """Draw the factors, orders and flips of ``RenderAugmentation``."""
    numbers = streams(count, **kwargs)
    factors, order = numbers.uniform(3, low=0.6, high=1.4), numbers.uniform(3).argsort(1)
    return zip(factors.tolist(), order.tolist(), (numbers.uniform(2) < 0.5).tolist(), strict=True)


@pytest.mark.parametrize(("size", "levels"), [((24, 24), 0), ((31, 17), 1), ((60, 33), 2)])
def test_renders_equal_the_plain_form_up_to_the_rounding_of_the_resizing(size, levels):
    count = 30
    pictures = [photo(seed, size) for seed in range(count)]
    out = augment(RenderAugmentation(24), pictures, streams(count))
    for row, numbers in enumerate(drawn(count)):
        rgb, gray = plain_form(pictures[row], 24, *numbers)
        # A level more or less before the jitter can be some more after it.
        for name, expected, most in (("rgb", rgb, 4 * levels), ("gray", gray, levels)):
            mean = 0.31 if torch.__version__.startswith("2.4.") else 0.3  # PyTorch 2.4 resizes with other rounding
            deviation = torch.tensor(IMAGENET_STD[: len(expected)])[:, None, None]
            difference = 255 * deviation * (out[name][row] - expected).abs()
            assert difference.max() < most + 1e-3 and difference.mean() <= mean * levels + 1e-3, (name, row)
    orders, flips = (list(x) for x in list(zip(*drawn(count), strict=True))[1:])
    assert len({tuple(x) for x in orders}) == 6 and len({tuple(x) for x in flips}) == 4


def test_images_for_evaluation_are_resized_and_normalized_alone():
    pictures = [photo(seed, (24, 24)) for seed in range(3)]
    out = plain_images(batch(*pictures, size=24)["pixels"], 24)
    left_out = augment(RenderAugmentation(24, strength=0, flip=0), pictures, streams(3))
    assert all(torch.equal(left_out[name], out[name]) for name in out)
    for row, picture in enumerate(pictures):
        rgb, gray = plain_form(picture, 24, (), (), (False, False))
        torch.testing.assert_close(out["rgb"][row], rgb, atol=1e-5, rtol=0)
        torch.testing.assert_close(out["gray"][row], gray, atol=1e-5, rtol=0)
    assert {name: part.shape[1:] for name, part in plain_images(batch(*pictures)["pixels"], 8).items()} == {
        "rgb": (3, 8, 8),
        "gray": (1, 8, 8),
    }


def test_luminance_and_jitter_equal_pillow_to_the_last_bit():
    every = np.random.default_rng(0).integers(0, 256, (64, 64, 3))
    pixels = torch.from_numpy(np.ascontiguousarray(every)).permute(2, 0, 1)[None].float()
    assert np.array_equal(luminance(pixels)[0, 0].numpy(), np.asarray(image(every).convert("L"), np.float32))
    for factors, order in (([0.6, 1.4, 0.9], [2, 0, 1]), ([1.39, 0.61, 1.2], [1, 2, 0]), ([1, 1, 1], [0, 1, 2])):
        expected = image(every)
        for which in order:
            expected = (adjust_brightness, adjust_contrast, adjust_saturation)[which](expected, factors[which])
        out = jitter_colors(pixels, torch.tensor([factors]), torch.tensor([order]))[0]
        assert np.array_equal(out.permute(1, 2, 0).numpy(), np.asarray(expected, np.float32))


def test_a_render_depends_on_its_own_sample_alone(monkeypatch):
    sizes = [(16, 16), (9, 12), (16, 16), (9, 12), (30, 20), (16, 16), (9, 12)]
    pictures = [photo(seed, size) for seed, size in enumerate(sizes)]
    together = RenderAugmentation(16)
    whole = augment(together, pictures, streams(7))
    assert len(batch(*pictures)["sizes"].unique(dim=0)) == 2  # the largest was resized when it was read
    for row in range(7):
        alone = SampleStreams(seed=1, epoch=0, index=torch.tensor([row]))
        single = augment(together, pictures[row : row + 1], alone)
        assert all(torch.equal(single[name][0], whole[name][row]) for name in ("rgb", "gray"))
    monkeypatch.setattr(RenderAugmentation, "CPU_CHUNK", 3)
    again = augment(together, pictures, streams(7))
    assert all(torch.equal(again[name], whole[name]) for name in whole)
    other = augment(together, pictures, streams(7, epoch=1))
    assert not torch.equal(other["rgb"], whole["rgb"])


@pytest.mark.parametrize("mode", [*MODES, "LA", "1"])
def test_every_mode_gives_normalized_tensors_of_the_size_asked(mode):
    decoded = Image.open(io.BytesIO(png(3, mode, (33, 17))))
    out = augment(RenderAugmentation(16), [decoded], streams(1))
    assert {name: tuple(x.shape) for name, x in out.items()} == {"rgb": (1, 3, 16, 16), "gray": (1, 1, 16, 16)}
    for name, (x,) in out.items():
        mean, std = (torch.tensor(values[: len(x)])[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
        values = x * std + mean
        assert x.dtype == torch.float32 and values.min() > -1e-5 and values.max() < 1 + 1e-5, name


@pytest.mark.parametrize(("size", "kept"), [((20, 20), (20, 20)), ((30, 13), (30, 13)), ((21, 20), (20, 20))])
def test_only_renders_of_more_pixels_than_wanted_are_resized_when_read(size, kept):
    assert tuple(RenderPixels(20)(photo(1, size)).shape) == (kept[1], kept[0], 3)


def test_color_jitter_changes_brightness_within_its_range():
    grays = [image(np.full((8, 8, 3), 100))] * 60
    values = augment(RenderAugmentation(8), grays, streams(60))["rgb"].mean((2, 3))
    values = 255 * (values * torch.tensor(IMAGENET_STD) + torch.tensor(IMAGENET_MEAN))
    # 100 x U(0.6, 1.4): a flat gray does not change with contrast and saturation.
    assert 59 <= values.min() < 75 and 125 < values.max() <= 141


@pytest.mark.parametrize("modality", ["rgb", "gray"])
def test_only_the_wanted_modality_is_computed_from_the_same_numbers(modality):
    pictures = photo(1, (20, 20)), photo(2, (7, 5))
    out = augment(RenderAugmentation(8, modality=modality), pictures, streams(2))
    assert list(out) == [modality]
    assert torch.equal(out[modality], augment(RenderAugmentation(8), pictures, streams(2))[modality])
