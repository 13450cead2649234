"""Scores along a run, and the curves through them."""

import json
from dataclasses import asdict

import numpy as np
import pytest
import torch

import train_crossnet_con
from benchmarks import growth
from engine.checkpoint import load_checkpoint, save_checkpoint
from engine.load_model import encoder_and_point_head
from tests.support.small_run import arguments, small_runs
from utils.errors import CheckpointError, UserError


@pytest.fixture(scope="module")
def run_folder(data_root, tmp_path_factory):
    """A run of six steps with checkpoints of two; last.pth repeats the second."""
    out = tmp_path_factory.mktemp("runs")
    flags = ("--epochs", 2, "--keep_every", 3, "--val_fraction", 0.2, "--eval_every", 0)
    with small_runs():
        train_crossnet_con.main(arguments(data_root, out, *flags))
    return out / "crossnet"


def test_checkpoints_are_scored_once_drawn_and_extrapolated(run_folder, data_root, tmp_path, capsys, monkeypatch):
    argv = ["--run", f"tiny={run_folder}", "--data_root", str(data_root), "--dataset", "demo", "--num_points", "24"]
    argv += ["--device", "cpu", "--work_dir", str(tmp_path / "work"), "--picture", str(tmp_path / "growth.png")]
    result = growth.main([*argv, "--json", str(tmp_path / "growth.json")])
    points = result["runs"]["tiny"]["points"]
    assert [point["step"] for point in points] == [3, 6]
    assert all(point.keys() == {"step", *growth.SCORES} for point in points)
    shown = capsys.readouterr().out
    assert "extrapolated, not measured" in shown and "at steps" in shown and "60" in shown
    assert (tmp_path / "growth.png").stat().st_size > 10_000
    assert json.loads((tmp_path / "growth.json").read_text())["runs"] == json.loads(json.dumps(result["runs"]))
    with monkeypatch.context() as patch:
        patch.setattr(growth.classification, "evaluate", None)
        assert growth.main(argv)["runs"] == result["runs"]
        late = growth.main([*argv, "--fit_from", "4"])["runs"]["tiny"]
        assert (late["points"], late["fits"]) == (points, {}) and result["runs"]["tiny"]["fits"]
    kept = tmp_path / "work/tiny/step_3.json"
    found = kept.read_text()
    kept.write_text("{")
    with pytest.raises(UserError, match="cannot read .*step_3.json .*delete it to make it again"):
        growth.main(argv)
    kept.write_text(found)
    pairs = [*argv, "--pairs", str(data_root), "--pairs_count", "5"]
    with pytest.raises(UserError, match="--pairs .* are the pairs that a run trained on"):
        growth.main([*pairs, "--seed", "2"])
    for count, used in ((5, 5), (12, 12), (99, 16)):
        args = growth.BENCHMARK.parse_args([*pairs, "--pairs_count", str(count)])
        views = growth.Scorer(args, torch.device("cpu")).held_out_views({"arguments": {"data_root": "elsewhere"}})
        assert [batch["view1"].shape for batch in views] == [(used, 3, 24)]
    with pytest.raises(UserError, match="--pairs_count 1: 1 pairs; scores need 2 or more"):
        growth.main([*pairs, "--pairs_count", "1"])
    with pytest.raises(UserError, match="has neither step_<n>.pth nor last.pth; train with --keep_every"):
        growth.main([*argv, "--run", f"other={tmp_path}"])
    with pytest.raises(UserError, match="--run 'tiny=.*there is another NAME like this"):
        growth.main([*argv, "--run", f"tiny={tmp_path}"])
    with pytest.raises(UserError, match="growth.xyz"):
        growth.main([*argv, "--picture", str(tmp_path / "growth.xyz")])


def test_a_kept_checkpoint_holds_the_point_head_of_its_run(run_folder):
    ours, theirs = (encoder_and_point_head(run_folder / name) for name in ("step_6.pth", "last.pth"))
    for one, other in zip(ours[:2], theirs[:2], strict=True):
        assert all((value == other.state_dict()[name]).all() for name, value in one.state_dict().items())
    payload = load_checkpoint(run_folder / "step_6.pth")
    del payload["point_head"]
    save_checkpoint(run_folder.parent / "bare.pth", payload)
    with pytest.raises(CheckpointError, match="holds no point head"):
        encoder_and_point_head(run_folder.parent / "bare.pth")


def test_an_extrapolation_past_100_percent_is_shown_as_such(tmp_path):
    steps, values = [10, 100, 1000], [20.0, 50.0, 81.0]
    fits = {"mAP": asdict(growth.fit(steps, values)), "1 label": asdict(growth.fit(steps, [1.0, 2.0, 3.0]))}
    points = [{"step": step, "mAP": value} for step, value in zip(steps, values, strict=True)]
    _, line, other = growth.fit_lines({"run": {"points": points, "fits": fits}})
    assert line == ("run", "mAP", "10,000", "over 100", "-")
    assert other == ("run", "1 label", "10,000", "4.0 [4.0, 4.0]", "-")
    drawn = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("utils.pictures.save_figure", lambda figure, path, **kwargs: drawn.append(figure))
        growth.draw({"run": {"points": points, "fits": fits}}, tmp_path / "a.png")
    (axis,) = drawn[0].axes
    assert axis.get_ylim()[1] == 100


def test_curves_find_what_they_were_drawn_from():
    steps = np.array([100, 200, 400, 800, 1600])
    line = growth.fit(steps, 20 + 5 * np.log(steps))
    assert line.at == 16_000 and line.log == pytest.approx((20, 5))
    assert line.log_value == pytest.approx(20 + 5 * np.log(16_000))
    assert line.log_interval == pytest.approx((line.log_value,) * 2)
    level = growth.fit(steps, growth.saturating(steps, 70.0, 300.0, 0.6))
    assert level.power == pytest.approx((70, 300, 0.6), rel=1e-3)
    assert level.power_value == pytest.approx(70 - 300 * 16_000**-0.6, rel=1e-4)


def test_a_line_through_scattered_points_has_the_prediction_interval_of_the_textbook():
    found = growth.fit([np.exp(1), np.exp(2), np.exp(3)], [1.0, 2.0, 4.0])
    # By hand: slope 1.5, residuals 1/6, -1/3, 1/6, s^2 = 1/6; t of one degree of freedom 12.7062.
    at = np.log(found.at)
    half = 12.7062 * np.sqrt((1 + 1 / 3 + (at - 2) ** 2 / 2) / 6)
    assert found.log_interval == pytest.approx((found.log_value - half, found.log_value + half), rel=1e-4)
    assert found.power is None and growth.fit([5], [1.0]) is None
    assert growth.fit([5, 50], [1.0, 2.0]).log_interval is None
