"""Generated shapes: inside tests agree with meshes, warps are invertible, parts join, points lie on the surface."""

import numpy as np
import pytest
from scipy.spatial import cKDTree

from data.procedural import KINDS, LEVELS, compose, sample_visible, solids
from data.procedural.compose import _Composer, generator
from data.procedural.pictures import mesh_of

RNG = np.random.default_rng(0)
WARP = solids.Warp(
    axis=1,
    taper=0.5,
    twist=0.7,
    amplitude=np.array([[0.05, 0.0, 0.1], [0.0, 0.06, 0.0]]),
    frequency=np.array([[2.0, 0.0, 1.0], [0.0, 3.0, 1.0]]),
    phase=np.array([0.3, 1.0]),
)
CURVE = np.array([[-1.0, 0, 0], [-1, 1.2, 0.3], [1, 1.2, -0.3], [1, 0, 0]])
TURN = np.linalg.qr(RNG.normal(size=(3, 3)))[0]
SOLIDS = {
    "box": solids.box(),
    "cylinder": solids.frustum(1.0),
    "cone": solids.frustum(0.0),
    "sphere": solids.superquadric(1.0, 1.0),
    "rounded box": solids.superquadric(0.3, 0.4),
    "octahedron": solids.superquadric(1.8, 1.8),
    "torus": solids.torus(0.3),
    "tube": solids.tube(CURVE, 0.2),
    "warped box": solids.warped(solids.box(divisions=8), WARP),
    "placed": solids.placed(solids.frustum(0.5), scale=[0.2, 0.5, 0.3], turn=TURN, shift=[0.3, -1.0, 0.2]),
    "reflected": solids.reflected(solids.tube(CURVE + 1, 0.2), 0),
}


def winding_numbers(points, solid):
    """Return the winding number of each point: solid angles of the triangles over 4 pi (Van Oosterom, Strackee)."""
    a, b, c = (solid.vertices[solid.triangles[:, i]] - points[:, None] for i in range(3))
    la, lb, lc = (np.linalg.norm(x, axis=2) for x in (a, b, c))
    above = (a * np.cross(b, c)).sum(2)
    below = la * lb * lc + (a * b).sum(2) * lc + (b * c).sum(2) * la + (c * a).sum(2) * lb
    return np.arctan2(above, below).sum(1) / (2 * np.pi)


@pytest.mark.parametrize("name", SOLIDS)
def test_what_a_solid_contains_is_what_its_mesh_surrounds(name):
    solid = SOLIDS[name]
    low, high = solid.vertices.min(0), solid.vertices.max(0)
    points = low + RNG.random((500, 3)) * (high - low) * 1.2 - 0.1 * (high - low)
    turns = winding_numbers(points, solid)
    assert turns.min() > -0.01  # counterclockwise seen from outside
    surrounded = turns > 0.5
    differ = surrounded != solid.contains(points)
    # Flat facets lie a little inside a round surface; nothing else may differ.
    assert differ.mean() < 0.03
    assert surrounded.mean() > 0.03
    if name in ("box", "placed", "cone"):
        assert differ.mean() < 0.006


def test_a_warp_is_undone():
    points = RNG.uniform(-1, 1, (500, 3))
    assert np.abs(WARP.backward(WARP.forward(points)) - points).max() < 1e-4


def test_a_shape_follows_from_its_seed_and_number():
    first, again, other = compose(1, 5), compose(1, 5), compose(1, 6)
    assert [p.kind for p in first.parts] == [p.kind for p in again.parts]
    np.testing.assert_array_equal(first.parts[-1].solid.vertices, again.parts[-1].solid.vertices)
    np.testing.assert_array_equal(first.colors, again.colors)
    assert first.parts[0].solid.vertices.shape != other.parts[0].solid.vertices.shape or not np.array_equal(
        first.parts[0].solid.vertices, other.parts[0].solid.vertices
    )
    with pytest.raises(ValueError, match="level"):
        compose(1, 1, 6)


def test_levels_go_from_single_primitives_to_everything():
    shapes = {level: [compose(3, number, level) for number in range(25)] for level in LEVELS}
    primitives = {level: [1 + max(p.number for p in s.parts) for s in made] for level, made in shapes.items()}
    assert set(primitives[1]) == {1} and set(primitives[2]) == {2, 3, 4}
    assert max(primitives[5]) >= 8 and min(primitives[5]) == 1 and max(max(n) for n in primitives.values()) == 9
    kinds = {level: {KINDS[p.kind] for s in made for p in s.parts} for level, made in shapes.items()}
    assert kinds[2] == set(KINDS[:6]) and kinds[5] == set(KINDS)
    assert not any(s.bands for level in (1, 2, 3, 4) for s in shapes[level])
    assert any(s.bands for s in shapes[5])


