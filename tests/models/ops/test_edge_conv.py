"""EdgeConv without edges against the textbook formulation, which builds every edge."""

import copy

import pytest
import torch
from torch import nn

from benchmarks.reference.textbook import TextbookTransformNet, textbook_edge_conv, textbook_knn
from models.dgcnn import TransformNet
from models.ops import edge_conv as module
from models.ops import tiles
from models.ops.edge_conv import edge_conv, edge_conv_two_layers
from models.ops.knn import flatten_neighbors, knn
from models.ops.layers import edge_block
from tests.support.comparing import assert_close

TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-4}
EVERY_GAMMA = "both signs and zero"


def blocks_of(widths, *, dtype=torch.float64, gammas="positive", momentum=0.1):
    """EdgeConv layers with batch norms that are not in their initial state."""
    blocks = []
    for i, (a, b) in enumerate(zip(widths, widths[1:], strict=False)):
        block = edge_block(2 * a if i == 0 else a, b)
        norm = block[1]
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias)
        nn.init.normal_(norm.running_mean)
        nn.init.uniform_(norm.running_var, 0.5, 2.0)
        norm.momentum = momentum
        if gammas == EVERY_GAMMA:
            with torch.no_grad():
                norm.weight[::2] *= -1
                norm.weight[-1] = 0
        blocks.append(block.to(dtype))
    return blocks


def ours(x, index, blocks):
    """(B, C, N), (B, N, k) -> (B, C_out, N) by the layers under test."""
    b, _, n = x.shape
    rows, neighbors = x.transpose(1, 2).reshape(b * n, -1), flatten_neighbors(index)
    rows = (
        edge_conv(rows, neighbors, *blocks, clouds=b)
        if len(blocks) == 1
        else edge_conv_two_layers(rows, neighbors, *blocks)
    )
    return rows.unflatten(0, (b, n)).transpose(1, 2)


def outcome(function, x, index, blocks, *, train=True, steps=1):
    """Everything that one formulation computes: output, gradients and batch-norm buffers, by name."""
    blocks = copy.deepcopy(nn.ModuleList(blocks)).train(train)
    x = x.clone().requires_grad_()
    generator = torch.Generator().manual_seed(7)
    for _ in range(steps):
        out = function(x, index, blocks)
        (out * torch.randn(out.shape, generator=generator, dtype=out.dtype)).sum().backward()
    parameters = {f"grad of {name}": p.grad for name, p in blocks.named_parameters()}
    return {"output": out.detach(), "grad of x": x.grad, **parameters, **dict(blocks.named_buffers())}


def textbook(x, index, blocks):
    return textbook_edge_conv(x, index, *blocks)


