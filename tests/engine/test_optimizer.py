"""Optimizers of every form, and checkpoints that move between them."""

import argparse
import copy

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.fake_gpu import fakes_gpus
from engine.optim import build_optimizer, load_optimizer

FLAGS = argparse.Namespace(use_sgd=False, lr=1e-2, weight_decay=1e-4, momentum=0.9)


def steps(model, optimizer, number):
    for seed in range(number):
        torch.manual_seed(seed)
        model(torch.randn(5, 3)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def adam(model, fused):
    return torch.optim.Adam(model.parameters(), lr=1e-2, weight_decay=1e-4, fused=fused)


@pytest.mark.parametrize(("before", "after"), [(True, None), (None, True), (None, None), (True, True)])
def test_a_checkpoint_of_either_form_of_adam_continues_in_the_other(before, after):
    model = nn.Linear(3, 4)
    first = adam(model, before)
    steps(model, first, 3)
    state, copied = copy.deepcopy(first.state_dict()), copy.deepcopy(model)
    second = adam(copied, after)
    load_optimizer(second, state)
    assert second.param_groups[0]["fused"] is after
    steps(model, first, 3)
    steps(copied, second, 3)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(copied.state_dict()[name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(not fakes_gpus(), reason="PyTorch before 2.10 plays no GPU without a driver")
def test_adam_is_fused_on_a_gpu_only():
    assert build_optimizer(nn.Linear(3, 4), FLAGS).param_groups[0]["fused"] is None
    with FakeTensorMode(), torch.device("cuda:0"):
        assert build_optimizer(nn.Linear(3, 4), FLAGS).param_groups[0]["fused"] is True


def test_a_state_of_other_shapes_is_refused():
    wide, narrow = nn.Linear(3, 4), nn.Linear(3, 2)
    optimizer = adam(wide, None)
    steps(wide, optimizer, 1)
    with pytest.raises(ValueError, match=r"exp_avg of the optimizer is \(4, 3\), not \(2, 3\)"):
        load_optimizer(adam(narrow, None), optimizer.state_dict())
