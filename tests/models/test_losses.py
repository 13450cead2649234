"""NT-Xent against SimCLR's algorithm, closed forms and lightly; CrossNet's objectives against their formulas."""

import math

import pytest
import torch
import torch.nn.functional as F
from lightly.loss import NTXentLoss

from models.losses import crossnet_objective, nt_xent


def simclr_algorithm_1(a, b, temperature, dropped=lambda i, j: False):
    """Algorithm 1 of SimCLR, loop by loop. ``dropped(i, j)``: row j is not a negative of row i (0-based)."""
    pairs = len(a)
    z = [v for pair in zip(a, b, strict=True) for v in pair]  # z[2k] and z[2k + 1] are partners
    s = [[torch.dot(z[i], z[j]) / (z[i].norm() * z[j].norm()) for j in range(2 * pairs)] for i in range(2 * pairs)]

    def loss(i, j):
        denominator = 0.0
        for k in range(2 * pairs):
            if k != i and not dropped(i, k):
                denominator = denominator + torch.exp(s[i][k] / temperature)
        return -torch.log(torch.exp(s[i][j] / temperature) / denominator)

    total = 0.0
    for k in range(pairs):
        total = total + loss(2 * k, 2 * k + 1) + loss(2 * k + 1, 2 * k)
    return total / (2 * pairs)


def projections(count=5, width=7, *, dtype=torch.float64, number=2):
    return [torch.randn(count, width, dtype=dtype).requires_grad_() for _ in range(number)]


@pytest.mark.parametrize("temperature", [0.1, 0.2, 1.0])
@pytest.mark.parametrize(("count", "width"), [(1, 3), (2, 1), (6, 8)])
def test_nt_xent_is_simclr_algorithm_1(count, width, temperature):
    a, b = projections(count, width)
    actual, expected = nt_xent(a, b, temperature=temperature), simclr_algorithm_1(a, b, temperature)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10)
    for one, other in zip(torch.autograd.grad(actual, (a, b)), torch.autograd.grad(expected, (a, b)), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)


