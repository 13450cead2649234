"""Every point encoder: compared with the textbook DGCNN, and the contract of ``build_encoder``."""

import copy

import pytest
import torch
from torch import nn

from benchmarks.reference.textbook import TEXTBOOK_ENCODERS
from engine.load_model import describe_encoder
from models import ENCODERS, CrossNet, PointFeatures, build_encoder, encoder_arguments, resolve_encoder_name
from models.base import pooled_features
from tests.support.comparing import assert_close

K, WIDTH = 5, 16
# Name, further arguments, width of the pooled feature, channels of the local one.
LAYOUTS = {
    "dgcnn_cls": ("dgcnn_cls", {"k": K}, 2 * WIDTH, 512),
    "dgcnn_partseg": ("dgcnn_partseg", {"k": K}, WIDTH, 192),
    "dgcnn_semseg": ("dgcnn_semseg", {"k": K}, WIDTH, 192),
    "dgcnn_semseg, 9 channels": ("dgcnn_semseg", {"k": K, "in_channels": 9}, WIDTH, 192),
    "pointnet_cls": ("pointnet_cls", {}, WIDTH, 320),
    "pointnet_partseg": ("pointnet_partseg", {}, WIDTH, 832 + WIDTH),
}
EVERY_LAYOUT = pytest.mark.parametrize("layout", LAYOUTS)
EVERY_DGCNN = pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout.startswith("dgcnn")])
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]


def small_encoder(layout, *, dtype=torch.float64, **kwargs):
    """Build a narrow encoder away from its initial state: gains of both signs, a T-Net that is not the identity."""
    name, arguments, _, _ = LAYOUTS[layout]
    encoder = build_encoder(name, emb_dims=WIDTH, **{**arguments, **kwargs})
    for module in encoder.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
            with torch.no_grad():
                module.weight[::3] *= -1
    if name == "dgcnn_partseg":
        nn.init.normal_(encoder.transform_net.transform.weight, std=0.05)
    return encoder.to(dtype)


def clouds(encoder, *, batch=3, points=20, dtype=torch.float64):
    return torch.randn(batch, encoder.in_channels, points, dtype=dtype)


def run(encoder, x, *, train):
    """Output, gradients and buffers of one forward and backward, by name; works on a copy."""
    encoder = copy.deepcopy(encoder).train(train)
    x = x.clone().requires_grad_()
    pooled, local = encoder(x)
    (pooled.square().sum() + local.square().mean()).backward()
    gradients = {f"grad of {name}": p.grad for name, p in encoder.named_parameters()}
    return {"pooled": pooled, "local": local, "grad of x": x.grad, **gradients, **dict(encoder.named_buffers())}


# ------------------------------------------------------------------------------------------- against the textbook


@EVERY_DGCNN
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_dgcnn_equals_the_textbook(layout, train):
    encoder = small_encoder(layout)
    name, arguments, _, _ = LAYOUTS[layout]
    reference = TEXTBOOK_ENCODERS[name](emb_dims=WIDTH, **arguments).double()
    reference.load_state_dict(encoder.state_dict())  # strict: the names agree, both ways
    x = clouds(encoder)
    actual, expected = run(encoder, x, train=train), run(reference, x, train=train)
    assert_close(actual, expected, tolerance=1e-9)


