import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import metrics as benchmark
from benchmarks.reference import literal_metrics
from datasets.shapenet_part import PartTaxonomy, official_taxonomy
from downstream.metrics import confusion_matrix, part_scores, semantic_scores

SEEDS = st.integers(0, 2**32 - 1)


def random_shapes(taxonomy, *, count, size, seed):
    """Draw true and predicted parts, and categories; a part may be absent, a prediction of another category."""
    generator = np.random.default_rng(seed)
    categories = generator.integers(len(taxonomy.category_names), size=count)
    starts, counts = np.array(taxonomy.part_starts)[categories, None], np.array(taxonomy.part_counts)[categories, None]
    truth = starts + generator.integers(1 << 20, size=(count, size)) % counts
    anything = generator.integers(taxonomy.num_parts, size=truth.shape)
    predicted = np.where(generator.random(truth.shape) < 0.4, anything, truth)
    return truth, predicted, categories


# --- classes ---


@settings(max_examples=40, deadline=None)
@given(seed=SEEDS, classes=st.integers(1, 9), points=st.integers(1, 60))
def test_semantic_scores_equal_the_literal_loop(seed, classes, points):
    generator = np.random.default_rng(seed)
    truth, predicted = generator.integers(classes, size=(2, points)), generator.integers(classes, size=(2, points))
    confusion = confusion_matrix(truth, predicted, classes)
    np.testing.assert_array_equal(confusion, literal_metrics.confusion(truth, predicted, classes))
    scores = semantic_scores(confusion)
    overall, accuracy, iou = literal_metrics.semantic(truth, predicted, classes)
    assert scores.overall_accuracy == pytest.approx(overall)
    assert scores.mean_accuracy == pytest.approx(np.mean(list(accuracy.values())))
    assert scores.mean_iou == pytest.approx(np.mean(list(iou.values())))
    for table, values in ((accuracy, scores.class_accuracy), (iou, scores.class_iou)):
        np.testing.assert_allclose(values, [table.get(c, np.nan) for c in range(classes)])
    assert scores.absent == tuple(str(c) for c in range(classes) if c not in iou)
    assert scores.unlabeled == tuple(str(c) for c in range(classes) if c not in accuracy)


def test_a_hand_made_case():
    #            wall x3, floor x1; one wall point is called floor, 'beam' never occurs
    scores = semantic_scores(confusion_matrix([0, 0, 0, 1], [0, 0, 1, 1], 3), ["wall", "floor", "beam"])
    assert scores.overall_accuracy == 75
    np.testing.assert_allclose(scores.class_iou, [200 / 3, 50, np.nan])
    assert scores.mean_iou == pytest.approx((200 / 3 + 50) / 2)
    assert scores.mean_accuracy == pytest.approx((200 / 3 + 100) / 2)
    assert scores.absent == scores.unlabeled == ("beam",)
    assert scores.as_dict()["class_iou"] == {"wall": pytest.approx(200 / 3), "floor": 50.0, "beam": None}
    assert scores.as_dict()["absent_classes"] == ["beam"]


def test_a_class_that_is_only_predicted_counts_as_zero():
    scores = semantic_scores(confusion_matrix([0, 0], [0, 1], 2), ["wall", "beam"])
    np.testing.assert_array_equal(scores.class_iou, [50, 0])
    assert (scores.mean_iou, scores.absent, scores.unlabeled) == (25, (), ("beam",))


def test_confusions_of_batches_add_up():
    generator = np.random.default_rng(0)
    truth, predicted = generator.integers(5, size=(4, 100)), generator.integers(5, size=(4, 100))
    parts = sum(confusion_matrix(t, p, 5) for t, p in zip(truth, predicted, strict=True))
    np.testing.assert_array_equal(parts, confusion_matrix(torch.tensor(truth), predicted.astype(np.uint8), 5))


