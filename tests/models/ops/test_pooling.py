"""The pooled pointwise layer against the plain modules."""

import copy

import pytest
import torch
from torch import nn

from models.ops import pooling
from models.ops.layers import point_block
from models.ops.pooling import pool_pointwise
from tests.support.comparing import assert_close


def plain(layers, clouds, block):
    """(B * N, C_i) rows -> maximum and mean of the block's output, each (B, E)."""
    points = torch.cat(layers, dim=1).unflatten(0, (clouds, -1)).transpose(1, 2)
    out = block(points)
    return out.amax(2), out.mean(2)


def outcome(function, layers, clouds, block, *, mean, dtype=None):
    """Everything that one formulation computes, by name."""
    block = copy.deepcopy(block)
    layers = [layer.clone().requires_grad_() for layer in layers]
    generator = torch.Generator().manual_seed(3)
    with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
        both = function(layers, clouds, block)
    both = both[: 1 + mean]
    sum((out * torch.randn(out.shape, generator=generator, dtype=out.dtype)).sum() for out in both).backward()
    gradients = {f"grad of {name}": p.grad for name, p in block.named_parameters()}
    inputs = {f"grad of layer {i}": layer.grad for i, layer in enumerate(layers)}
    return {"maximum": both[0], "mean": both[-1], **gradients, **inputs, **dict(block.named_buffers())}


def example(*, dtype=torch.float64, clouds=3, points=17, widths=(4, 3), out=8, gains="both signs and zero"):
    block = point_block(sum(widths), out).to(dtype)
    nn.init.normal_(block[1].weight)
    nn.init.normal_(block[1].bias)
    nn.init.normal_(block[1].running_mean)
    nn.init.uniform_(block[1].running_var, 0.5, 2)
    if gains == "both signs and zero":
        nn.init.zeros_(block[1].weight[:1])
    return [torch.randn(clouds * points, width, dtype=dtype) for width in widths], clouds, block


def ours(mean):
    return lambda *inputs: pool_pointwise(*inputs, with_mean=mean)


@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("budget", [1, 50, 8 * 17, 10**6], ids="block of {}".format)
def test_equals_the_plain_modules(monkeypatch, mean, train, budget):
    monkeypatch.setitem(pooling.ELEMENTWISE_TILE, "cpu", budget)
    inputs = example()
    inputs[2].train(train)
    # Of equal values amax shares the gradient out and ours gives it to one point; a gain of zero makes all equal.
    skip = {"grad of 1.weight"}
    actual, expected = (outcome(f, *inputs, mean=mean) for f in (ours(mean), plain))
    for result in (actual, expected):
        for name in skip:
            result[name] = result[name][1:]
    assert_close(actual, expected, tolerance=1e-11)


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_float32_agrees_over_several_groups_of_points(train):
    inputs = example(dtype=torch.float32, points=70, gains="non-zero")
    inputs[2].train(train)
    actual, expected = (outcome(f, *inputs, mean=True) for f in (ours(True), plain))
    assert_close(actual, expected, tolerance=1e-5)


@pytest.mark.parametrize("train", [True, False])
def test_a_second_gradient_is_refused(train):
    layers, clouds, block = example()
    layers[0].requires_grad_()
    maximum, mean = pool_pointwise(layers, clouds, block.train(train), with_mean=True)
    (gradient,) = torch.autograd.grad((maximum + mean).square().sum(), layers[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_identical_points_share_one_gradient():
    layers, clouds, block = example(gains="non-zero")
    layers = [layer.unflatten(0, (clouds, -1)) for layer in layers]
    for layer in layers:
        layer[:, 10:] = layer[:, :1]
    layers = [layer.flatten(0, 1) for layer in layers]
    actual, expected = (outcome(f, layers, clouds, block, mean=True) for f in (ours(True), plain))
    for result in (actual, expected):
        for i in range(2):
            gradient = result[f"grad of layer {i}"].unflatten(0, (clouds, -1))
            gradient[:, 0] += gradient[:, 10:].sum(1)
            result[f"grad of layer {i}"] = gradient[:, :10]
    assert_close(actual, expected, tolerance=1e-11)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_only_the_product_is_in_half_precision(dtype):
    errors = []
    for _ in range(5):
        inputs = example(dtype=torch.float32, points=60, gains="non-zero")
        mixed, single = (outcome(ours(True), *inputs, mean=True, dtype=d) for d in (dtype, None))
        assert mixed["maximum"].dtype == torch.float32 and mixed["grad of 0.weight"].dtype == torch.float32
        errors.append([((mixed[n] - v).double().norm() / v.double().norm()).item() for n, v in single.items()])
    # Rounding may make another point the maximum, which moves a gradient far: the usual error counts.
    assert torch.tensor(errors).median(0).values.max() < 0.03


def test_without_parameters_or_running_statistics():
    layers, clouds, block = example()
    block[1] = nn.BatchNorm1d(8, affine=False, track_running_stats=False)
    actual, expected = (outcome(f, layers, clouds, block, mean=True) for f in (ours(True), plain))
    assert_close(actual, expected, tolerance=1e-11)


def test_a_large_offset_does_not_cancel_the_variance():
    layers, clouds, block = example(dtype=torch.float32, gains="non-zero")
    layers[0] += 1000
    single = pool_pointwise(layers, clouds, copy.deepcopy(block), with_mean=True)
    double = plain([layer.double() for layer in layers], clouds, block.double())
    for ours_, theirs in zip(single, double, strict=True):
        torch.testing.assert_close(ours_.double(), theirs, rtol=0, atol=5e-3)


def test_less_is_kept_for_the_backward_pass_than_by_the_modules():
    layers, clouds, block = example(points=50, widths=(4,), out=64)
    kept = {}
    for name, function in (("ours", ours(True)), ("plain", plain)):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=sizes: s.append(t.numel()) or t, lambda t: t):
            function([layer.clone().requires_grad_() for layer in layers], clouds, copy.deepcopy(block))
        kept[name] = sum(size == 3 * 50 * 64 for size in sizes)
    assert kept["ours"] == 1 < kept["plain"]


def test_evaluation_without_gradient_keeps_no_embedding(monkeypatch):
    layers, clouds, block = example()
    seen = []
    original = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda t, size, **k: seen.append(size) or original(t, size, **k))
    with torch.no_grad():
        pool_pointwise(layers, clouds, block.eval())
    assert (clouds, 17, 8) not in seen and (0,) in seen
