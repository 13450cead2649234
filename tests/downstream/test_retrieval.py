import numpy as np
import pytest
from sklearn.metrics import average_precision_score

from downstream.retrieval import average_precisions, chance_scores, match_ranks, nearest, recall_scores, unit_features


def clouds_of_features(seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(3, size=40)
    return (rng.normal(size=(3, 6))[labels] + rng.normal(size=(40, 6)) + 5).astype(np.float32), labels


def one_by_one(features, labels):
    """Average precision of every query by sklearn."""
    x = features.astype(float) - features.astype(float).mean(0)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    scores = []
    for i in range(len(x)):
        others = np.arange(len(x)) != i
        scores.append(average_precision_score(labels[others] == labels[i], x[others] @ x[i]))
    return np.array(scores)


@pytest.mark.parametrize("block", [1, 7, 40, 512])
def test_equals_sklearn_for_every_block_size(block):
    features, labels = clouds_of_features()
    expected = one_by_one(features, labels)
    np.testing.assert_allclose(average_precisions(features, labels, block=block), expected, atol=1e-12)


def test_worked_example():
    # Unit vectors on a circle, mean zero: each item has one twin beside it and two others opposite.
    features = np.array([[1.0, 0.1], [1.0, -0.1], [-1.0, 0.1], [-1.0, -0.1]])
    np.testing.assert_allclose(average_precisions(features, np.array([0, 0, 1, 1])), 1)
    # For every query the twin is of the other class, as is one item opposite: the hit comes second or third.
    values = average_precisions(features, np.array([0, 1, 0, 1]))
    np.testing.assert_allclose(values, [1 / 2, 1 / 2, 1 / 2, 1 / 2])
    np.testing.assert_allclose(average_precisions(features, np.array([0, 1, 1, 0])), [1 / 3] * 4)


def test_offset_and_scale_of_the_features_do_not_matter():
    features, labels = clouds_of_features(1)
    features = features.astype(float)
    np.testing.assert_allclose(average_precisions(1000 + 3 * features, labels), average_precisions(features, labels))


def test_a_query_without_others_of_its_class_is_left_out():
    features, labels = clouds_of_features()
    labels[4] = 77
    values = average_precisions(features, labels)
    assert np.flatnonzero(np.isnan(values)).tolist() == [4]


@pytest.mark.parametrize("value", [0.0, 0.1, 1e8])
def test_features_that_say_nothing_score_the_share_of_the_class_in_any_order(value):
    labels = np.repeat([0, 1], [6, 4])
    expected = np.where(labels, 3 / 9, 5 / 9)
    features = np.full((10, 3), value, np.float32)
    np.testing.assert_allclose(average_precisions(features, labels), expected)
    np.testing.assert_allclose(average_precisions(features, labels[::-1]), expected[::-1])


def test_order_of_the_items_is_irrelevant():
    features, labels = clouds_of_features(2)
    features[10] = features[20] = features[30]  # ties
    order = np.random.default_rng(0).permutation(len(labels))
    expected = average_precisions(features, labels)[order]
    np.testing.assert_allclose(average_precisions(features[order], labels[order]), expected)


def test_nearest_neighbors_are_the_most_similar_others():
    features, _ = clouds_of_features(3)
    x = unit_features(features)
    found = nearest(features, np.array([3, 17]), 5)
    for query, neighbors in zip((3, 17), found, strict=True):
        similarity = x @ x[query]
        assert query not in neighbors
        expected = np.argsort(-np.delete(similarity, query))[:5]
        np.testing.assert_array_equal(neighbors, np.delete(np.arange(len(x)), query)[expected])
    assert nearest(features, np.array([0]), 999).shape == (1, len(features) - 1)


def test_bad_input_is_refused():
    features, labels = clouds_of_features()
    with pytest.raises(ValueError, match="with \\(n,\\) labels"):
        average_precisions(features, labels[:-1])
    features[0, 0] = np.inf
    with pytest.raises(ValueError, match="not finite"):
        average_precisions(features, labels)


@pytest.mark.parametrize("block", [1, 7, 512])
def test_recall_of_pairs_equals_a_literal_loop(block):
    rng = np.random.default_rng(3)
    gallery = rng.normal(size=(30, 5))
    queries = 3 * (gallery + rng.normal(size=(30, 5)))
    ranks = match_ranks(queries, gallery, block=block)
    found = {1: 0, 5: 0, 10: 0}
    for i, query in enumerate(queries):
        cosines = [query @ item / np.linalg.norm(query) / np.linalg.norm(item) for item in gallery]
        order = sorted(range(30), key=lambda j: -cosines[j])
        assert ranks[i] == 1 + order.index(i)
        for k in found:
            found[k] += i in order[:k]
    scores = recall_scores(ranks)
    assert scores == pytest.approx(
        {**{f"recall_at_{k}": 100 * n / 30 for k, n in found.items()}, "median_rank": np.median(ranks)}
    )
    assert scores["recall_at_1"] > chance_scores(30)["recall_at_1"] == 100 / 30
    assert recall_scores(match_ranks(gallery, gallery))["median_rank"] == 1


def test_embeddings_that_say_nothing_give_the_mean_rank_of_chance():
    same = np.full((20, 3), 0.1)
    assert (match_ranks(same, same) == 10.5).all() and chance_scores(20)["median_rank"] == 10.5
    assert recall_scores(match_ranks(same, same))["recall_at_10"] == 0 and chance_scores(4)["recall_at_5"] == 100
    with pytest.raises(ValueError, match="two arrays"):
        match_ranks(same, same[:5])
    with pytest.raises(ValueError, match="not finite"):
        match_ranks(same, same * np.nan)