def test_wrong_input_to_the_confusion_matrix():
    with pytest.raises(ValueError, match=r"true labels must be in 0\.\.2, but are in 0\.\.3"):
        confusion_matrix([0, 3], [0, 0], 3)
    with pytest.raises(ValueError, match=r"predicted labels must be in 0\.\.2, but are in -1\.\.0"):
        confusion_matrix([0, 0], [0, -1], 3)
    with pytest.raises(ValueError, match="must be integers"):
        confusion_matrix([0.5], [0], 3)
    with pytest.raises(ValueError, match="do not match"):
        confusion_matrix([0, 1], [0], 3)
    with pytest.raises(ValueError, match="confusion matrix is empty"):
        semantic_scores(np.zeros((3, 3), int))
    with pytest.raises(ValueError, match="must be square"):
        semantic_scores(np.ones((3, 2), int))
    with pytest.raises(ValueError, match="2 class names"):
        semantic_scores(np.ones((3, 3), int), ["a", "b"])


# --- parts ---

WIDE = PartTaxonomy.build(["many", "one"], [300, 1])  # more parts than a byte numbers
DEEP = PartTaxonomy.build(["many", "one"], [20, 1])  # few parts, but more pairs of them than a byte numbers
MANY = PartTaxonomy.build(
    [f"category {i}" for i in range(100)], [3] * 100
)  # few parts each, in all too many for a byte


@settings(max_examples=40, deadline=None)
@given(seed=SEEDS, taxonomy=st.sampled_from([official_taxonomy(), WIDE, DEEP, MANY]), size=st.integers(1, 40))
def test_part_scores_equal_the_literal_loop(seed, taxonomy, size):
    truth, predicted, categories = random_shapes(taxonomy, count=5, size=size, seed=seed)
    scores = part_scores(truth, predicted, categories, taxonomy)
    literal = literal_metrics.shape_ious_by_point(truth, predicted, categories, taxonomy)
    np.testing.assert_allclose(literal_metrics.shape_ious_by_mask(truth, predicted, categories, taxonomy), literal)
    np.testing.assert_allclose(scores.shape_iou, literal, atol=1e-9)
    assert scores.instance_miou == pytest.approx(literal.mean())
    by_category = {taxonomy.category_names[c]: literal[categories == c].mean() for c in np.unique(categories)}
    assert scores.category_miou == pytest.approx(by_category)
    assert scores.class_miou == pytest.approx(np.mean(list(by_category.values())))
    assert scores.accuracy == pytest.approx(100 * np.mean(truth == predicted))
    recall = [np.mean(predicted[truth == part] == part) for part in np.unique(truth)]
    assert scores.mean_part_accuracy == pytest.approx(100 * np.mean(recall))


def test_many_shapes_are_counted_in_pieces():
    taxonomy = official_taxonomy()
    truth, predicted, categories = random_shapes(taxonomy, count=700, size=400, seed=0)
    whole = part_scores(truth, predicted, categories, taxonomy).shape_iou
    np.testing.assert_allclose(whole, literal_metrics.shape_ious_by_mask(truth, predicted, categories, taxonomy))


def test_an_absent_part_counts_as_one():
    taxonomy = PartTaxonomy.build(["chair", "mug"], [3, 2])
    # A chair without its third part, all right; a mug with half its points wrong; 'mug' part 4 predicted on a chair.
    truth = np.array([[0, 0, 1, 1], [3, 3, 4, 4], [0, 0, 0, 0]])
    predicted = np.array([[0, 0, 1, 1], [3, 3, 3, 3], [0, 0, 0, 4]])
    scores = part_scores(truth, predicted, np.array([0, 1, 0]), taxonomy)
    np.testing.assert_allclose(scores.shape_iou, [100, 25, 100 * (0.75 + 1 + 1) / 3])
    assert scores.category_miou == pytest.approx({"chair": (100 + 275 / 3) / 2, "mug": 25})
    assert scores.category_shapes == {"chair": 2, "mug": 1} and scores.absent == ()


def test_a_part_that_is_only_predicted_counts_as_zero():
    taxonomy = PartTaxonomy.build(["chair"], [2])
    scores = part_scores(np.zeros((1, 4), int), np.array([[0, 0, 0, 1]]), np.zeros(1, int), taxonomy)
    np.testing.assert_allclose(scores.shape_iou, [75 / 2])


