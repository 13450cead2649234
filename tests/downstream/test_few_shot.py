import json

import numpy as np
import pytest

from downstream.classification import few_shot as script
from tests.support.pairs import write_demo_set
from utils.errors import UserError

SMALL = ["--dataset", "demo", "--random_init", "--calibrate_bn", "--emb_dims", "8", "--k", "3", "--device", "cpu"]
TRAIN, TEST = np.repeat([3, 5, 9], [30, 26, 4]), np.repeat([3, 5, 9], [8, 9, 10])


def draw(labels=None, **changes):
    settings = {"ways": 2, "shots": 4, "queries": 6, "seed": 1, "number": 0} | changes
    return script.draw_episode(TRAIN, labels, **settings)


def test_an_episode_holds_each_class_as_often_as_asked_and_nothing_twice():
    support, queries = draw()
    assert sorted(TRAIN[support]) == [3] * 4 + [5] * 4 and sorted(TRAIN[queries]) == [3] * 6 + [5] * 6
    assert len(set(support) | set(queries)) == 20  # a query was never in the support
    assert np.array_equal(draw().queries, queries)
    assert not np.array_equal(np.sort(draw(number=1).queries), np.sort(queries))


def test_queries_of_the_test_split():
    support, queries = draw(TEST)
    assert sorted(TRAIN[support]) == sorted(np.repeat(np.unique(TEST[queries]), 4))
    assert np.bincount(TEST[queries]).max() == 6
    # Class 9 has 4 training clouds: enough as support alone, not with queries from the same split.
    assert {label for i in range(9) for label in TRAIN[draw(TEST, number=i).support]} == {3, 5, 9}
    assert {label for i in range(9) for label in TRAIN[draw(number=i).support]} == {3, 5}


def test_too_few_classes_are_told():
    with pytest.raises(UserError, match="3-way 4-shot with 6 queries a class: only 2 of 3 classes have 10 training"):
        draw(ways=3)
    with pytest.raises(UserError, match="only 2 of 3 classes have 4 training clouds and 9 test clouds"):
        draw(TEST, ways=3, queries=9)


def test_separable_features_are_classified_and_noise_is_not():
    rng = np.random.default_rng(0)
    settings = {"ways": 2, "shots": 4, "queries": 6, "runs": 20}
    clear = [np.eye(10)[labels][:, [3, 5, 9]] + 0.02 * rng.normal(size=(len(labels), 3)) for labels in (TRAIN, TEST)]
    noise = [rng.normal(size=(len(labels), 10)) for labels in (TRAIN, TEST)]
    for protocol in script.PROTOCOLS:
        found = script.few_shot_accuracies(clear[0], TRAIN, clear[1], TEST, protocol=protocol, **settings)
        assert found == [100.0] * 20
        chance = script.few_shot_accuracies(noise[0], TRAIN, noise[1], TEST, protocol=protocol, **settings)
        assert 35 < np.mean(chance) < 65


def test_the_command_line(tmp_path, capsys, monkeypatch):
    write_demo_set(tmp_path, train=10, test=4)
    report = tmp_path / "m.json"
    arguments = [*SMALL, "--data_root", str(tmp_path), "--seeds", "1", "2", "--ways", "2", "--shots", "1", "2"]
    metrics = script.main([*arguments, "--queries", "2", "--runs", "3", "--json", str(report)])
    assert json.loads(report.read_text()) == metrics
    assert [encoder["name"] for encoder in metrics["encoders"]] == ["random init, seed 1", "random init, seed 2"]
    for encoder in metrics["encoders"]:
        for protocol in ("released", "test"):
            assert list(encoder["results"][protocol]) == ["2w1s", "2w2s"]
            result = encoder["results"][protocol]["2w1s"]
            assert len(result["accuracies"]) == 3 and result["mean"] == pytest.approx(np.mean(result["accuracies"]))
            assert result["std"] == pytest.approx(np.std(result["accuracies"], ddof=1))
    assert "protocol test: percent of 2 queries a class of the test split" in capsys.readouterr().out
    monkeypatch.setattr(script, "features_of", None)  # found before minutes of feature extraction
    for protocol in script.PROTOCOLS:
        with pytest.raises(UserError, match="lower --ways, --shots or --queries"):
            script.main([*arguments, "--queries", "100", "--protocol", protocol])
    with pytest.raises(UserError, match="--ways 1"):
        script.main([*arguments, "--ways", "1"])
