"""The committed part and room sets are complete, labeled and small, and their generators work."""

import h5py
import numpy as np
import pytest

from data.demo_makers import demo_parts, demo_rooms, make_demo, make_demo_segmentation
from datasets.s3dis import AREAS, BLOCK_FOLDER, CLASS_NAMES, ROOM_FOLDER, S3DIS, S3DISRooms, area_of
from datasets.shapenet_part import ShapeNetPart
from tests.support.paths import DEMO
from utils.errors import DataError, UserError

PART_FOLDER = make_demo_segmentation.PART_FOLDER
FOLDERS = (PART_FOLDER, BLOCK_FOLDER, ROOM_FOLDER)


@pytest.fixture(scope="module", params=["train", "val", "test"])
def parts(request):
    return ShapeNetPart(DEMO, request.param)


def test_part_reader_finds_the_numbers_of_shapes(parts):
    per_category = make_demo_segmentation.PART_SHAPES[parts.split]
    assert parts.points.shape == (per_category * len(demo_parts.CATEGORIES), 1024, 3)
    assert (np.bincount(parts.categories) == per_category).all()
    assert parts.taxonomy.category_names == tuple(demo_parts.CATEGORIES)
    assert parts.taxonomy.part_counts == tuple(len(names) for _, names in demo_parts.CATEGORIES.values())
    assert parts.taxonomy.part_names[0] == "airplane body"


def test_every_part_is_in_every_split_and_never_alone(parts):
    """No part is missing from a split, and no shape has only one part: its label would be the category."""
    assert set(np.unique(parts.parts)) == set(range(parts.taxonomy.num_parts))
    assert min(len(np.unique(labels)) for labels in parts.parts) >= 2
    share = np.bincount(parts.parts.ravel(), minlength=parts.taxonomy.num_parts) / parts.parts.size
    assert share.min() > 0.0005


def test_shapes_lie_in_the_unit_sphere_and_differ(parts):
    norms = np.linalg.norm(parts.points, axis=2)
    np.testing.assert_allclose(norms.max(axis=1), 1, atol=2e-3)
    np.testing.assert_allclose(parts.points.mean(axis=1), 0, atol=2e-3)
    assert len(np.unique(parts.points.reshape(len(parts), -1), axis=0)) == len(parts)


@pytest.mark.parametrize(
    ("category", "upper", "lower"),
    [
        ("table", "top", "leg"),
        ("chair", "back", "seat"),
        ("chair", "seat", "leg"),
        ("bottle", "cap", "body"),
        ("bed", "pillow", "mattress"),
        ("bed", "mattress", "frame"),
        ("guitar", "head", "body"),
    ],
)
def test_parts_are_where_they_belong_with_y_up(category, upper, lower):
    data = ShapeNetPart(DEMO, "test", class_choice=category)
    names = demo_parts.CATEGORIES[category][1]
    start = data.taxonomy.part_starts[data.category]
    for points, labels in zip(data.points, data.parts, strict=True):
        heights = [points[labels == start + names.index(name), 1].mean() for name in (upper, lower)]
        assert heights[0] > heights[1]


def test_splits_share_no_shape():
    clouds = np.concatenate([ShapeNetPart(DEMO, split).points for split in ("trainval", "test")])
    sizes = np.ptp(clouds, axis=1)
    assert len(np.unique(sizes, axis=0)) == len(sizes)


def test_readme_gives_the_counts_of_the_labeled_sets():
    text = (DEMO / "README.md").read_text("utf-8")
    shapes = sum(len(ShapeNetPart(DEMO, split)) for split in ("trainval", "test"))
    assert f"## {PART_FOLDER}: {shapes} shapes with parts" in text
    blocks = len(S3DIS(DEMO, AREAS)), sum(len(S3DISRooms(DEMO, area)) for area in AREAS)
    assert f"({blocks[0]} blocks)" in text and f"({blocks[1]} blocks, " in text
    for name, (_, names) in demo_parts.CATEGORIES.items():
        assert f"| {name} | {', '.join(names)} |" in text


def test_labeled_sets_are_small_enough_to_commit():
    sizes = [path.stat().st_size for folder in FOLDERS for path in (DEMO / folder).iterdir() if path.is_file()]
    assert max(sizes) <= make_demo.MAX_FILE_BYTES
    assert sum(sizes) <= 13_000_000


# --- rooms


