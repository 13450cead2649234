"""The complete pretraining model: its parts, its outputs, its gradients."""

import pytest
import torch
from torch import nn

from models import ENCODERS, CrossNet, build_encoder
from models.image import IMAGE_ENCODERS, build_image_encoder
from models.losses import crossnet_objective
from models.projection_heads import image_projection, point_projection


def small_point_encoder(name="pointnet_cls"):
    return build_encoder(name, emb_dims=16, **({"k": 4} if name.startswith("dgcnn") else {}))


def batch(count=3, points=16, size=32):
    return {
        "view1": torch.randn(count, 3, points),
        "view2": torch.randn(count, 3, points),
        "rgb": torch.randn(count, 3, size, size),
        "gray": torch.randn(count, 1, size, size),
    }


def small_crossnet(name="pointnet_cls", **kwargs):
    return CrossNet(small_point_encoder(name), **{"image_model": "resnet18", **kwargs})


@pytest.mark.parametrize("name", ENCODERS)
def test_every_encoder_pretrains_and_every_parameter_learns(name, request):
    if name != "pointnet_cls":  # one of them with real ResNets
        request.getfixturevalue("small_runs")
    model = small_crossnet(name, temperature=0.5)
    if name == "dgcnn_partseg":  # its last layer starts at zero, so that the ones before learn from the second step on
        nn.init.normal_(model.point_encoder.transform_net.transform.weight, std=0.1)
    losses = model(**batch())
    torch.testing.assert_close(losses.total, losses.intra + losses.cross)
    losses.total.backward()
    # Biases before a batch norm (PointNet) cancel; rounding leaves them a gradient that is tiny, not absent.
    without = [key for key, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(("modality", "built"), [("both", ["rgb", "gray"]), ("rgb", ["rgb"]), ("gray", ["gray"])])
@pytest.mark.parametrize("objective", ["con", "ave"])
def test_only_the_branches_in_use_are_built_and_asked_for(modality, built, objective, small_runs):
    model = small_crossnet(image_modality=modality, objective=objective)
    assert list(model.image_encoders) == list(model.image_heads) == built
    inputs = batch()
    used = {key: value for key, value in inputs.items() if key in ("view1", "view2", *built)}
    model(**used).total.backward()
    assert all(p.grad is not None for p in model.parameters())  # DDP needs no search for unused parameters
    for missing in built:
        with pytest.raises(ValueError, match=f"{missing} branch but got no {missing} images"):
            model(**{key: value for key, value in used.items() if key != missing})


@pytest.mark.parametrize("objective", ["con", "ave"])
@pytest.mark.parametrize("mask", [False, True])
def test_losses_are_the_objective_of_the_projections(objective, mask, small_runs):
    model = small_crossnet(objective=objective, alpha=0.7, temperature=0.3, mask_same_object=mask).eval()
    inputs = batch()
    views = tuple(model.point_head(model.point_encoder(inputs[v]).pooled) for v in ("view1", "view2"))
    images = {m: model.image_heads[m](model.image_encoders[m](inputs[m])) for m in ("rgb", "gray")}
    expected = crossnet_objective(
        views, **images, objective=objective, alpha=0.7, temperature=0.3, mask_same_object=mask
    )
    for actual, value in zip(model(**inputs), expected, strict=True):
        torch.testing.assert_close(actual, value, rtol=1e-5, atol=1e-5)


def test_both_views_share_one_batch_of_statistics(small_runs):
    model = small_crossnet()
    inputs = batch()
    model.project_points(inputs["view1"], inputs["view2"])
    assert model.point_encoder.bn1.num_batches_tracked == 1
    rows = torch.cat([inputs["view1"], inputs["view2"]]).transpose(1, 2).flatten(0, 1)
    mean = (rows @ model.point_encoder.conv1.weight[:, :, 0].T).mean(0)
    torch.testing.assert_close(model.point_encoder.bn1.running_mean, 0.1 * mean)


def test_unknown_choices_are_errors_that_list_the_known():
    for argument, match in [
        ({"image_modality": "depth"}, "'depth'.*both, rgb, gray"),
        ({"objective": "max"}, "'max'.*con, ave"),
        ({"image_model": "vgg"}, "'vgg'.*resnet18, resnet34, resnet50, resnet101"),
    ]:
        with pytest.raises(ValueError, match=match):
            small_crossnet(**argument)


# ----------------------------------------------------------------------------------------------- images and heads

WIDTHS = {"resnet18": 512, "resnet34": 512, "resnet50": 2048, "resnet101": 2048}


@pytest.mark.parametrize("channels", [3, 1])
@pytest.mark.parametrize("name", IMAGE_ENCODERS)
def test_image_encoders_map_any_channels_to_one_vector_per_image(name, channels):
    encoder = build_image_encoder(name, in_channels=channels).eval()
    with torch.no_grad():
        features = encoder(torch.randn(2, channels, 32, 32))
    assert features.shape == (2, WIDTHS[name]) and encoder.feature_dim == WIDTHS[name]
    assert not torch.allclose(features[0], features[1])


def test_image_encoders_start_at_random():
    first, second = (build_image_encoder("resnet18", in_channels=1).conv1.weight for _ in range(2))
    assert not torch.equal(first, second)
    # Gray: a fresh Conv2d of PyTorch, uniform in +-1 / sqrt(fan in), as released; torchvision's own first layer
    # starts with fan out 64 * 7 * 7 for ReLU (He et al., arXiv:1502.01852).
    assert first.std().item() == pytest.approx((1 / 49 / 3) ** 0.5, rel=0.05)
    assert first.abs().max().item() == pytest.approx(1 / 7, rel=0.01)
    color = build_image_encoder("resnet18", in_channels=3).conv1.weight
    assert color.std().item() == pytest.approx((2 / (64 * 49)) ** 0.5, rel=0.05)


def test_projection_heads_are_the_released_ones():
    points, images = point_projection(2048), image_projection(2048)
    assert {key: tuple(p.shape) for key, p in points.named_parameters()} == {
        **{"0.weight": (1024, 2048), "0.bias": (1024,), "1.weight": (1024,), "1.bias": (1024,)},
        **{"3.weight": (256, 1024), "3.bias": (256,)},
    }
    narrow = CrossNet(build_encoder("dgcnn_cls", emb_dims=512), image_model="resnet18").point_head
    assert [layer.weight.shape for layer in (narrow[0], narrow[3])] == [
        (512, 1024),
        (256, 512),
    ]  # as wide as the embedding
    assert {key: tuple(p.shape) for key, p in images.named_parameters()} == {
        **{"0.weight": (512, 2048), "1.weight": (512,), "1.bias": (512,), "3.weight": (256, 512)}
    }
    assert [type(layer) for layer in points] == [type(layer) for layer in images]
    assert isinstance(points[2], nn.ReLU)


def test_the_temperature_is_the_released_one_of_the_objective_if_not_given(small_runs):
    encoder = build_encoder("pointnet_cls", emb_dims=8)
    found = {o: CrossNet(encoder, objective=o, image_model="resnet18").temperature for o in ("con", "ave")}
    assert found == {"con": 0.2, "ave": 0.1}
    assert CrossNet(encoder, objective="ave", image_model="resnet18", temperature=0.3).temperature == 0.3
