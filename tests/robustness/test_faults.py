"""Each fault once, and that a loss would be noticed; ``python -m tests.robustness.faults`` tries them many times."""

import random

import pytest
import torch

from engine.checkpoint import load_checkpoint, save_checkpoint
from tests.robustness import faults as module
from tests.robustness.faults import FAULTS, Place, break_runs, same_end, try_fault


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return Place(tmp_path_factory.mktemp("faults"))


@pytest.mark.parametrize("name", FAULTS)
def test_nothing_is_lost(name, place):
    try:
        try_fault(name, place, 0, seed=1)
    except NotImplementedError as error:
        pytest.skip(str(error))


def test_the_smallest_difference_of_two_ends_is_noticed(place):
    out = place.copy()
    same_end(out / "crossnet", place.reference)
    payload = load_checkpoint(out / "crossnet" / "last.pth")
    weight = payload["point_encoder"]["conv1.0.weight"]
    weight.view(-1)[0] = torch.nextafter(weight.view(-1)[0], torch.tensor(9.0))
    save_checkpoint(out / "crossnet" / "last.pth", payload)
    with pytest.raises(AssertionError, match="point_encoder"):
        same_end(out / "crossnet", place.reference)


def test_a_loss_is_counted_and_reported(tmp_path, monkeypatch, capsys):
    def losing(place, rng):
        """Something breaks."""
        assert rng.random() < 0.5, "half of it is lost"

    monkeypatch.setattr(module, "Place", lambda folder: None)
    monkeypatch.setitem(module.FAULTS, "losing", (losing, "nothing"))
    result = break_runs(["losing"], tmp_path, repeat=20, seed=1)["losing"]
    wrong = sum(random.Random(f"1 losing {i}").random() >= 0.5 for i in range(20))
    assert (result["tries"], result["failed"], result["fault"]) == (20, wrong, "Something breaks.") and 0 < wrong < 20
    assert "half of it is lost" in capsys.readouterr().err