@EVERY_DGCNN
def test_dgcnn_equals_the_textbook_in_float32(layout):
    encoder = small_encoder(layout, dtype=torch.float32)
    name, arguments, _, _ = LAYOUTS[layout]
    reference = TEXTBOOK_ENCODERS[name](emb_dims=WIDTH, **arguments)
    reference.load_state_dict(encoder.state_dict())
    x = clouds(encoder, dtype=torch.float32)
    for actual, expected in zip(encoder(x), reference(x), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_nine_channels_take_their_first_graph_from_the_room_normalized_coordinates():
    encoder = small_encoder("dgcnn_semseg, 9 channels").eval()
    graphs = record_graphs(encoder)
    x = clouds(encoder)
    encoder(x)
    encoder(torch.cat([torch.randn_like(x[:, :6]), x[:, 6:]], dim=1))
    assert torch.equal(graphs[0], graphs[3])
    assert not torch.equal(graphs[1], graphs[4])  # later graphs are in feature space, which saw the other channels


# ------------------------------------------------------------------------------------------------------ contracts


@EVERY_LAYOUT
@pytest.mark.parametrize("batch", [1, 3])
def test_shapes_also_for_a_batch_of_one(layout, batch):
    encoder = small_encoder(layout, dtype=torch.float32).eval()
    _, _, feature_dim, local_dim = LAYOUTS[layout]
    features = encoder(clouds(encoder, batch=batch, dtype=torch.float32))
    assert isinstance(features, PointFeatures)
    assert features.pooled.shape == (batch, feature_dim) and encoder.feature_dim == feature_dim
    assert features.local.shape == (batch, local_dim, 20) and encoder.local_dim == local_dim


@EVERY_LAYOUT
def test_a_cloud_does_not_see_the_rest_of_its_batch_in_eval_mode(layout):
    encoder = small_encoder(layout).eval()
    x = clouds(encoder)
    together, alone = encoder(x), encoder(x[1:2])
    torch.testing.assert_close(together.pooled[1:2], alone.pooled)
    torch.testing.assert_close(together.local[1:2], alone.local)


@pytest.mark.parametrize("layout", ["dgcnn_cls", "dgcnn_semseg", "pointnet_cls"])
def test_layouts_without_a_transformer_train_on_a_single_cloud(layout):
    """The others normalize one vector per cloud over the batch, which needs at least two clouds."""
    encoder = small_encoder(layout).train()
    encoder(clouds(encoder, batch=1)).pooled.sum().backward()
    assert all(p.grad.isfinite().all() for p in encoder.parameters())


@EVERY_LAYOUT
def test_the_order_of_points_is_irrelevant(layout):
    encoder = small_encoder(layout).eval()
    x, order = clouds(encoder), torch.randperm(20)
    straight, shuffled = encoder(x), encoder(x[..., order])
    torch.testing.assert_close(shuffled.pooled, straight.pooled)
    torch.testing.assert_close(shuffled.local, straight.local[..., order])


@EVERY_LAYOUT
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype_and_device_are_those_of_the_input(layout, dtype, device):
    encoder = small_encoder(layout, dtype=dtype).to(device).eval()
    features = encoder(clouds(encoder, dtype=dtype).to(device))
    assert {f.dtype for f in features} == {dtype}
    assert {f.device.type for f in features} == {device}


@EVERY_LAYOUT
def test_float32_is_float64_up_to_rounding(layout):
    encoder = small_encoder(layout).eval()
    x = clouds(encoder)
    double, single = encoder(x), copy.deepcopy(encoder).float()(x.float())
    torch.testing.assert_close(single.pooled.double(), double.pooled, rtol=1e-4, atol=1e-4)


@EVERY_LAYOUT
def test_strided_input_and_untouched_input(layout):
    encoder = small_encoder(layout).eval()
    x = clouds(encoder, points=40)[..., ::2]
    before = x.clone()
    torch.testing.assert_close(encoder(x).pooled, encoder(before.contiguous()).pooled)
    assert torch.equal(x, before)


@EVERY_LAYOUT
def test_wrong_input_shapes_are_named(layout):
    encoder = small_encoder(layout)
    for shape in [(2, encoder.in_channels + 1, 20), (encoder.in_channels, 20)]:
        with pytest.raises(ValueError, match=rf"expected \(B, {encoder.in_channels}, N\), got \({shape[0]}, "):
            encoder(torch.zeros(shape, dtype=torch.float64))


@EVERY_DGCNN
def test_more_neighbors_than_points_is_a_clear_error(layout):
    encoder = small_encoder(layout, k=21)
    with pytest.raises(ValueError, match="k = 21 .* 20 points"):
        encoder(clouds(encoder))


@EVERY_LAYOUT
def test_gradients_under_bfloat16_autocast_are_finite(layout):
    encoder = small_encoder(layout, dtype=torch.float32).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features = encoder(clouds(encoder, dtype=torch.float32))
    features.pooled.float().square().sum().backward()
    assert all(p.grad.isfinite().all() for p in encoder.parameters())


def record_graphs(encoder):
    """Record every neighbor list that the encoder computes from now on, sorted for each point."""
    graphs, neighbors = [], encoder.neighbors

    def recording(points):
        index = neighbors(points)
        graphs.append(index.sort(dim=1).values)
        return index

    encoder.neighbors = recording
    return graphs


@EVERY_DGCNN
def test_all_graphs_under_bfloat16_autocast_are_those_of_float32(layout):
    """Distances of rounded coordinates or features would change about 5 % of the neighbors."""
    encoder = small_encoder(layout, dtype=torch.float32, k=10).eval()
    if layout == "dgcnn_partseg":  # a rotation, for the predicted matrix itself may be rounded
        nn.init.zeros_(encoder.transform_net.transform.weight)
        with torch.no_grad():
            encoder.transform_net.transform.bias.copy_(torch.tensor([0, 1, 0, -1, 0, 0, 0, 0, 1.0]))
    graphs = record_graphs(encoder)
    x = clouds(encoder, points=200, dtype=torch.float32)
    encoder(x)
    exact = list(graphs)
    graphs.clear()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        encoder(x)
    assert len(exact) == len(graphs) > 2
    for one, other in zip(exact, graphs, strict=True):
        assert torch.equal(one, other)


# ------------------------------------------------------------------------------------------------- names and table


@EVERY_LAYOUT
def test_an_encoder_is_rebuilt_from_its_description(layout):
    encoder = small_encoder(layout)
    description = describe_encoder(encoder)
    rebuilt = build_encoder(description["name"], **description["kwargs"]).double()
    rebuilt.load_state_dict(encoder.state_dict())
    assert describe_encoder(rebuilt) == description
    x = clouds(encoder)
    assert torch.equal(rebuilt.eval()(x).pooled, encoder.eval()(x).pooled)


def test_released_defaults():
    assert {name: encoder_arguments(name) for name in ENCODERS} == {
        "dgcnn_cls": {"k": 20, "emb_dims": 1024},
        "dgcnn_partseg": {"k": 20, "emb_dims": 1024},
        "dgcnn_semseg": {"k": 20, "emb_dims": 1024, "in_channels": 3},
        "pointnet_cls": {"emb_dims": 1024},
        "pointnet_partseg": {"emb_dims": 1024},
    }
    assert build_encoder("dgcnn_cls").feature_dim == 2048


def test_released_names_are_aliases():
    assert resolve_encoder_name("dgcnn_seg") == "dgcnn_partseg"
    assert resolve_encoder_name("pointnet_seg") == "pointnet_partseg"
    assert type(build_encoder("pointnet_seg", emb_dims=8)) is ENCODERS["pointnet_partseg"]


def test_unknown_names_and_values_are_errors():
    with pytest.raises(ValueError, match="unknown encoder 'dgcnn'.*dgcnn_cls.*pointnet_seg"):
        build_encoder("dgcnn")
    with pytest.raises(ValueError, match="k = 0"):
        build_encoder("dgcnn_cls", k=0)
    with pytest.raises(ValueError, match="in_channels = 6"):
        build_encoder("dgcnn_semseg", in_channels=6)
    with pytest.raises(TypeError, match="dropout"):
        build_encoder("pointnet_cls", dropout=0.5)


def norm_names(name, width):
    return {
        **{f"{name}.{key}": (width,) for key in ("weight", "bias", "running_mean", "running_var")},
        f"{name}.num_batches_tracked": (),
    }


def block_names(name, *shape):
    return {f"{name}.0.weight": shape, **norm_names(f"{name}.1", shape[0])}


def linear_names(name, *shape):
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def conv_names(name, *shape):
    return linear_names(name, *shape) | {f"{name}.weight": (*shape, 1)}


def numbered(name, names, *shapes, first=1):
    """Return the tensors of ``<name><number>`` for every shape."""
    return {key: value for i, shape in enumerate(shapes, first) for key, value in names(f"{name}{i}", *shape).items()}


def alignment_names(name, channels):
    return {
        **numbered(f"{name}.conv", conv_names, (64, channels), (128, 64), (1024, 128)),
        **numbered(f"{name}.fc", linear_names, (512, 1024), (256, 512), (channels**2, 256)),
        **numbered(f"{name}.bn", norm_names, (64,), (128,), (1024,), (512,), (256,)),
    }


NARROW, WIDE = (64, 64, 1, 1), (64, 128, 1, 1)
SEGMENTATION = numbered("conv", block_names, (64, 6, 1, 1), NARROW, WIDE, NARROW, WIDE, (1024, 192, 1))
# Names and shapes in the files that DGCNN, CrossPoint and PointNet repositories publish.
PUBLISHED = {
    "dgcnn_cls": numbered("conv", block_names, (64, 6, 1, 1), WIDE, (128, 128, 1, 1), (256, 256, 1, 1), (1024, 512, 1)),
    "dgcnn_partseg": {
        **numbered("transform_net.conv", block_names, (64, 6, 1, 1), (128, 64, 1, 1), (1024, 128, 1)),
        "transform_net.linear1.weight": (512, 1024),
        "transform_net.linear2.weight": (256, 512),
        **numbered("transform_net.bn", norm_names, (512,), (256,), first=3),
        **linear_names("transform_net.transform", 9, 256),
        **SEGMENTATION,
    },
    "dgcnn_semseg": SEGMENTATION,
    "pointnet_cls": {
        **{f"conv{i}.weight": shape for i, shape in enumerate(((64, 3, 1), *[(64, 64, 1)] * 2, (128, 64, 1)), 1)},
        "conv5.weight": (1024, 128, 1),
        **numbered("bn", norm_names, (64,), (64,), (64,), (128,), (1024,)),
    },
    "pointnet_partseg": {
        **alignment_names("stn", 3),
        **alignment_names("fstn", 128),
        **numbered("conv", conv_names, (64, 3), (128, 64), (128, 128), (512, 128), (1024, 512)),
        **numbered("bn", norm_names, (64,), (128,), (128,), (512,), (1024,)),
    },
}


@pytest.mark.parametrize("name", ENCODERS)
def test_parameter_names_and_shapes_are_those_of_published_weights(name):
    state = build_encoder(name).state_dict()
    assert {key: tuple(tensor.shape) for key, tensor in state.items()} == PUBLISHED[name]


def test_nine_channels_change_the_first_layer_only():
    state = build_encoder("dgcnn_semseg", in_channels=9).state_dict()
    expected = {**PUBLISHED["dgcnn_semseg"], "conv1.0.weight": (64, 18, 1, 1)}
    assert {key: tuple(tensor.shape) for key, tensor in state.items()} == expected


@pytest.mark.parametrize("layout", ["dgcnn_cls", "dgcnn_partseg"])
def test_a_compiled_encoder_computes_the_same(layout):
    encoder = small_encoder(layout)
    x = clouds(encoder)
    results = []
    for called in (encoder, torch.compile(copy.deepcopy(encoder), backend="eager")):
        pooled, local = called(x)
        (pooled.sum() + local.square().sum()).backward()
        results.append((pooled, local, *(p.grad for p in called.parameters())))
    torch._dynamo.reset()
    torch.testing.assert_close(results[1], results[0])


@EVERY_LAYOUT
def test_an_exported_encoder_computes_the_same_on_other_sizes(layout):
    encoder = small_encoder(layout).eval()
    sizes, free = [(3, 20)], None
    if hasattr(torch.compiler, "is_exporting"):  # PyTorch 2.7
        sizes += [(1, K), (2, 33)]
        free = ({0: torch.export.Dim("clouds"), 2: torch.export.Dim("points", min=K)},)
    program = torch.export.export(encoder, (clouds(encoder),), dynamic_shapes=free)
    for batch, points in sizes:
        x = clouds(encoder, batch=batch, points=points)
        torch.testing.assert_close(program.module()(x), encoder(x))


@EVERY_LAYOUT
def test_pooled_features_alone_are_those_of_the_whole_to_the_last_bit(layout):
    encoder, outcomes = small_encoder(layout, dtype=torch.float32), []
    x = torch.randn(2, encoder.in_channels, 12)
    for features in (lambda net: net(x).pooled, lambda net: pooled_features(net, x.mT)):
        net = copy.deepcopy(encoder)
        pooled = features(net)
        pooled.square().sum().backward()
        outcomes.append([pooled, *(p.grad for p in net.parameters()), *net.buffers()])
    assert all(torch.equal(a, b) for a, b in zip(*outcomes, strict=True))


@pytest.mark.parametrize("name", ENCODERS)
def test_pretraining_never_concatenates_features_per_point(name, monkeypatch):
    encoder = build_encoder(name, emb_dims=8, **({"k": 3} if name.startswith("dgcnn") else {}))
    monkeypatch.setattr(type(encoder), "forward", lambda *_: pytest.fail("features per point were asked for"))
    model = CrossNet(encoder, image_model="resnet18", image_modality="rgb")
    assert model.project_points(*torch.randn(2, 2, 3, 12))[0].shape == (2, 256)