def without_undefined(gammas, widths):
    """At a gain of zero all edges tie, so the gain's own gradient is not unique; everything else is."""
    return (f"grad of {len(widths) - 2}.1.weight",) if gammas == EVERY_GAMMA else ()


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("gammas", ["positive", EVERY_GAMMA])
@pytest.mark.parametrize("widths", [(3, 8), (3, 8, 10)], ids=["one layer", "two layers"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_edge_conv_equals_the_textbook(widths, gammas, train, dtype):
    x = torch.randn(3, 3, 20, dtype=dtype)
    blocks = blocks_of(widths, dtype=dtype, gammas=gammas)
    index = knn(x.mT, 6)
    actual, expected = (outcome(f, x, index, blocks, train=train) for f in (ours, textbook))
    assert actual["output"].dtype == dtype
    assert_close(actual, expected, tolerance=TOLERANCE[dtype], without=without_undefined(gammas, widths))


@pytest.mark.parametrize("k", [1, 2, 8, 9])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("widths", [(4, 5), (4, 6, 5)], ids=["one layer", "two layers"])
def test_every_k_from_one_to_all_points_and_a_batch_of_one(widths, batch, k):
    x = torch.randn(batch, 4, 9, dtype=torch.float64)
    blocks = blocks_of(widths, gammas=EVERY_GAMMA)
    index = knn(x.mT, k)
    actual, expected = (outcome(f, x, index, blocks) for f in (ours, textbook))
    assert_close(actual, expected, tolerance=1e-10, without=without_undefined(EVERY_GAMMA, widths))


def test_a_gain_of_zero_has_a_subgradient():
    x = torch.randn(1, 3, 10, dtype=torch.float64)
    (block,) = blocks_of((3, 2))
    index = knn(x.mT, 4)
    tiny = []
    for gain in (0.0, 1e-9):  # the gradient at zero is that from the right: the maximum, as everywhere else
        nn.init.constant_(block[1].weight, gain)
        tiny.append(outcome(ours, x, index, [block])["grad of 0.1.weight"])
    torch.testing.assert_close(tiny[0], tiny[1])


@pytest.mark.parametrize("widths", [(3, 6), (3, 6, 5)], ids=["one layer", "two layers"])
@pytest.mark.parametrize("momentum", [0.1, 0.9, None])
def test_running_statistics_over_several_steps(widths, momentum):
    x = torch.randn(2, 3, 12, dtype=torch.float64)
    blocks = blocks_of(widths, momentum=momentum)
    index = knn(x.mT, 5)
    actual, expected = (outcome(f, x, index, blocks, steps=3) for f in (ours, textbook))
    assert_close(actual, expected, tolerance=1e-10)
    assert actual["0.1.num_batches_tracked"] == 3  # the backward computes blocks again, and does not count them again


@pytest.mark.parametrize("widths", [(3, 6), (3, 6, 5)], ids=["one layer", "two layers"])
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_batch_norm_without_running_statistics_or_parameters(widths, train):
    blocks = blocks_of(widths)
    for block in blocks:
        block[1] = nn.BatchNorm2d(
            block[1].num_features, affine=False, track_running_stats=block is blocks[0], dtype=torch.float64
        )
    x = torch.randn(2, 3, 12, dtype=torch.float64)
    index = knn(x.mT, 5)
    actual, expected = (outcome(f, x, index, blocks, train=train) for f in (ours, textbook))
    assert_close(actual, expected, tolerance=1e-10)


def test_batch_norm_with_neither_parameters_nor_buffers():
    (block,) = blocks_of((3, 6))
    block[1] = nn.BatchNorm2d(6, affine=False, track_running_stats=False)
    x = torch.randn(2, 3, 12, dtype=torch.float64)
    index = knn(x.mT, 5)
    actual, expected = (outcome(f, x, index, [block]) for f in (ours, textbook))
    assert_close(actual, expected, tolerance=1e-10)


@pytest.mark.parametrize("widths", [(3, 6), (3, 6, 5)], ids=["one layer", "two layers"])
def test_duplicated_points(widths):
    """Ties: any one of several identical points may get the gradient, but their sum and all else must match."""
    x = torch.randn(2, 3, 16, dtype=torch.float64)
    x[..., 10:] = x[..., :1]  # what random input dropout does
    blocks = blocks_of(widths, gammas="positive")
    index, other = knn(x.mT, 8), textbook_knn(x, 8)
    actual, expected = outcome(ours, x, index, blocks), outcome(textbook, x, other, blocks)
    for result in (actual, expected):
        gradient = result["grad of x"]
        gradient[..., 0] += gradient[..., 10:].sum(2)
        result["grad of x"] = gradient[..., :10]
    assert_close(actual, expected, tolerance=1e-10)


@pytest.mark.parametrize("widths", [(3, 6), (3, 6, 5)], ids=["one layer", "two layers"])
def test_a_cloud_of_one_repeated_point_stays_finite(widths):
    x = torch.randn(1, 3, 1).expand(1, 3, 10).contiguous()
    actual = outcome(ours, x, knn(x.mT, 4), blocks_of(widths, dtype=torch.float32))
    assert all(value.isfinite().all() for value in actual.values())


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("budget", [1, 150, 1000])
def test_two_layers_in_blocks_of_any_size(monkeypatch, budget, train):
    """20 points x 5 neighbors x 7 channels: one point, 4 points (the last block is full) or 28 points (it is not)."""
    monkeypatch.setitem(module._EDGE_TILE, "cpu", budget)
    x = torch.randn(2, 3, 20, dtype=torch.float64)
    blocks = blocks_of((3, 7, 6), gammas=EVERY_GAMMA)
    index = knn(x.mT, 5)
    actual, expected = (outcome(f, x, index, blocks, train=train) for f in (ours, textbook))
    assert_close(actual, expected, tolerance=1e-10, without=without_undefined(EVERY_GAMMA, (3, 7, 6)))


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("budget", [1, 2 * 20 * 7, 10**6], ids=["a cloud", "two clouds, then one", "all"])
def test_one_layer_in_blocks_of_whole_clouds(monkeypatch, budget, train):
    """Far-apart clouds: the statistics of blocks differ, those of the layer are of all."""
    monkeypatch.setitem(tiles._GATHER_TILE, "cpu", budget)
    x = torch.randn(3, 3, 20, dtype=torch.float64) + torch.tensor([0, 5, -20])[:, None, None]
    layers = blocks_of((3, 7), gammas=EVERY_GAMMA)
    index = knn(x.mT, 5)
    actual, expected = (outcome(f, x, index, layers, train=train) for f in (ours, textbook))
    assert_close(actual, expected, tolerance=1e-10, without=without_undefined(EVERY_GAMMA, (3, 7)))


def test_one_layer_on_a_cloud_of_more_points_than_two_bytes_count():
    x = torch.randn(1, 2, 40_000, dtype=torch.float64)
    index = torch.randint(40_000, (1, 40_000, 3))
    layers = blocks_of((2, 3), gammas=EVERY_GAMMA)
    actual, expected = (outcome(f, x, index, layers) for f in (ours, textbook))
    assert_close(actual, expected, tolerance=1e-8, without=without_undefined(EVERY_GAMMA, (2, 3)))


def test_rows_that_are_not_so_many_clouds_are_refused():
    (block,) = blocks_of((3, 4))
    with pytest.raises(ValueError, match="10 rows are not 3 clouds"):
        edge_conv(torch.randn(10, 3, dtype=torch.float64), torch.zeros(10, 2, dtype=torch.int64), block, clouds=3)


@pytest.mark.parametrize("trains", [True, False])
def test_a_second_gradient_is_refused(trains):
    (block,) = blocks_of((3, 4))
    x = torch.randn(10, 3, dtype=torch.float64, requires_grad=True)
    block.train(trains)
    (gradient,) = torch.autograd.grad(edge_conv(x, knn(x[None], 4)[0], block).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_a_second_gradient_through_two_layers_is_refused():
    x = torch.randn(10, 3, dtype=torch.float64, requires_grad=True)
    out = edge_conv_two_layers(x, knn(x[None], 4)[0], *blocks_of((3, 4, 5)))
    (gradient,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("widths", [(3, 6), (3, 6, 5)], ids=["one layer", "two layers"])
def test_a_large_common_offset_does_not_cancel_the_variance(widths):
    """A naive E[h^2] - E[h]^2 in float32 would lose all digits here."""
    x = torch.randn(2, 3, 32) + 300
    blocks = blocks_of(widths, dtype=torch.float32)
    index = knn(x.mT, 6)
    single = outcome(ours, x, index, blocks)
    double = outcome(textbook, x.double(), index, [block.double() for block in blocks])
    torch.testing.assert_close(single["output"].double(), double["output"], rtol=0, atol=5e-3)
    torch.testing.assert_close(single["0.1.running_var"].double(), double["0.1.running_var"], rtol=1e-3, atol=0)


@pytest.mark.parametrize("widths", [(3, 6), (3, 6, 5)], ids=["one layer", "two layers"])
def test_a_large_common_offset_leaves_the_gradient_its_digits(widths):
    """Batch norm takes the offset away, so no gradient depends on it."""
    x = torch.randn(2, 3, 32) + 300
    layers = nn.ModuleList(blocks_of(widths, dtype=torch.float32))
    index = knn(x.mT, 6)
    target = torch.randn(2, widths[-1], 32)
    exact = copy.deepcopy(layers).double()
    (textbook((x - 300).double(), index, exact) * target.double()).sum().backward()
    (ours(x, index, layers) * target).sum().backward()
    for (name, actual), expected in zip(layers.named_parameters(), exact.parameters(), strict=True):
        error = (actual.grad.double() - expected.grad).abs().max() / expected.grad.abs().max()
        assert error < 5e-5, f"{name}: {error:.1e}"


@pytest.mark.parametrize("widths", [(3, 6), (3, 6, 5)], ids=["one layer", "two layers"])
def test_edge_conv_under_autocast_is_that_of_float32(widths):
    x = torch.randn(2, 3, 24)
    blocks = blocks_of(widths, dtype=torch.float32)
    index = knn(x.mT, 6)

    def mixed(*inputs):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return ours(*inputs)

    assert_close(outcome(mixed, x, index, blocks), outcome(ours, x, index, blocks), tolerance=0)


@pytest.mark.parametrize("widths", [(3, 6), (3, 6, 5)], ids=["one layer", "two layers"])
def test_strided_rows(widths):
    blocks = nn.ModuleList(blocks_of(widths))
    rows = torch.randn(20, 6, dtype=torch.float64)[:, ::2]
    neighbors = torch.randint(20, (20, 8))[:, ::2]
    function = {1: edge_conv, 2: edge_conv_two_layers}[len(blocks)]
    torch.testing.assert_close(
        function(rows, neighbors, *blocks), function(rows.contiguous(), neighbors.contiguous(), *blocks)
    )


@pytest.mark.parametrize("widths", [(3, 8), (3, 8, 8)], ids=["one layer", "two layers"])
def test_no_tensor_of_all_edges_is_kept(monkeypatch, widths):
    """The point of the formulation: between forward and backward nothing of N x k x C elements is alive."""
    monkeypatch.setitem(module._EDGE_TILE, "cpu", 1)
    x = torch.randn(2, 3, 40)
    index = knn(x.mT, 10)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        ours(x.requires_grad_(), index, blocks_of(widths, dtype=torch.float32))
    assert 0 < max(saved) <= 2 * 40 * 10  # the neighbor lists themselves: one number per edge, no channels


def test_transform_net_starts_at_the_identity():
    points = torch.randn(3, 30, 3)
    matrices = TransformNet()(points, flatten_neighbors(knn(points, 5)))
    assert torch.equal(matrices, torch.eye(3).expand(3, 3, 3))


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_transform_net_equals_the_textbook(train):
    net = TransformNet().double()
    nn.init.normal_(net.transform.weight, std=0.1)
    reference = TextbookTransformNet(5).double()
    reference.load_state_dict(net.state_dict())
    points = torch.randn(3, 16, 3, dtype=torch.float64)
    matrices = net.train(train)(points, flatten_neighbors(knn(points, 5)))
    torch.testing.assert_close(matrices, reference.train(train)(points.mT), rtol=0, atol=1e-10)