@pytest.mark.parametrize("area", AREAS)
def test_every_area_has_rooms_with_most_classes(area):
    blocks = S3DIS(DEMO, [area], in_channels=9)
    assert 2 <= len(blocks.rooms) <= 3
    assert len(blocks) >= 10 * len(blocks.rooms)
    found = set(np.unique(blocks.labels))
    assert found <= set(range(len(CLASS_NAMES)))
    names = {CLASS_NAMES[i] for i in found}
    assert names >= set(CLASS_NAMES) - {"sofa", "bookcase"}
    assert blocks.block_points == 1024


def test_all_classes_are_there():
    assert set(np.unique(S3DIS(DEMO, AREAS).labels)) == set(range(len(CLASS_NAMES)))


def test_block_values_have_the_meaning_of_s3dis():
    blocks = S3DIS(DEMO, [1], in_channels=9)
    values = np.stack([blocks[i][0].numpy() for i in range(len(blocks))])
    assert np.abs(values[..., :2]).max() <= 0.51, "x and y from the middle of a block of 1 m"
    assert values[..., 2].min() == 0 and 2.3 < values[..., 2].max() < 3.2, "z from the floor"
    assert values[..., 3:].min() >= 0 and values[..., 3:].max() <= 1.001
    assert np.ptp(values[..., 3:6], axis=(0, 1)).min() > 0.5, "colors"


@pytest.mark.parametrize("area", AREAS)
def test_whole_rooms_have_every_point_with_z_up(area):
    rooms = S3DISRooms(DEMO, area, in_channels=9)
    assert rooms.rooms == S3DIS(DEMO, [area]).rooms
    for number in range(len(rooms.rooms)):
        points, labels = rooms.room_cloud(number)
        assert len(points) == rooms.room_size(number) > 5000
        heights = {name: points[labels == i, 2] for i, name in enumerate(CLASS_NAMES) if (labels == i).any()}
        top = points[:, 2].max()
        np.testing.assert_allclose(heights["floor"], 0, atol=0.02)
        np.testing.assert_allclose(heights["ceiling"], top, atol=0.02)
        assert heights["door"].min() < 0.1
        for name in ("chair", "table", "sofa", "bookcase"):
            if name in heights:
                assert heights[name].min() < 0.15, f"{name} stands on the floor"
        for name in ("board", "window"):
            if name in heights:
                assert heights[name].mean() > 0.4
        wall = points[labels == CLASS_NAMES.index("wall"), :2]
        high = points[:, :2].max(axis=0)
        assert (np.minimum(wall, high - wall).min(axis=1) < 0.03).all()


# --- the generators


def solids_of_every_kind():
    box = demo_parts.box("a", (0, 0, 0), (2, 2, 2))
    return {
        "box": box,
        "turned": box.moved(demo_parts.about("y", 30), (1, 2, 3)),
        "lathe": demo_parts.lathe("a", [(0.001, 0), (1, 0), (0.6, 1), (0.001, 1)]),
        "tube": demo_parts.tube("a", [(0, 0, 0), (0, 2, 0), (1, 3, 0)], 0.2),
        "ball": demo_parts.hull("a", demo_parts.ball(1.0)),
    }


@pytest.mark.parametrize("name", solids_of_every_kind())
def test_solid_contains_what_lies_within_its_surface(name):
    solid = solids_of_every_kind()[name]
    triangles, step = solid.triangles, 0.02
    if name == "tube":  # it claims the inner circle of its polygon only, and its ends are round
        triangles, step = triangles[triangles.max(1) < len(solid.vertices) - 2], 0.05
    corners = solid.vertices[triangles]
    normal = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    size = np.linalg.norm(normal, axis=1)
    kept = size > 0.005  # not the pin hole along the axis of a lathe
    middle, normal = corners[kept].mean(1), normal[kept] / size[kept, None]
    assert len(middle) >= 12
    sides = np.stack([solid.contains(middle + sign * step * normal) for sign in (-1, 1)])
    assert (sides.sum(0) == 1).all(), "one side of a face is inside, the other outside"
    assert not solid.contains(np.array([[9.0, 9.0, 9.0]])).any()


def test_turning_moves_the_third_axis_as_the_right_hand_does():
    np.testing.assert_allclose(demo_parts.about("z", 90) @ [1, 0, 0], [0, 1, 0], atol=1e-12)
    np.testing.assert_allclose(demo_parts.about("x", 90) @ [0, 1, 0], [0, 0, 1], atol=1e-12)


