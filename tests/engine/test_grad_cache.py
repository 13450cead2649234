"""Gradient caching against a single pass over the whole batch."""

import copy

import pytest
import torch
from torch import nn

from engine.grad_cache import backward_in_chunks
from models import CrossNet, build_encoder
from tests.support.comparing import assert_close

pytestmark = pytest.mark.usefixtures("small_runs")


class Noisy(nn.Module):
    """An encoder with dropout, so that randomness must be replayed."""

    feature_dim = 16

    def __init__(self):
        super().__init__()
        self.inner = build_encoder("pointnet_cls", emb_dims=16)
        self.drop = nn.Dropout(0.3)

    def forward(self, x):
        features = self.inner(x)
        return features._replace(pooled=self.drop(features.pooled))


def example(count=7, **kwargs):
    torch.manual_seed(0)
    encoder = kwargs.pop("encoder", None) or build_encoder("dgcnn_cls", k=3, emb_dims=8)
    model = CrossNet(encoder, image_model="resnet18", **kwargs).double()
    inputs = {
        "view1": torch.randn(count, 3, 12).double(),
        "view2": torch.randn(count, 3, 12).double(),
        "rgb": torch.randn(count, 3, 32, 32).double(),
        "gray": torch.randn(count, 1, 32, 32).double(),
    }
    return model, {name: value for name, value in inputs.items() if name in ("view1", "view2", *model.image_encoders)}


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def reference(model, inputs, number):
    """One backward pass through all chunks at once, each with its own batch statistics."""
    chunks = zip(*(value.tensor_split(number) for value in inputs.values()), strict=True)
    parts = [model.project(**dict(zip(inputs, chunk, strict=True))) for chunk in chunks]
    whole = type(parts[0])(*(None if p[0] is None else torch.cat(p) for p in zip(*parts, strict=True)))
    losses = model.losses(whole)
    losses.total.backward()
    return losses


@pytest.mark.parametrize(("chunk_size", "number"), [(2, 3), (3, 3), (4, 2), (7, 1), (100, 1)])
def test_gradients_losses_and_statistics_equal_one_pass_with_statistics_of_chunks(chunk_size, number):
    model, inputs = example()
    other = copy.deepcopy(model)
    losses = backward_in_chunks(model, inputs, chunk_size=chunk_size)
    expected = reference(other, inputs, number)
    assert not losses.total.requires_grad
    torch.testing.assert_close(torch.stack(losses), torch.stack(expected))
    assert_close(gradients(model), gradients(other), tolerance=1e-12)
    assert_close(dict(model.named_buffers()), dict(other.named_buffers()), tolerance=1e-12)


@pytest.mark.parametrize(("objective", "modality"), [("con", "rgb"), ("ave", "both"), ("ave", "gray")])
def test_every_objective_and_modality(objective, modality):
    model, inputs = example(objective=objective, image_modality=modality, mask_same_object=objective == "con")
    other = copy.deepcopy(model)
    backward_in_chunks(model, inputs, chunk_size=4)
    reference(other, inputs, 2)
    assert_close(gradients(model), gradients(other), tolerance=1e-12)


def test_with_statistics_that_do_not_depend_on_the_batch_it_is_the_plain_step():
    model, inputs = example()
    other = copy.deepcopy(model).eval()
    losses = backward_in_chunks(model.eval(), inputs, chunk_size=3)
    expected = other(**inputs)
    expected.total.backward()
    torch.testing.assert_close(torch.stack(losses), torch.stack(expected).detach())
    assert_close(gradients(model), gradients(other), tolerance=1e-12)


def test_random_numbers_are_replayed_and_go_on_as_after_a_single_pass():
    model, inputs = example(encoder=Noisy())
    other = copy.deepcopy(model)
    torch.manual_seed(5)
    backward_in_chunks(model, inputs, chunk_size=4)
    following = torch.rand(3)
    torch.manual_seed(5)
    reference(other, inputs, 2)
    assert torch.equal(torch.rand(3), following)
    assert_close(gradients(model), gradients(other), tolerance=1e-12)


def test_gradients_are_added_and_scaled():
    model, inputs = example()
    backward_in_chunks(model, inputs, chunk_size=4)
    once = gradients(model)
    backward_in_chunks(model, inputs, chunk_size=4, scale=lambda loss: loss * 3)
    assert_close(gradients(model), {name: 4 * value for name, value in once.items()}, tolerance=1e-12)


def test_what_is_kept_for_the_backward_pass_is_that_of_a_chunk():
    model, inputs = example(count=12)
    kept = {}
    for name, step in (
        ("whole", lambda: model(**inputs).total.backward()),
        ("chunks", lambda: backward_in_chunks(model, inputs, chunk_size=3)),
    ):
        alive, most = [0], [0]

        class Kept:
            """A saved tensor that is counted while it lives."""

            def __init__(self, tensor, alive=alive, most=most):
                self.tensor, self.alive = tensor, alive
                alive[0] += tensor.numel()
                most[0] = max(most[0], alive[0])

            def __del__(self):
                self.alive[0] -= self.tensor.numel()

        with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
            step()
        kept[name] = most[0]
    parameters = sum(p.numel() for p in model.parameters())
    assert kept["chunks"] - parameters < 0.3 * (kept["whole"] - parameters)


def test_a_chunk_of_one_object_is_refused():
    model, inputs = example()
    with pytest.raises(ValueError, match="chunk_size = 1"):
        backward_in_chunks(model, inputs, chunk_size=1)