@pytest.mark.parametrize("temperature", [0.1, 0.2, 0.5])
def test_nt_xent_agrees_with_lightly(temperature):
    a, b = projections(16, 32, dtype=torch.float32)
    actual, expected = nt_xent(a, b, temperature=temperature), NTXentLoss(temperature)(a, b)
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)
    for one, other in zip(torch.autograd.grad(actual, (a, b)), torch.autograd.grad(expected, (a, b)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("count", [1, 2, 31])
def test_identical_rows_cannot_be_told_apart(count):
    same = torch.ones(count, 4, dtype=torch.float64)
    assert nt_xent(same, same, temperature=0.2).item() == pytest.approx(math.log(2 * count - 1), abs=1e-12)


def test_perfect_and_worst_pairs():
    axes = torch.eye(4, dtype=torch.float64)
    perfect = math.log(1 + 6 * math.exp(-1 / 0.5))  # partner at cosine 1, six others at 0
    assert nt_xent(axes, axes, temperature=0.5).item() == pytest.approx(perfect)
    worst = math.log(math.exp(-1 / 0.5) + 6) + 1 / 0.5  # partner at cosine -1
    assert nt_xent(axes, -axes, temperature=0.5).item() == pytest.approx(worst)


def test_nt_xent_is_symmetric_and_blind_to_order_and_length():
    a, b = projections()
    loss = nt_xent(a, b, temperature=0.2)
    order = torch.randperm(len(a))
    torch.testing.assert_close(nt_xent(b, a, temperature=0.2), loss)
    torch.testing.assert_close(nt_xent(a[order], b[order], temperature=0.2), loss)
    torch.testing.assert_close(nt_xent(a * torch.rand(len(a), 1), b * 9, temperature=0.2), loss)
    assert nt_xent(a, b.roll(1, 0), temperature=0.2) != loss


def test_low_temperatures_do_not_overflow():
    a, b = projections(dtype=torch.float32)
    loss = nt_xent(a, b, temperature=1e-3)
    loss.backward()
    assert loss.isfinite() and a.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_under_autocast_the_loss_keeps_full_precision(dtype):
    a, b = projections(8, 16, dtype=dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = nt_xent(a, b, temperature=0.1)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert loss.dtype == wide
    torch.testing.assert_close(loss, nt_xent(a.to(wide), b.to(wide), temperature=0.1), rtol=1e-6, atol=1e-6)


def test_rows_of_the_same_object_are_no_negatives():
    a, b = projections(4)
    objects = torch.tensor([5, 9, 5, 7])  # rows 0 and 2 show the same object

    def dropped(i, j):  # rows of z alternate between a and b
        return i // 2 != j // 2 and {i // 2, j // 2} == {0, 2}

    actual = nt_xent(a, b, temperature=0.3, objects=objects)
    torch.testing.assert_close(actual, simclr_algorithm_1(a, b, 0.3, dropped))
    different = torch.arange(4)
    torch.testing.assert_close(nt_xent(a, b, temperature=0.3, objects=different), nt_xent(a, b, temperature=0.3))


@pytest.mark.parametrize(("one", "other"), [((3, 4), (2, 4)), ((3, 4), (3, 5)), ((3, 4, 1), (3, 4, 1)), ((4,), (4,))])
def test_shapes_that_do_not_pair_are_named(one, other):
    with pytest.raises(ValueError, match=rf"\({one[0]},.*\({other[0]},"):
        nt_xent(torch.zeros(one), torch.zeros(other), temperature=0.2)


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan])
def test_impossible_temperatures_are_errors(temperature):
    with pytest.raises(ValueError, match="temperature"):
        nt_xent(torch.ones(2, 2), torch.ones(2, 2), temperature=temperature)


# ----------------------------------------------------------------------------------------------------- objectives


def reference(a, b, temperature):
    return simclr_algorithm_1(a, b, temperature)


# (objective, modalities): the cross term written out.
CROSS_TERMS = {
    ("con", "both"): lambda t1, t2, rgb, gray, t: reference(torch.cat([t1, t2]), torch.cat([rgb, gray]), t),
    ("con", "rgb"): lambda t1, t2, rgb, gray, t: reference((t1 + t2) / 2, rgb, t),
    ("con", "gray"): lambda t1, t2, rgb, gray, t: reference((t1 + t2) / 2, gray, t),
    ("ave", "both"): lambda t1, t2, rgb, gray, t: reference((t1 + t2) / 2, rgb, t) + reference((t1 + t2) / 2, gray, t),
    ("ave", "rgb"): lambda t1, t2, rgb, gray, t: reference((t1 + t2) / 2, rgb, t),
    ("ave", "gray"): lambda t1, t2, rgb, gray, t: reference((t1 + t2) / 2, gray, t),
}


@pytest.mark.parametrize(("alpha", "weight"), [(0.0, 1.0), (1.0, 0.0), (0.3, 0.6)])
@pytest.mark.parametrize(("objective", "modality"), CROSS_TERMS)
def test_objectives_are_their_formulas(objective, modality, alpha, weight):
    t1, t2, rgb, gray = projections(4, number=4)
    losses = crossnet_objective(
        (t1, t2),
        rgb=None if modality == "gray" else rgb,
        gray=None if modality == "rgb" else gray,
        objective=objective,
        alpha=alpha,
        intra_weight=weight,
        temperature=0.2,
    )
    intra, cross = reference(t1, t2, 0.2), CROSS_TERMS[objective, modality](t1, t2, rgb, gray, 0.2)
    torch.testing.assert_close(losses.intra, intra)
    torch.testing.assert_close(losses.cross, cross)
    torch.testing.assert_close(losses.total, weight * intra + alpha * cross)


def test_masking_drops_the_other_view_and_the_other_image_of_the_object():
    t1, t2, rgb, gray = projections(3, number=4)

    def dropped(i, j):  # pairs are (t1, rgb) of objects 0, 1, 2, then (t2, gray) of objects 0, 1, 2
        return i // 2 != j // 2 and (i // 2 - j // 2) % 3 == 0

    losses = crossnet_objective((t1, t2), rgb=rgb, gray=gray, temperature=0.2, mask_same_object=True)
    expected = simclr_algorithm_1(torch.cat([t1, t2]), torch.cat([rgb, gray]), 0.2, dropped)
    torch.testing.assert_close(losses.cross, expected)
    torch.testing.assert_close(losses.intra, reference(t1, t2, 0.2))  # there the other view is the partner


@pytest.mark.parametrize(("objective", "modality"), [("con", "rgb"), ("ave", "both")])
def test_masking_concerns_the_joint_term_only(objective, modality):
    t1, t2, rgb, gray = projections(3, number=4)
    images = {"rgb": rgb, "gray": gray if modality == "both" else None}
    plain, masked = (
        crossnet_objective((t1, t2), **images, objective=objective, mask_same_object=mask) for mask in (False, True)
    )
    assert plain.total == masked.total


def test_the_mean_of_half_precision_views_is_taken_in_float32():
    t1, t2, rgb = (z.detach() for z in projections(6, 32, dtype=torch.bfloat16, number=3))
    mixed = crossnet_objective((t1, t2), rgb=rgb, gray=None, objective="ave")
    exact = crossnet_objective((t1.float(), t2.float()), rgb=rgb.float(), gray=None, objective="ave")
    assert mixed.cross.dtype == torch.float32
    torch.testing.assert_close(mixed.cross, exact.cross, rtol=1e-6, atol=1e-6)


def test_the_mean_is_of_unnormalized_projections():
    t1, t2, rgb = projections(4, number=3)
    long = crossnet_objective((t1 * 100, t2), rgb=rgb, gray=None, objective="ave", temperature=0.2)
    torch.testing.assert_close(long.intra, reference(t1, t2, 0.2))
    torch.testing.assert_close(long.cross, reference(100 * t1 + t2, rgb, 0.2))
    normalized = reference(F.normalize(t1) + F.normalize(t2), rgb, 0.2)
    assert not torch.isclose(long.cross, normalized)


def test_wrong_objectives_and_missing_images_are_errors():
    a, b = projections()
    with pytest.raises(ValueError, match="unknown objective 'mean'.*con, ave"):
        crossnet_objective((a, b), rgb=a, gray=None, objective="mean")
    with pytest.raises(ValueError, match="color renders, the gray renders"):
        crossnet_objective((a, b), rgb=None, gray=None)