def test_no_point_is_drawn_inside_another_part():
    large = demo_parts.box("large", (0, 0, 0), (2, 2, 2))
    small = demo_parts.box("small", (0, 1, 0), (1, 1, 1))
    points, names = demo_parts.draw_points([large, small], 4000, seed=3)
    names = np.array(names)
    assert (np.abs(points[names == "large"]).max(1) > 0.999).all()
    top = points[names == "large"]
    top = top[(top[:, 1] > 0.999) & (np.abs(top[:, [0, 2]]) < 0.49).all(1)]
    assert len(top) == 0, "the plate under the small box is hidden"
    assert points[names == "small", 1].min() >= 1 - 1e-9
    # Seen of the small box: its top of 1 x 1 and four sides of 1 x 0.5; of the large one all but 1 of 24.
    assert (names == "small").mean() == pytest.approx(3 / (3 + 23), abs=0.02)


@pytest.mark.parametrize("category", ["lamp", "mug"])
def test_objects_depend_on_their_number_and_seed_only(category):
    first, labels = demo_parts.build_object(category, "train", 3, seed=5, count=200)
    again, same = demo_parts.build_object(category, "train", 3, seed=5, count=200)
    np.testing.assert_array_equal(first, again)
    np.testing.assert_array_equal(labels, same)
    for other in (("test", 3, 5), ("train", 4, 5), ("train", 3, 6)):
        cloud, _ = demo_parts.build_object(category, other[0], other[1], seed=other[2], count=200)
        assert np.abs(cloud - first).max() > 0.01


def test_committed_shape_is_what_the_generator_makes():
    """Rebuild the first shapes of the file; only rounding to the stored steps may differ."""
    data = ShapeNetPart(DEMO, "test", class_choice="mug")
    cloud, labels = demo_parts.build_object("mug", "test", 0, seed=1, count=1024)
    gaps = np.abs(data.points - cloud).max(axis=(1, 2))
    assert gaps.min() < 1e-3
    np.testing.assert_array_equal(data.parts[gaps.argmin()] - data.taxonomy.part_starts[data.category], labels)


@pytest.fixture(scope="module")
def models():
    """Models of area 1."""
    pack = DEMO / make_demo.PACK_NAME
    with h5py.File(pack, "r") as file:
        keys = [name.split("/")[-1] for name in file["ids"].asstr()[:]]
        classes = dict(zip(keys, file["catalogue/class"].asstr()[:], strict=True))
    return demo_rooms.share_out(demo_rooms.read_things(pack, demo_rooms.is_used), classes, seed=1)


def test_areas_have_other_chairs_and_sofas(models):
    for kind in ("chair", "sofa", "table"):
        for i, area in enumerate(models):
            assert len(area[kind]) >= 2
            assert {t.key for t in area[kind]}.isdisjoint(t.key for other in models[:i] for t in other[kind])


def test_models_listed_by_name_exist(models):
    listed = {key for keys in demo_rooms.SMALL_THINGS.values() for key in keys.split()}
    with h5py.File(DEMO / make_demo.PACK_NAME, "r") as file:
        there = {name.split("/")[-1] for name in file["ids"].asstr()[:]}
    assert listed <= there


@pytest.mark.parametrize(("area", "number"), [(1, 0), (2, 1), (6, 2)])
def test_furniture_stands_and_does_not_run_into_other_things(models, area, number):
    room = demo_rooms.plan_room(area, number, models[area - 1], seed=1)
    assert len(room.stands) >= 8
    tables = [box for kind, box in room.stands if kind in ("table", "coffee", "desk_table")]
    for i, (kind, box) in enumerate(room.stands):
        assert (box.low > -1e-6).all() and (box.high < room.size + 1e-6).all(), f"{kind} is inside the room"
        on_table = any(abs(box.low[2] - t.high[2]) < 1e-6 and t.low[0] < box.low[0] < t.high[0] for t in tables)
        hangs = kind in ("window", "board", "wall", "beam")
        assert box.low[2] == 0 or on_table or hangs, f"{kind} stands on something"
        for other_kind, other in room.stands[:i]:
            shared = np.minimum(box.high, other.high) - np.maximum(box.low, other.low)
            if {kind, other_kind} & {"chair"} and {kind, other_kind} & {"table", "desk_table"}:
                assert shared[:2].min() < 0.25, "a chair is drawn up to its table, not standing in it"
            else:
                assert shared.min() < 1e-6, f"{kind} and {other_kind} meet"


