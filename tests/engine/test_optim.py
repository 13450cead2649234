import math
import random

import numpy as np
import pytest
import torch

from engine.optim import autocast, cosine_lr, grad_scaler, learning_rate, set_learning_rate
from utils.reproducible import random_states, restore_random_states, seed_everything, versions


def draws():
    return random.random(), np.random.rand(), torch.rand(1).item()


def test_seeding_covers_all_generators():
    seed_everything(5)
    first = draws()
    seed_everything(5)
    assert draws() == first
    seed_everything(6)
    assert all(a != b for a, b in zip(draws(), first, strict=True))


def test_states_of_the_generators_come_back():
    states = random_states()
    first = torch.rand(3)
    restore_random_states(states)
    assert torch.equal(torch.rand(3), first)


def test_the_generators_of_gpus_are_left_alone_by_a_run_on_the_cpu(monkeypatch):
    def claimed(*_):
        raise AssertionError("CUDA was initialized")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "_lazy_init", claimed)
    states = random_states()
    assert states.keys() == {"cpu"}
    restore_random_states({**states, "cuda": [states["cpu"]]})  # saved by a run on a GPU


def test_cosine_goes_from_base_to_floor():
    values = [cosine_lr(step, total=10, base=3.0, floor=1.0) for step in range(11)]
    assert values[0] == 3 and values[5] == pytest.approx(2) and values[10] == pytest.approx(1)
    assert values == sorted(values, reverse=True)


def test_released_schedule_is_pytorchs_cosine_stepped_at_every_batch():
    epochs, steps = 7, 60
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=epochs)
    for step in range(steps):
        ours = learning_rate(step, schedule="released", total=epochs * 20, epochs=epochs, base=0.1)
        assert ours == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-8)
        assert ours == pytest.approx(0.05 * (1 + math.cos(math.pi * step / epochs)))
        optimizer.step()
        schedule.step()
    once = [learning_rate(step, schedule="cosine", total=140, epochs=epochs, base=0.1) for step in (0, 70, 140)]
    assert once == pytest.approx([0.1, 0.05, 0])


def test_every_parameter_group_gets_the_rate():
    optimizer = torch.optim.SGD([{"params": [torch.nn.Parameter(torch.zeros(1))]} for _ in range(2)], lr=1.0)
    set_learning_rate(optimizer, 0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.25]


@pytest.mark.parametrize("amp, dtype", [("off", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_autocast_and_scaler(amp, dtype):
    device = torch.device("cpu")
    with autocast(device, amp):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype
    assert grad_scaler(device, amp).is_enabled() == (amp == "fp16")


def test_versions_are_plain_text():
    assert versions()["torch"] == torch.__version__ and all(isinstance(value, str) for value in versions().values())
    assert type(versions()["torch"]) is str  # torch's own is a subclass that a checkpoint must not hold
