import io
import math

import numpy as np
import pytest
import torch
from PIL import Image

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
    RenderTransform,
    pretraining_augmentation,
)
from tests.pairs import MODES, cloud, png

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
def test_transforms_are_pure_seeded_and_independent_of_neighbours(transform):
    points = clouds()
    before = points.clone()
    out = transform(points, streams())
    assert torch.equal(points, before)
    assert torch.equal(out, transform(points, streams()))
    assert out.dtype == torch.float32 and out.isfinite().all()
    assert torch.equal(out[:1], transform(points[:1], streams(1)))
    assert isinstance(transform, NormalizeToUnitSphere) or not torch.equal(out, transform(points, streams(epoch=1)))


@pytest.mark.parametrize(
    "transform, expected",
    [
        (RandomScale(), "RandomScale(0.5, 2.0)"),
        (RandomRotateY(), "RandomRotateY()"),
        (RandomTranslate(), "RandomTranslate(0.5)"),
        (RandomJitter(), "RandomJitter(std=0.01, clip=0.05)"),
        (RandomInputDropout(), "RandomInputDropout(0.875)"),
        (RandomSubset(7), "RandomSubset(7)"),
        (NormalizeToUnitSphere(), "NormalizeToUnitSphere()"),
        (RenderTransform(64), "RenderTransform(64, background='black', modality='both')"),
    ],
)
def test_repr_names_the_transform_and_its_released_settings(transform, expected):
    assert repr(transform) == expected


def test_normalize_centres_and_reaches_distance_one():
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
    with pytest.raises(ValueError, match="41 points were asked of clouds of 40"):
        RandomSubset(41)(whole, streams())


def test_released_order_and_views_that_differ():
    assert repr(pretraining_augmentation()) == (
        "PointAugmentation([NormalizeToUnitSphere(), RandomScale(0.5, 2.0), RandomRotateY(), RandomTranslate(0.5), "
        "RandomJitter(std=0.01, clip=0.05), RandomInputDropout(0.875)])"
    )
    assert repr(pretraining_augmentation(16)).startswith("PointAugmentation([RandomSubset(16), Normalize")
    points, both = clouds(), streams()
    view1, view2 = (pretraining_augmentation()(points, both) for _ in range(2))
    assert view1.shape == view2.shape == points.shape and not torch.equal(view1, view2)
    steps, one = points, streams()
    for transform in pretraining_augmentation().transforms:
        steps = transform(steps, one)
    assert torch.equal(steps, view1)
    assert torch.equal(PointAugmentation([])(points, both), points)


def image(pixels, mode=None):
    return Image.fromarray(np.asarray(pixels, np.uint8), mode)


def saved(picture, **options):
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", **options)
    return Image.open(io.BytesIO(buffer.getvalue()))


@pytest.mark.parametrize("background", BACKGROUNDS)
def test_transparency_is_composited_on_the_background(background):
    colour = BACKGROUNDS[background]
    flatten = RenderTransform(4, background=background).flatten
    rgba = image([[[200, 100, 50, 255], [200, 100, 50, 0], [200, 100, 50, 51]]])
    mixed = [round(0.2 * a + 0.8 * b) for a, b in zip((200, 100, 50), colour, strict=True)]
    np.testing.assert_allclose(np.asarray(flatten(rgba))[0], [[200, 100, 50], colour, mixed], atol=1)
    la = image([[[90, 255], [90, 0]]])
    assert np.asarray(flatten(la))[0].tolist() == [[90] * 3, list(colour)]
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putpixel((1, 0), 1)
    assert np.asarray(flatten(saved(palette, transparency=1)))[0].tolist() == [[10, 20, 30], list(colour)]
    assert np.asarray(flatten(saved(palette)))[0].tolist() == [[10, 20, 30], [40, 50, 60]]
    keyed = saved(image([[[1, 2, 3], [4, 5, 6]]]), transparency=(4, 5, 6))
    assert np.asarray(flatten(keyed))[0].tolist() == [[1, 2, 3], list(colour)]


