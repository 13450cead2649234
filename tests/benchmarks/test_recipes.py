"""Recipes of pretraining, compared at equal time on the same held-out pairs."""

import json

import pytest
import torch

from benchmarks import recipes
from tests.support.pairs import write_pairs
from utils.errors import UserError

BASE = "--batch_size 4 --num_points 32 --k 4 --emb_dims 16 --image_size 16"


def command(root, *more):
    words = ["--data_root", str(root / "data"), "--work_dir", str(root / "work"), "--base", BASE, "--held_out", "4"]
    return [*words, "--minutes", "0.002", "--eval_points", "40", *more]


def compare(root, *more):
    return recipes.main(command(root, *more))


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
    with pytest.raises(UserError, match="base.json was made with --seed 1 there, 2 here; choose another --work_dir"):
        recipes.Comparison(recipes.BENCHMARK.parse_args(command(tmp_path, "--seed", "2"))).run("base", "")


def test_recipes_on_other_pairs_take_the_same_steps_and_are_scored_on_the_same_pairs(tmp_path, small_runs):
    own = write_pairs(tmp_path / "data", 12, points=48)
    write_pairs(tmp_path / "other", 16, points=48)  # its first twelve ids are those of the first set
    argv = command(tmp_path, "--recipe", "own=", "--recipe", f"other=--data_root {tmp_path / 'other'}")
    at = argv.index("--minutes")
    del argv[at : at + 2]
    comparison = recipes.Comparison(recipes.BENCHMARK.parse_args([*argv, "--steps", "3"]))
    assert len(comparison.shapes(str(tmp_path / "other"))) == 16
    assert set(comparison.shapes(f"{tmp_path}/data/../data")) == set(own) - set(comparison.held_out)
    found = recipes.main([*argv, "--steps", "3"])["recipes"]
    assert [(name, result["steps"]) for name, result in found.items()] == [("own", 3), ("other", 3)]
    config = json.loads((tmp_path / "work/other/config.json").read_text())
    assert config["arguments"]["data_root"] == str(tmp_path / "other")
    with pytest.raises(UserError, match="own.json was made with --steps 3 there, 4 here"):
        recipes.Comparison(recipes.BENCHMARK.parse_args([*argv, "--steps", "4"])).run("own", "")


def test_on_a_gpu_a_recipe_is_timed_when_its_step_has_finished(tmp_path, monkeypatch):
    write_pairs(tmp_path / "data", 12, points=48)
    gpu, asked = torch.device("cuda", 0), []

    def trained(argv):
        assert argv[argv.index("--device") + 1] == "cuda"
        torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1).step()

    monkeypatch.setattr(recipes, "resolve_device", lambda name: gpu)
    monkeypatch.setattr(recipes, "now", lambda device, *, cpu: asked.append((device, cpu)) or 7.0)
    monkeypatch.setattr(recipes.train_crossnet_con, "main", trained)
    comparison = recipes.Comparison(recipes.BENCHMARK.parse_args(command(tmp_path, "--device", "cuda")))
    assert comparison.train("base", comparison.flags("base", ""), steps=1)[1] == [7.0] and asked == [(gpu, False)]


def test_a_recipe_that_cannot_be_trained_is_named_and_the_others_are_compared(tmp_path, small_runs, capsys):
    write_pairs(tmp_path / "data", 24, points=48)
    found = compare(tmp_path, "--recipe", "wild=--lr 1e30", "--recipe", "large=--batch_size 40")["recipes"]
    assert "not finite" in found["wild"]["failed"] and "larger than the data set" in found["large"]["failed"]
    assert "| wild | failed: the loss is not finite" in capsys.readouterr().out
    assert not list((tmp_path / "work").glob("*.json"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--recipe", "views"], "--recipe 'views' has no '='"),
        (["--recipe", "a b=", "--recipe", "a_b=--lr 1"], "--recipe 'a_b=--lr 1': there is another NAME like this"),
        (["--recipe", "../up="], "--recipe '../up=': files are called NAME"),
        (["--recipe", "base='"], "the flags of recipe 'base' cannot be read: No closing quotation"),
        (["--held_out", "23"], "--held_out 23 of 24 pairs of .*; 2 at least must remain"),
        (["--eval_points", "49"], "--eval_points 49 is more than the clouds of .* have: 48"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_anything_is_trained(tmp_path, words, message):
    write_pairs(tmp_path / "data", 24, points=48)
    with pytest.raises(UserError, match=message):
        compare(tmp_path, *words)
    assert not list((tmp_path / "work").glob("*.txt"))


def test_a_run_of_someone_else_in_the_work_folder_is_left_alone(tmp_path):
    write_pairs(tmp_path / "data", 24, points=48)
    (tmp_path / "work/base_trial").mkdir(parents=True)
    (tmp_path / "work/base_trial/last.pth").write_text("precious")
    found = compare(tmp_path, "--recipe", "base=")["recipes"]
    assert "base_trial is not from this benchmark" in found["base"]["failed"]
    assert (tmp_path / "work/base_trial/last.pth").read_text() == "precious"
