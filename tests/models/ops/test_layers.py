"""Layers applied to rows against the plain modules."""

import copy

import torch
from torch import nn

from models.ops.layers import apply_to_rows, max_over_points, point_block


def test_pointwise_block_on_rows_equals_the_module():
    block = point_block(5, 7).double()
    x = torch.randn(3, 5, 11, dtype=torch.float64)
    reference = copy.deepcopy(block)
    rows = apply_to_rows(x.transpose(1, 2).flatten(0, 1), *block)
    torch.testing.assert_close(rows.unflatten(0, (3, 11)).transpose(1, 2), reference(x))
    torch.testing.assert_close(block[1].running_var, reference[1].running_var)


def test_pointwise_layer_with_bias_on_rows_equals_the_module():
    conv = nn.Conv1d(4, 6, 1)
    x = torch.randn(2, 4, 9)
    torch.testing.assert_close(apply_to_rows(x.mT.flatten(0, 1), conv).unflatten(0, (2, 9)).mT, conv(x))


def test_maximum_over_points_sends_the_gradient_to_one_point():
    x = torch.tensor([[[1.0], [3.0], [3.0]]], requires_grad=True)
    max_over_points(x).sum().backward()
    assert sorted(x.grad.flatten().tolist()) == [0, 0, 1]