def test_gray_pictures_of_any_depth_keep_their_brightness():
    flatten = RenderTransform(4).flatten
    assert np.asarray(flatten(image([[7, 200]])))[0].tolist() == [[7] * 3, [200] * 3]
    sixteen = saved(Image.fromarray(np.array([[0, 257 * 7, 257 * 200, 65535]], np.uint16)))
    assert np.asarray(flatten(sixteen))[0].tolist() == [[0] * 3, [7] * 3, [200] * 3, [255] * 3]
    assert np.asarray(flatten(Image.fromarray(np.array([[False, True]]))))[0].tolist() == [[0] * 3, [255] * 3]


@pytest.mark.parametrize("mode", [*MODES, "LA", "1"])
def test_every_mode_gives_normalised_tensors_of_the_size_asked(mode):
    decoded = Image.open(io.BytesIO(png(3, mode, (33, 17))))
    out = RenderTransform(16)(decoded, 5)
    assert {name: tuple(x.shape) for name, x in out.items()} == {"rgb": (3, 16, 16), "gray": (1, 16, 16)}
    for name, x in out.items():
        channels = len(x)
        mean, std = (torch.tensor(values[:channels])[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
        values = x * std + mean
        assert x.dtype == torch.float32 and values.min() > -1e-5 and values.max() < 1 + 1e-5, name


def test_render_is_a_function_of_the_seed_and_leaves_the_global_generator_alone():
    transform, picture = RenderTransform(12), Image.open(io.BytesIO(png(1)))
    torch.manual_seed(3)
    state = torch.get_rng_state()
    first = transform(picture, 10)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(4)
    again, other = transform(picture, 10), transform(picture, 11)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["rgb"], other["rgb"])


def test_gray_is_luminance_with_a_flip_of_its_own_and_no_jitter():
    transform, picture = RenderTransform(20), Image.open(io.BytesIO(png(1, size=(20, 20)))).convert("RGB")
    luminance = torch.from_numpy(np.asarray(picture.convert("L")) / np.float32(255))
    expected = ((luminance - IMAGENET_MEAN[0]) / IMAGENET_STD[0])[None]
    flips = []
    for seed in range(40):
        gray, rgb = (transform(picture, seed)[name] for name in ("gray", "rgb"))
        flipped = not torch.allclose(gray, expected, atol=1e-5)
        torch.testing.assert_close(gray.flip(2) if flipped else gray, expected, atol=1e-5, rtol=0)
        # The picture gets brighter from left to right in this channel or darker: a flip shows in the sign.
        slope = (rgb[0, :, -1] - rgb[0, :, 0]).mean() * (picture.getpixel((19, 10))[0] - picture.getpixel((0, 10))[0])
        flips.append((flipped, bool(slope < 0)))
    assert {(a, b) for a, b in flips} == {(a, b) for a in (False, True) for b in (False, True)}
    assert 10 <= sum(a for a, _ in flips) <= 30 and 10 <= sum(b for _, b in flips) <= 30


def test_colour_jitter_changes_brightness_within_its_range():
    transform, picture = RenderTransform(8), image(np.full((8, 8, 3), 100))
    values = torch.stack([transform(picture, seed)["rgb"].mean((1, 2)) for seed in range(60)])
    values = 255 * (values * torch.tensor(IMAGENET_STD) + torch.tensor(IMAGENET_MEAN))
    # 100 x U(0.6, 1.4): a flat gray does not change with contrast and saturation.
    assert 59 <= values.min() < 75 and 125 < values.max() <= 141


@pytest.mark.parametrize("modality", ["rgb", "gray"])
def test_only_the_wanted_modality_is_computed(modality):
    picture = Image.open(io.BytesIO(png(1)))
    assert list(RenderTransform(8, modality=modality)(picture, 1)) == [modality]
