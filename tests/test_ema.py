"""``--ema``: an average of the weights, scored and saved beside them."""

import pytest
import torch

from engine.checkpoint import load_checkpoint
from engine.load_model import crossnet_from_checkpoint, encoder_from_checkpoint
from engine.task import Run
from tests.robustness.faults import equal, metrics, same_end
from tests.support.pairs import write_demo_set, write_pairs
from tests.support.small_run import arguments, small_runs
from train_crossnet_con import main
from utils.errors import CheckpointError

PLAIN = ("--epochs", 3, "--eval_every", 3, "--val_fraction", 0.3, "--save_every", 2)
AVERAGED = (*PLAIN, "--ema", 0.8)

pytestmark = pytest.mark.usefixtures("small_runs")


def train(root, out, *more):
    return main(arguments(root, out, *more))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Write 12 pairs, of which four are held out, and a labeled set."""
    root = tmp_path_factory.mktemp("data")
    write_pairs(root, 12)
    write_demo_set(root)
    return root


def of(payload, ending=""):
    """Return all weights and statistics of a checkpoint's model."""
    return {**payload[f"point_encoder{ending}"], **payload[f"heads_and_image_encoders{ending}"]}


@pytest.fixture(scope="module")
def reference(root, tmp_path_factory):
    """Train with an average; return the folder and the model's weights and statistics after every step."""
    out, steps, original = tmp_path_factory.mktemp("reference"), [], Run.optimizer_step

    def note(self):
        original(self)
        steps.append({name: value.clone() for name, value in self.task.model.state_dict().items()})

    with small_runs() as patch:
        patch.setattr(Run, "optimizer_step", note)
        train(root, out, *AVERAGED)
    return out / "crossnet", steps


def test_the_average_is_that_of_a_loop_over_the_steps(reference):
    folder, steps = reference
    payload = load_checkpoint(folder / "last.pth")
    assert len(steps) == payload["ema_steps"] == 6
    found = {f"point_encoder.{name}": value for name, value in payload["point_encoder_ema"].items()}
    found |= payload["heads_and_image_encoders_ema"]
    assert found.keys() == steps[0].keys()
    for name, value in found.items():
        if not value.is_floating_point():  # batches that batch norm has seen
            continue
        average = steps[0][name].double()
        for step in steps[1:]:
            average = 0.8 * average + 0.2 * step[name].double()
        torch.testing.assert_close(value, average.float(), rtol=1e-5, atol=1e-7, msg=name)


def test_the_average_is_scored_and_its_file_is_taken_by_every_script(reference):
    folder, _ = reference
    last, beside = load_checkpoint(folder / "last.pth"), load_checkpoint(folder / "last_ema.pth")
    assert equal(of(last, "_ema"), of(beside)) and not equal(of(last), of(beside))
    assert equal(dict(encoder_from_checkpoint(folder / "last_ema.pth").state_dict()), last["point_encoder_ema"])
    crossnet_from_checkpoint(folder / "last_ema.pth")
    assert (folder / "best_ema.pth").exists() and beside["held_out"] == last["held_out"]
    scores = metrics(folder)[-1]
    for name in ("val_loss", "val_image_to_cloud_r1", "val_uniformity", "demo_val_accuracy", "demo_test_accuracy"):
        assert {name, f"ema_{name}"} < scores.keys()
    assert scores["val_loss"] != scores["ema_val_loss"]


def test_an_average_changes_nothing_that_is_trained(root, reference, tmp_path):
    train(root, tmp_path, *PLAIN)
    ours, theirs = (load_checkpoint(folder / "last.pth") for folder in (tmp_path / "crossnet", reference[0]))
    assert equal(of(ours), of(theirs)) and equal(ours["optimizer"], theirs["optimizer"])
    assert not (tmp_path / "crossnet" / "last_ema.pth").exists()
    with pytest.raises(CheckpointError, match="--ema 0.0 there, 0.8 here"):
        train(root, tmp_path, *AVERAGED, "--resume")


def test_a_resumed_average_ends_as_an_uninterrupted_one(root, reference, tmp_path, monkeypatch):
    def stop(self):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        original = Run.optimizer_step
        patch.setattr(Run, "optimizer_step", lambda run: (stop if run.progress.step == 3 else original)(run))
        train(root, tmp_path, *AVERAGED)
    assert load_checkpoint(tmp_path / "crossnet" / "last.pth")["ema_steps"] == 2
    train(root, tmp_path, *AVERAGED, "--resume")
    same_end(tmp_path / "crossnet", reference[0])
    ours, theirs = (load_checkpoint(folder / "last.pth") for folder in (tmp_path / "crossnet", reference[0]))
    assert equal(of(ours, "_ema"), of(theirs, "_ema"))
    assert equal(of(load_checkpoint(tmp_path / "crossnet" / "last_ema.pth")), of(theirs, "_ema"))
