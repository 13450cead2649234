import json
import math

import numpy as np
import pytest
import torch

from datasets.pair_sources import held_out_shapes
from datasets.shapenet_render import ShapeNetRender
from downstream.pair_validation import PairValidation, alignment, uniformity
from engine.checkpoint import load_checkpoint
from engine.run_folder import RunFolder
from models.losses import crossnet_objective
from tests.robustness.faults import equal, metrics, same_end, without_speed
from tests.support.pairs import write_pairs
from tests.support.several import run_together
from tests.support.small_run import arguments, small_runs
from train_crossnet_con import main
from utils.errors import DataError, UserError

SCORES = ["val_loss", "val_loss_intra", "val_loss_cross", "val_image_to_cloud_r1", "val_cloud_to_image_r1"]
SCORES += ["val_view_to_view_r1", "val_alignment", "val_uniformity"]
VALIDATED = ("--epochs", 3, "--eval_every", 0, "--val_fraction", 0.3)

pytestmark = pytest.mark.usefixtures("small_runs")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Write 13 pairs: of the fraction 0.3, four are held out."""
    root = tmp_path_factory.mktemp("data")
    write_pairs(root, 13)
    return root


def train(root, out, *more):
    return main(arguments(root, out, *more))


def test_shapes_are_held_out_by_name_and_seed():
    ids = [f"{n % 3}/{n:03d}" for n in range(200)]
    held = held_out_shapes(ids, 0.1, seed=1)
    assert len(held) == 20 and held == sorted(held, key=ids.index) and held == held_out_shapes(ids, 0.1, seed=1)
    assert set(held_out_shapes(ids[::-1], 0.1, seed=1)) == set(held) != set(held_out_shapes(ids, 0.1, seed=2))
    assert len(set(held) - set(held_out_shapes([*ids, "9/new"], 0.1, seed=1))) <= 1
    assert held_out_shapes(ids, 0, seed=1) == [] and len(held_out_shapes(ids, 1e-9, seed=1)) == 2
    with pytest.raises(DataError, match="holds out 3 of 4 pairs"):
        held_out_shapes(ids[:4], 0.75, seed=1)


def test_a_subset_reads_the_same_samples(root):
    whole = ShapeNetRender(root)
    part = whole.subset(whole.ids[2:5])
    assert part.ids == whole.ids[2:5] and len(whole) == 13
    assert torch.equal(part[1]["points"], whole[3]["points"])


def test_alignment_and_uniformity_equal_their_definitions():
    a, b = torch.randn(2, 30, 5, generator=torch.Generator().manual_seed(0)) * 3
    x, y = (torch.nn.functional.normalize(z, dim=1) for z in (a, b))
    assert alignment(a, b) == pytest.approx((x - y).norm(dim=1).pow(2).mean().item(), rel=1e-5)
    paper = torch.pdist(x, p=2).pow(2).mul(-2).exp().mean().log().item()
    assert uniformity(a) == pytest.approx(paper, rel=1e-4)
    assert uniformity(a, block=7) == pytest.approx(uniformity(a), rel=1e-12)
    assert uniformity(torch.ones(30, 5)) == pytest.approx(0, abs=1e-9)


@pytest.fixture(scope="module")
def reference(root, tmp_path_factory):
    """Train without interruption, with four pairs held out that select best.pth."""
    out = tmp_path_factory.mktemp("reference")
    with small_runs():
        train(root, out, *VALIDATED, "--select_on", "pairs")
    return out / "crossnet"


def test_every_epoch_is_judged_on_held_out_pairs_and_the_least_loss_is_the_best(root, reference):
    records, last, best = metrics(reference), load_checkpoint(reference / "last.pth"), reference / "best.pth"
    held = held_out_shapes(ShapeNetRender(root).ids, 0.3, seed=1)
    assert last["held_out"] == held and len(held) == 4
    for record in records:
        assert set(SCORES) < set(record) and all(math.isfinite(record[name]) for name in SCORES)
        assert record["val_loss"] == pytest.approx(record["val_loss_intra"] + record["val_loss_cross"])
    losses = [record["val_loss"] for record in records]
    assert len(losses) == 3 and load_checkpoint(best)["progress"]["epoch"] == 1 + int(np.argmin(losses))
    log = (reference / "run.log").read_text()
    assert "4 pairs are held out; R@1 by chance is 25 %" in log and "val_loss" in log
    assert json.loads((reference / "config.json").read_text())["arguments"]["val_fraction"] == 0.3


def test_the_curves_show_the_scores(tmp_path, monkeypatch):
    monkeypatch.undo()
    folder = RunFolder(tmp_path)
    drawn = []
    monkeypatch.setattr("utils.pictures.save_figure", lambda figure, path, dpi: drawn.extend(figure.axes))
    for epoch in (1, 2):
        folder.append_metrics({"epoch": epoch, "loss": 1, "lr": 0.1, **dict.fromkeys(SCORES, epoch)})
    folder.draw_curves()
    assert [axes.get_title() for axes in drawn[2:]] == ["loss on held-out pairs", "held-out views", "scores (%)"]
    assert [len(axes.lines) for axes in drawn] == [1, 1, 3, 2, 3]


def test_held_out_pairs_never_train_and_their_list_trains_the_same(root, reference, tmp_path):
    held = set(load_checkpoint(reference / "last.pth")["held_out"])
    rest = tmp_path / "list.txt"
    rest.write_text("\n".join(name for name in ShapeNetRender(root).ids if name not in held))
    train(root, tmp_path, "--epochs", 3, "--eval_every", 0, "--list", rest)
    ours, theirs = (load_checkpoint(folder / "last.pth") for folder in (tmp_path / "crossnet", reference))
    assert equal(ours["point_encoder"], theirs["point_encoder"]) and equal(ours["optimizer"], theirs["optimizer"])


def test_a_resumed_run_ends_as_an_uninterrupted_one(root, reference, tmp_path):
    flags = (*VALIDATED, "--select_on", "pairs", "--resume")
    folder = tmp_path / "crossnet"
    folder.mkdir()
    for name in ("last.pth", "metrics.jsonl", "best.pth"):
        # The end of the second epoch, when the best checkpoint may have been written before.
        (folder / name).write_bytes((reference / {"last.pth": "previous.pth"}.get(name, name)).read_bytes())
    assert load_checkpoint(folder / "last.pth")["progress"]["epoch"] == 2
    train(root, tmp_path, *flags)
    same_end(folder, reference)
    other = (*VALIDATED, "--select_on", "pairs", "--val_fraction", 0.2, "--resume")
    with pytest.raises(UserError, match="--val_fraction 0.3 there, 0.2 here"):
        train(root, tmp_path, *other)


def test_held_out_pairs_leave_shared_memory_and_open_files_to_the_training_loader(root):
    validation = PairValidation(ShapeNetRender(root), batch_size=4, workers=1)
    tensors = [value for batch in validation.batches for value in batch.values() if torch.is_tensor(value)]
    assert len(tensors) >= 12 and not any(tensor.is_shared() for tensor in tensors)


def test_another_kind_of_score_starts_the_choice_of_the_best_again(root, reference, tmp_path):
    flags = (*VALIDATED, "--resume", reference / "previous.pth")
    train(root, tmp_path, *flags)
    assert not (tmp_path / "crossnet" / "best.pth").exists()
    assert load_checkpoint(tmp_path / "crossnet" / "last.pth")["progress"]["best"] == -math.inf


def test_held_out_pairs_are_needed_to_choose_by_them(root, tmp_path):
    with pytest.raises(UserError, match="--select_on pairs needs .*--val_fraction 0.05"):
        train(root, tmp_path, "--select_on", "pairs")
    with pytest.raises(UserError, match="has 3 pairs besides the 10 of --val_fraction; use --batch_size 3"):
        train(root, tmp_path, "--val_fraction", 0.8)


SWITCHES = {
    "rgb": "--image_modality rgb",
    "ave": "--objective ave --image_modality both",
    "chunks": "--chunk_size 2 --amp bf16 --channels_last --mask_same_object",
}


@pytest.mark.parametrize("case", SWITCHES)
def test_objectives_and_switches_are_validated(root, tmp_path, case):
    record = train(root, tmp_path, *VALIDATED, "--epochs", 1, *SWITCHES[case].split())
    assert all(math.isfinite(record[name]) for name in SCORES)


def test_two_processes_give_the_scores_of_one(root, tmp_path):
    # A rate too small to change anything but the statistics, of which two processes have the same.
    flags = (*VALIDATED, "--epochs", 1, "--lr", 1e-30, "--batch_size")
    run_together(lambda: train(root, tmp_path, *flags, 2, "--exp_name", "two"), tmp_path / "logs")
    one = train(root, tmp_path, *flags, 4)
    (two,) = metrics(tmp_path / "two")
    assert {name: two[name] for name in SCORES} == pytest.approx({name: one[name] for name in SCORES}, rel=1e-4)


def test_the_loss_is_the_objective_over_groups_of_the_held_out_pairs(root, tmp_path, monkeypatch):
    seen = []
    original = PairValidation.score
    monkeypatch.setattr(PairValidation, "score", lambda *args: seen.append(args) or original(*args))
    monkeypatch.setattr(PairValidation, "GROUP", 2)
    record = train(root, tmp_path, *VALIDATED, "--epochs", 1)
    ((_, model, projections),) = seen
    assert not any(z.requires_grad for z in projections) and len(projections.view1) == 4
    losses = [
        crossnet_objective((v1, v2), rgb=rgb, gray=gray, temperature=model.temperature).total
        for v1, v2, rgb, gray in (tuple(z[i::2] for z in projections) for i in range(2))
    ]
    assert record["val_loss"] == pytest.approx(sum(losses).item() / 2)


def test_validation_changes_no_random_number_and_no_weight(root, reference, tmp_path, monkeypatch):
    monkeypatch.setattr(PairValidation, "__call__", lambda self, model, **kwargs: dict.fromkeys(SCORES, 1.0))
    train(root, tmp_path, *VALIDATED)
    ours, theirs = (load_checkpoint(folder / "last.pth") for folder in (tmp_path / "crossnet", reference))
    assert equal(ours["random"], theirs["random"]) and equal(ours["optimizer"], theirs["optimizer"])
    assert without_speed(metrics(tmp_path / "crossnet"))[-1]["loss"] == metrics(reference)[-1]["loss"]