def test_mirrored_shapes_are_their_own_mirror_image():
    checked = 0
    for number in range(30):
        composer = _Composer(generator(2, number), 4)
        shape = composer.shape()
        if not composer.mirror:
            continue
        points = RNG.uniform(-1.2, 1.2, (4000, 3))
        here, there = (
            np.any([part.solid.contains(p) for part in shape.parts], axis=0) for p in (points, points * [-1, 1, 1])
        )
        assert (here == there).mean() > 0.999, number
        checked += 1
    assert checked > 8


def test_parts_are_joined_to_one_another():
    for number in range(15):
        parts = compose(4, number).parts
        points = [_on_surface(part.solid, 500) for part in parts]
        trees = [cKDTree(cloud) for cloud in points]
        joined, waiting = {0}, [0]
        while waiting:
            i = waiting.pop()
            for j in set(range(len(parts))) - joined:
                near = trees[i].query(points[j])[0].min() < 0.03
                if near or parts[i].solid.contains(points[j]).any() or parts[j].solid.contains(points[i]).any():
                    joined.add(j)
                    waiting.append(j)
        assert len(joined) == len(parts), number


def _on_surface(solid, count):
    corners = solid.vertices[solid.triangles]
    areas = np.linalg.norm(np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]), axis=1)
    weights = RNG.dirichlet([1, 1, 1], count)
    return (corners[RNG.choice(len(areas), count, p=areas / areas.sum())] * weights[:, :, None]).sum(1)


def test_sampled_points_lie_on_their_part_and_in_no_other():
    for number in (2, 7, 11):
        shape = compose(1, number)
        samples = sample_visible(shape, 100, generator(1, number))
        assert len(samples.points) == len(samples.kind) == len(samples.number) == 100
        within, without = (
            np.array([winding_numbers(samples.points + step * samples.normals, part.solid) for part in shape.parts])
            > 0.5
            for step in (-1e-4, 1e-4)
        )  # (parts, 100)
        own = np.array([[part.number == n for n in samples.number] for part in shape.parts])
        assert (own & within & ~without).any(0).mean() > 0.97
        assert (~without.any(0)).mean() > 0.97
        assert np.linalg.norm(samples.normals, axis=1) == pytest.approx(1, abs=1e-6)


def test_a_mirror_image_that_is_the_part_itself_does_not_hide_it():
    """An arch in the middle equals its mirror image: twice the same surface would leave nothing to be seen."""
    composer = _Composer(generator(1, 1), 5)
    arch = solids.tube(np.array([[-1.0, 0, 0], [-1, 1, 0], [1, 1, 0], [1, 0, 0]]), 0.1)
    assert composer._coincide(arch, solids.reflected(arch, 0))
    assert not composer._coincide(arch, solids.reflected(arch, 1))
    for number in range(60):
        sample_visible(compose(5, number), 16, generator(5, number))


def test_points_are_even_by_area():
    """A box of 2 x 4 x 8 has faces of 32, 16 and 8, twice each."""
    box = solids.placed(solids.box(divisions=3), scale=[1, 2, 4], turn=np.eye(3), shift=np.zeros(3))
    shape = compose(1, 1, 1)
    shape.parts[:] = [type(shape.parts[0])(box, 1, 0)]
    samples = sample_visible(shape, 20_000, np.random.default_rng(0))
    share = [np.isclose(np.abs(samples.points[:, axis]), half).mean() for axis, half in enumerate((1, 2, 4))]
    assert share == pytest.approx([64 / 112, 32 / 112, 16 / 112], abs=0.015)


def test_bands_have_the_same_place_in_mesh_and_samples():
    number = next(n for n in range(50) if compose(1, n).bands is not None and compose(1, n).bands.profile.min() == 0)
    shape = compose(1, number)
    mesh = mesh_of(shape)
    middle = mesh.vertices[mesh.triangles].mean(1)
    texel = (mesh.uv.mean(1)[:, 0] % 1 * 64).astype(int)
    from_texture = np.array([mesh.materials[m].texture[0, t, :3] for m, t in zip(mesh.material, texel, strict=True)])
    from_shape = shape.color_at(middle, mesh.material) * 255
    assert (np.abs(from_texture - from_shape).max(1) < 1).mean() > 0.99
