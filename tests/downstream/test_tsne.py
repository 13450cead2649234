import numpy as np
import pytest

from downstream.classification import tsne as script
from tests.support.pairs import write_demo_set
from utils.errors import UserError

SMALL = ["--dataset", "demo", "--random_init", "--calibrate_bn", "--emb_dims", "8", "--k", "3", "--device", "cpu"]


def run(tmp_path, *arguments):
    common = [*SMALL, "--data_root", tmp_path, "--num_points", 32, "--output", tmp_path / "out" / "map.png"]
    return script.main([str(a) for a in (*common, *arguments)])


def test_the_map_is_drawn_and_its_numbers_lie_beside_it(tmp_path, monkeypatch):
    write_demo_set(tmp_path, test=5)
    drawn, keep = [], script.save_figure
    monkeypatch.setattr(script, "save_figure", lambda figure, path: (drawn.append(figure), keep(figure, path)))
    metrics = run(tmp_path, "--max_clouds", 12, "--split", "train", "--perplexity", 2)
    assert metrics["clouds"] == 12 and metrics["data"]["clouds"] == 30 and (tmp_path / "out" / "map.png").stat().st_size
    with np.load(tmp_path / "out" / "map.npz") as numbers:
        assert numbers["features"].shape == (12, 16) and numbers["embedding"].shape == (12, 2)
        assert list(numbers["class_names"]) == ["ball", "plate", "rod"]
        labels, embedding = numbers["labels"], numbers["embedding"]
    (axes,) = drawn[0].axes
    for series, label in zip(axes.collections, np.unique(labels), strict=True):
        np.testing.assert_allclose(series.get_offsets(), embedding[labels == label], rtol=1e-6)
    assert [text.get_text() for text in drawn[0].legends[0].get_texts()] == ["ball", "plate", "rod"]


def test_clusters_stay_apart_and_the_map_is_repeated_by_its_seed():
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1, 2], 20)
    features = (10 * np.eye(3)[labels] + rng.normal(size=(60, 3))).astype("f4")
    first, second = (script.embed(features, perplexity=10.0, seed=3) for _ in range(2))
    np.testing.assert_array_equal(first, second)
    distance = np.linalg.norm(first[:, None] - first[None], axis=2) + 1e9 * np.eye(60)
    assert (labels[distance.argmin(1)] == labels).all()


@pytest.mark.parametrize("value", [0.0, 0.1])  # the mean of many 0.1 is another number
def test_equal_features_are_refused(value):
    with pytest.raises(UserError, match="all 50 clouds have the same features"):
        script.embed(np.full((50, 3), value, np.float32), perplexity=10.0, seed=0)


def test_forty_classes_look_different():
    assert len(set(script.class_styles(40))) == 40


def test_what_cannot_be_mapped_is_said(tmp_path):
    write_demo_set(tmp_path, test=1)
    with pytest.raises(UserError, match="at least 4 clouds, there are 3"):
        run(tmp_path)
    with pytest.raises(UserError, match="a map shows one encoder, got 2"):
        run(tmp_path, "--seeds", 1, 2)
    for output in (tmp_path / "map.txt", ""):
        with pytest.raises(UserError, match="must end in one of"):
            run(tmp_path, "--output", output)


def test_numbers_of_an_earlier_map_are_not_overwritten_silently(tmp_path):
    write_demo_set(tmp_path, test=5)
    numbers = tmp_path / "out" / "map.npz"
    numbers.parent.mkdir()
    numbers.write_bytes(b"mine")
    with pytest.raises(UserError, match=r"map.npz exists: replace it with --overwrite"):
        run(tmp_path)
    assert numbers.read_bytes() == b"mine"
    run(tmp_path, "--overwrite")
    with np.load(numbers) as arrays:
        assert len(arrays["labels"]) == 15
    assert {path.name for path in numbers.parent.iterdir()} == {"map.png", "map.npz"}
