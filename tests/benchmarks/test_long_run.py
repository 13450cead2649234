"""The search for leaks at its smallest size."""

import json
import sys
from multiprocessing import resource_tracker

import pytest

import train_crossnet_con as pretraining
from benchmarks import long_run
from engine.task import Run
from models.image import IMAGE_ENCODERS
from tests.support.pairs import write_pairs
from utils.errors import UserError

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, which only Linux has")


def test_the_run_is_sampled_and_its_growth_is_measured(tmp_path, small_runs, capsys):
    write_pairs(tmp_path / "data", 12, points=64)
    network = IMAGE_ENCODERS["resnet18"]
    resource_tracker.ensure_running()  # a child that is not a data worker; spawning processes leaves it behind
    words = ["--data_root", tmp_path / "data", "--steps", 5, "--every", 1, "--workers", 1, "--save_every", 2]
    words += ["--picture", tmp_path / "run.png", "--json", tmp_path / "run.json"]
    result = long_run.main([str(word) for word in words])
    assert json.loads((tmp_path / "run.json").read_text()) == result
    assert [sample["step"] for sample in result["samples"]] == [0, 1, 2, 3, 4, 5]  # whole epochs of three
    assert (result["settings"]["steps"], result["settings"]["epochs"], result["checkpoints"]) == (6, 2, 3)
    for sample in result["samples"]:
        assert sample["workers"] == 1 and min(sample["memory"], sample["workers_memory"]) > 1
        assert min(sample["open_files"], sample["workers_open_files"], sample["run_log_bytes"]) > 0
    assert result["samples"][-1]["folder_bytes"] > result["samples"][0]["folder_bytes"]
    assert result["growth"].keys() == long_run.QUANTITIES.keys() and result["metrics_bytes_per_epoch"] > 100
    assert "grows: " in capsys.readouterr().out and (tmp_path / "run.png").stat().st_size > 10_000
    assert pretraining.Run is Run and IMAGE_ENCODERS["resnet18"] is network


def test_growth_is_the_slope_of_the_last_three_quarters():
    steps = list(range(100, 1100, 100))
    warming_up = [900.0, 800.0] + [50 + 0.02 * step for step in steps[2:]]
    found = long_run.growth(steps, warming_up)
    assert found["per_1000_steps"] == pytest.approx(20) and found["standard_error"] == pytest.approx(0, abs=1e-6)
    assert (found["first"], found["last"], found["most"]) == pytest.approx((56, 70, 70))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--steps 60", "--every 20 takes fewer than 4 samples in --steps 60; lower --every"),
        ("--picture run.xyz", "run.xyz: the name must end in one of"),
    ],
)
def test_what_cannot_be_measured_or_drawn_is_told_before_the_run(words, message):
    with pytest.raises(UserError, match=message):
        long_run.main([*words.split(), "--data_root", "nowhere"])