def test_rooms_depend_on_their_number_and_seed_only(models):
    first, again = (demo_rooms.build_room(1, 0, models[0], seed=1) for _ in range(2))
    np.testing.assert_array_equal(first.xyz, again.xyz)
    np.testing.assert_array_equal(first.rgb, again.rgb)
    np.testing.assert_array_equal(first.labels, again.labels)
    assert area_of(first.name) == 1
    other = demo_rooms.build_room(1, 0, models[0], seed=2)
    assert len(other.xyz) != len(first.xyz)
    on_grid = first.xyz / demo_rooms.GRID
    np.testing.assert_array_equal(on_grid, np.rint(on_grid))


def test_walls_leave_out_doors_and_windows(models):
    room = demo_rooms.plan_room(1, 0, models[0], seed=1)
    points = np.concatenate([p for p, _, label in room.points if label[0] == CLASS_NAMES.index("wall")])
    assert len(room.openings) >= 2
    for wall, low, high in room.openings:
        along, away = (0, 1) if wall % 2 == 0 else (1, 0)
        at_wall = np.isclose(points[:, away], room.size[away] if wall in (0, 1) else 0.0)
        flat = points[at_wall][:, [along, 2]]
        assert len(flat) > 100
        assert not ((flat > low) & (flat < high)).all(1).any()


# --- the command


def test_parts_are_written_in_the_official_layout(tmp_path):
    shapes = {"train": 1, "val": 1, "test": 1}
    sizes = make_demo_segmentation.write_parts(tmp_path, points=64, seed=2, shapes=shapes)
    assert sizes == {"train": 8, "val": 8, "test": 8}
    folder = tmp_path / PART_FOLDER
    assert (folder / "train_hdf5_file_list.txt").read_text() == "ply_data_train0.h5\n"
    assert (folder / "all_object_categories.txt").read_text().startswith("Airplane\t02691156\n")
    with h5py.File(folder / "ply_data_val0.h5") as file:
        assert file["data"].shape == (8, 64, 3) and file["data"].dtype == np.float16
        assert file["label"].shape == (8, 1) and file["pid"].shape == (8, 64) and file["pid"].dtype == np.uint8
    assert len(ShapeNetPart(tmp_path, "trainval")) == 16


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_set_of_the_user_is_not_overwritten(tmp_path, folder):
    (tmp_path / folder).mkdir()
    path = tmp_path / folder / "ply_data_all_0.h5"
    with h5py.File(path, "w") as file:
        file["data"] = np.zeros((1, 4, 9))
    with pytest.raises(UserError, match="is not a demo set"):
        make_demo_segmentation.main(["--pack", str(DEMO / make_demo.PACK_NAME), "--out", str(tmp_path)])
    with h5py.File(path) as file:
        assert file["data"].shape == (1, 4, 9)


def test_missing_pack_is_named(tmp_path):
    with pytest.raises(DataError, match="make_demo.py"):
        make_demo_segmentation.main(["--pack", str(tmp_path / "no.h5"), "--out", str(tmp_path)])


def test_readme_sections_are_replaced_and_the_rest_is_kept(tmp_path):
    (tmp_path / "README.md").write_text(f"# The demo set\n\nkept\n\n## {PART_FOLDER}: 1 shapes\n\nold\n")
    sizes = make_demo_segmentation.write_parts(tmp_path, points=16, seed=1, shapes={"train": 1, "val": 1, "test": 1})
    rng = np.random.default_rng(0)
    rooms = [
        demo_rooms.Room(
            f"Area_{a}_office_1", rng.uniform(0, 2, (1000, 3)), np.zeros((1000, 3), np.float32), np.zeros(1000, "u1")
        )
        for a in AREAS
    ]
    counts = make_demo_segmentation.write_rooms(tmp_path, rooms, block_points=32, seed=1)
    make_demo_segmentation.write_readme(tmp_path, sizes, rooms, counts, "the command")
    text = (tmp_path / "README.md").read_text()
    assert "kept" in text and "old" not in text and "the command" in text
    assert text.count(f"## {PART_FOLDER}") == 1
    assert f"({counts['train']} blocks)" in text and "| 6 | office | 1000 |" in text
