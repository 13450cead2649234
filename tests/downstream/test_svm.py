import numpy as np
import pytest
from sklearn.model_selection import StratifiedKFold, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC

from downstream.svm import cross_validate, draw_labels, few_label_svm, linear_svm, mean_and_std


def problem(seed=0, train=120, test=60, classes=4):
    """Noisy classes whose labels are not consecutive: (train_x, train_y, test_x, test_y)."""
    rng = np.random.default_rng(seed)
    labels = rng.choice([1, 5, 7, 22, 30, 33][:classes], train + test)
    x = (rng.normal(size=(40, 30))[labels] * 0.6 + rng.normal(size=(train + test, 30)) + 2).astype(np.float32)
    return x[:train], labels[:train], x[train:], labels[train:]


@pytest.mark.parametrize("c", [0.001, 0.1, 1.0, 10.0])
@pytest.mark.parametrize(("classes", "seed"), [(2, 0), (4, 1), (6, 2)])
def test_predicts_what_the_linear_kernel_predicts(classes, seed, c):
    train_x, train_y, test_x, test_y = problem(seed, classes=classes)
    reference = SVC(kernel="linear", C=c).fit(train_x, train_y)
    result = linear_svm(train_x, train_y, test_x, test_y, c_values=[c])
    np.testing.assert_array_equal(result.predictions, reference.predict(test_x))
    assert result.accuracy == pytest.approx(100 * reference.score(test_x, test_y))
    assert (result.c, dict(result.cv_accuracy)) == (c, {})


def test_cross_validation_equals_sklearns():
    train_x, train_y, _, _ = problem()
    x, values = train_x.astype(float), [0.001, 0.01, 1.0]
    ours = cross_validate(x, x @ x.T, train_y, c_values=values, folds=4, seed=3)
    for c in values:
        folds = StratifiedKFold(4, shuffle=True, random_state=3)
        scores = cross_val_score(SVC(kernel="linear", C=c), train_x, train_y, cv=folds)
        assert ours[c] == pytest.approx(100 * scores.mean())


def test_c_is_chosen_without_the_test_labels():
    train_x, train_y, test_x, test_y = problem()
    values = [1.0, 1e-7, 0.01]
    result = linear_svm(train_x, train_y, test_x, test_y, c_values=values)
    assert result.cv_accuracy[result.c] == max(result.cv_accuracy.values()) > result.cv_accuracy[1e-7] + 10
    scrambled = linear_svm(train_x, train_y, test_x, np.roll(test_y, 1), c_values=values)
    assert scrambled.c == result.c and scrambled.accuracy < result.accuracy
    for c in values:
        assert result.test_accuracy[c] == linear_svm(train_x, train_y, test_x, test_y, c_values=[c]).accuracy


def test_of_equally_good_values_the_smallest_is_taken():
    x = np.array([[-3.0], [-2.9], [-3.1], [3.0], [2.9], [3.1]])
    y = np.array([0, 0, 0, 1, 1, 1])
    result = linear_svm(x, y, x, y, c_values=[10.0, 1.0, 100.0], folds=3)
    assert set(result.cv_accuracy.values()) == {100.0} and result.c == 1.0


def test_small_classes_lower_the_folds():
    x, y = np.arange(5.0)[:, None], np.array([0, 0, 0, 1, 1])
    with pytest.warns(UserWarning, match="least populated"):
        assert set(cross_validate(x, x @ x.T, y, c_values=[1.0], folds=10)) == {1.0}
    with pytest.raises(ValueError, match="one value of C"):
        cross_validate(x[:2], x[:2] @ x[:2].T, np.array([0, 1]), c_values=[1.0])


def test_few_labels_equal_the_textbook_pipeline():
    train_x, train_y, test_x, test_y = problem(train=200, test=80)
    result = few_label_svm(train_x, train_y, test_x, test_y, shots=3, draws=5, seed=4)
    for draw, accuracy in enumerate(result.accuracies):
        chosen = draw_labels(train_y, 3, draw=draw, seed=4)
        model = make_pipeline(StandardScaler(), SVC(kernel="linear", C=1.0))
        model.fit(train_x[chosen].astype(float), train_y[chosen])
        assert accuracy == pytest.approx(100 * model.score(test_x.astype(float), test_y))
    assert len(set(result.accuracies)) > 1
    assert result.mean == pytest.approx(np.mean(result.accuracies))
    assert result.std == pytest.approx(np.std(result.accuracies, ddof=1))
    assert not result.short_classes


def test_a_draw_holds_so_many_of_every_class_and_is_repeatable():
    labels = np.random.default_rng(0).choice([2, 3, 9], 300)
    first = draw_labels(labels, 10, draw=0, seed=1)
    assert {label: int((labels[first] == label).sum()) for label in (2, 3, 9)} == {2: 10, 3: 10, 9: 10}
    assert len(set(first)) == 30
    np.testing.assert_array_equal(first, draw_labels(labels, 10, draw=0, seed=1))
    for other in ({"draw": 1, "seed": 1}, {"draw": 0, "seed": 2}):
        assert set(draw_labels(labels, 10, **other)) != set(first)


def test_a_class_with_fewer_samples_gives_all_and_is_reported():
    train_x, train_y, test_x, test_y = problem(train=60)
    train_x, train_y = np.concatenate([train_x, 100 + train_x[:2]]), np.append(train_y, [39, 39])
    result = few_label_svm(train_x, train_y, test_x, test_y, shots=5, draws=2)
    assert dict(result.short_classes) == {39: 2}
    chosen = draw_labels(train_y, 5, draw=0, seed=0)
    assert {60, 61} <= set(chosen) and len(chosen) == 4 * 5 + 2


def test_bad_input_is_refused():
    train_x, train_y, test_x, test_y = problem()
    broken = train_x.copy()
    broken[3, 4] = np.nan
    with pytest.raises(ValueError, match="training features are not finite"):
        linear_svm(broken, train_y, test_x, test_y)
    with pytest.raises(ValueError, match="two classes"):
        linear_svm(train_x, np.ones_like(train_y), test_x, test_y)
    with pytest.raises(ValueError, match="30 columns, test features 29"):
        linear_svm(train_x, train_y, test_x[:, :-1], test_y)
    with pytest.raises(ValueError, match="positive"):
        linear_svm(train_x, train_y, test_x, test_y, c_values=[0.0, 1.0])
    with pytest.raises(ValueError, match="at least 1"):
        few_label_svm(train_x, train_y, test_x, test_y, shots=0)


def test_deviation_is_that_of_a_sample():
    assert mean_and_std([1.0, 2.0, 6.0]) == pytest.approx((3.0, 7**0.5))
    assert mean_and_std([4.0]) == (4.0, 0.0)