def test_categories_without_shapes_are_named_and_in_no_mean():
    taxonomy = PartTaxonomy.build(["chair", "mug", "lamp"], [1, 1, 2])
    scores = part_scores(np.full((1, 2), 1), np.full((1, 2), 1), np.array([1]), taxonomy)
    assert scores.absent == ("chair", "lamp") and scores.class_miou == scores.instance_miou == 100
    assert scores.as_dict()["absent_categories"] == ["chair", "lamp"]
    assert scores.as_dict()["category_miou"] == {"mug": 100.0}


def test_wrong_input_to_the_part_scores():
    taxonomy = PartTaxonomy.build(["chair", "mug"], [3, 2])
    good = np.zeros((2, 4), int), np.zeros((2, 4), int), np.zeros(2, int)

    def wrong(position, value):
        return part_scores(*good[:position], np.asarray(value), *good[position + 1 :], taxonomy)

    with pytest.raises(ValueError, match=r"shape 1 has true parts that its category 'chair' does not have"):
        wrong(0, [[0, 1, 2, 2], [0, 1, 2, 3]])
    with pytest.raises(ValueError, match=r"shape 0 .* category 'mug'"):
        wrong(2, [1, 0])
    smaller_first = PartTaxonomy.build(["mug", "chair"], [2, 3])
    with pytest.raises(ValueError, match=r"shape 0 .* category 'mug' does not have"):
        part_scores(np.array([[0, 1, 2]]), np.array([[0, 1, 1]]), np.zeros(1, int), smaller_first)
    with pytest.raises(ValueError, match=r"predicted parts must be in 0\.\.4, but are in 0\.\.5"):
        wrong(1, [[0, 1, 2, 5], [0, 0, 0, 0]])
    with pytest.raises(ValueError, match="categories must be in"):
        wrong(2, [0, 2])
    with pytest.raises(ValueError, match=r"expected \(n, N\)"):
        wrong(1, [0, 0])
    with pytest.raises(ValueError, match="no shapes to score"):
        part_scores(np.zeros((0, 4), int), np.zeros((0, 4), int), np.zeros(0, int), taxonomy)


def test_labels_may_be_bytes_or_tensors_and_stay_untouched():
    taxonomy = official_taxonomy()
    truth, predicted, categories = random_shapes(taxonomy, count=20, size=30, seed=1)
    expected = part_scores(truth, predicted, categories, taxonomy)
    copies = truth.astype(np.uint8), predicted.astype(np.uint8)
    scores = part_scores(*copies, categories, taxonomy)
    np.testing.assert_array_equal(copies, (truth, predicted))
    assert scores.as_dict() == expected.as_dict()
    tensors = (torch.tensor(array) for array in (truth, predicted, categories))
    assert part_scores(*tensors, taxonomy).as_dict() == expected.as_dict()


def test_the_benchmark_compares_with_the_loops_before_it_reports(tmp_path, monkeypatch):
    small = ["--shapes", "6", "--points", "30", "--json", str(tmp_path / "times.json")]
    assert set(benchmark.main(small)) == set(json.loads((tmp_path / "times.json").read_text()))
    monkeypatch.setattr(benchmark, "shape_ious_by_mask", lambda truth, *_: np.zeros(len(truth)))
    with pytest.raises(AssertionError):
        benchmark.main(small)


@settings(max_examples=20, deadline=None)
@given(seed=SEEDS)
def test_part_scores_of_the_known_points_alone_equal_the_literal_loop(seed):
    taxonomy = official_taxonomy()
    truth, predicted, categories = random_shapes(taxonomy, count=5, size=12, seed=seed)
    known = np.random.default_rng(seed).random(truth.shape) < 0.4
    known[0, 0] = True
    scores = part_scores(truth, predicted, categories, taxonomy, known=known)
    expected = [
        literal_metrics.shape_ious_by_point(t[k][None], p[k][None], [category], taxonomy)[0]
        for t, p, k, category in zip(truth, predicted, known, categories, strict=True)
    ]
    np.testing.assert_allclose(scores.shape_iou, expected)
    assert scores.accuracy == pytest.approx(100 * np.mean(truth[known] == predicted[known]))
