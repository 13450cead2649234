"""Recipes of pretraining, compared at equal time on the same held-out pairs."""

import json

import pytest

from benchmarks import recipes
from tests.support.pairs import write_pairs
from utils.errors import UserError

BASE = "--batch_size 4 --num_points 32 --k 4 --emb_dims 16 --image_size 16"


def compare(root, *more):
    return recipes.main(
        ["--data_root", str(root / "data"), "--work_dir", str(root / "work"), "--base", BASE, "--held_out", "4"]
        + ["--minutes", "0.002", "--eval_points", "40", *more]
    )


def test_recipes_train_for_their_time_and_are_scored_on_pairs_that_none_has_seen(tmp_path, small_runs, capsys):
    ids = write_pairs(tmp_path / "data", 24, points=48)
    two = ["--recipe", "base=", "--recipe", "fewer points=--num_points 16 --temperature 0.5"]
    found = compare(tmp_path, *two)["recipes"]
    rows = capsys.readouterr().out.splitlines()[2:]
    assert [row.split(" | ")[0] for row in rows] == ["| base", "| fewer points"]
    for name, result in found.items():
        slug = name.replace(" ", "_")
        assert result["steps"] == max(round(0.12 / result["seconds_per_step"]), 1)
        trained = (tmp_path / f"work/{slug}.txt").read_text().split()
        assert len(trained) <= 20 and set(trained) < set(ids)
        last = json.loads((tmp_path / f"work/{slug}/metrics.jsonl").read_text().splitlines()[-1])
        assert last["step"] == result["steps"] // last["epoch"] * last["epoch"]
        assert all(0 <= result["scores"][key] <= 100 for key in recipes.COLUMNS[:2])
        assert result["scores"].keys() == set(recipes.COLUMNS)
    # What is there is kept, and only a new recipe trains.
    (tmp_path / "work/base/last.pth").unlink()
    again = compare(tmp_path, *two)["recipes"]
    assert again == found


def test_a_recipe_without_a_name_is_refused(tmp_path):
    write_pairs(tmp_path / "data", 24, points=48)
    with pytest.raises(UserError, match="--recipe 'views' has no '='"):
        compare(tmp_path, "--recipe", "views")
