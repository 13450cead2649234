import copy

import torch
from torch import nn

from models.ops.dropout import SampleDropout


def dropped(x, seeds):
    layer = SampleDropout(0.3)
    layer.reseed(seeds)
    return layer(x)


def test_a_samples_mask_follows_from_its_seed_alone():
    x = torch.randn(3 * 4, 5)  # three samples of four rows
    whole = dropped(x, [7, 8, 9])
    one = torch.cat([dropped(part, [seed]) for part, seed in zip(x.split(4), (7, 8, 9), strict=True)])
    torch.manual_seed(99)
    assert torch.equal(one, whole) and torch.equal(dropped(x, [7, 8, 9]), whole)
    masks = [part == 0 for part in dropped(torch.ones(12, 5), [7, 8, 7]).split(4)]
    assert torch.equal(masks[0], masks[2]) and not torch.equal(masks[0], masks[1])


def test_it_drops_and_scales_like_dropout():
    x = torch.ones(4, 50_000, requires_grad=True)
    y = dropped(x, [1, 2, 3, 4])
    y.sum().backward()
    assert set(y.unique().tolist()) == {0, torch.tensor(1 / 0.7).item()}
    assert torch.equal(x.grad, y) and ((y == 0).float().mean(1) - 0.3).abs().max() < 0.01


def test_without_seeds_or_in_evaluation_it_is_dropout():
    x, layer = torch.randn(6, 5), SampleDropout(0.3)
    torch.manual_seed(3)
    expected = nn.Dropout(0.3)(x)
    torch.manual_seed(3)
    assert torch.equal(layer(x), expected)
    layer.reseed([1, 2])
    assert torch.equal(layer.eval()(x), x)


def test_conversion_finds_every_dropout_and_keeps_the_rest():
    net = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.2), nn.Sequential(nn.Dropout(0.4)))
    before = copy.deepcopy(net.state_dict())
    assert SampleDropout.convert(net) == [net[1], net[2][0]] and [d.p for d in SampleDropout.convert(net)] == [0.2, 0.4]
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_a_second_call_draws_another_mask_and_a_new_pass_repeats_the_first():
    layer, x = SampleDropout(0.5), torch.ones(2 * 50, 200)

    def passes(seeds, calls=3):
        layer.reseed(seeds)
        return [layer(x) == 0 for _ in range(calls)]

    masks = passes([3, 4])
    assert all(torch.equal(a, b) for a, b in zip(masks, passes([3, 4]), strict=True))
    swapped = passes([4, 3])
    assert all(torch.equal(torch.cat([b[50:], b[:50]]), a) for a, b in zip(masks, swapped, strict=True))
    samples = [part for mask in masks for part in mask.split(50)]
    for number, one in enumerate(samples):
        for other in samples[:number]:
            assert abs((one == other).float().mean() - 0.5) < 0.03  # 10,000 entries: 6 standard deviations
