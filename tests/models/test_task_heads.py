import pytest
import torch
import torch.nn.functional as F

from models import build_encoder
from models.task_heads import Classification, PartSegmentation, SemanticSegmentation, scores_of_points

SMALL = {"dgcnn_partseg": {"k": 4}, "dgcnn_semseg": {"k": 4}, "dgcnn_cls": {"k": 4}}
CASES = [
    (PartSegmentation, "dgcnn_partseg", {"num_categories": 3, "num_parts": 7}),
    (PartSegmentation, "pointnet_partseg", {"num_categories": 3, "num_parts": 7}),
    (SemanticSegmentation, "dgcnn_semseg", {"num_classes": 7}),
    (Classification, "dgcnn_cls", {"num_classes": 7}),
    (Classification, "pointnet_cls", {"num_classes": 7}),
]


def build(task, name, sizes, *, emb_dims=16, seed=0, **kwargs):
    torch.manual_seed(seed)
    return task(build_encoder(name, emb_dims=emb_dims, **SMALL.get(name, {}), **kwargs), **sizes)


def inputs(model):
    torch.manual_seed(1)
    x = torch.randn(3, model.encoder.in_channels, 24)
    return (x, torch.arange(3)) if isinstance(model, PartSegmentation) else (x,)


@pytest.mark.parametrize(("task", "name", "sizes"), CASES)
def test_every_parameter_learns_and_the_shape_is_classes_by_points(task, name, sizes):
    model = build(task, name, sizes)
    scores = model(*inputs(model))
    assert scores.shape == ((3, 7) if task is Classification else (3, 7, 24))
    F.cross_entropy(scores, torch.randint(7, (3, *scores.shape[2:]))).backward()
    # The T-Net's last layer starts at zero, so what lies before it has no gradient in the first step.
    without = {n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    assert all(n.startswith("encoder.transform_net.") and "transform_net.transform" not in n for n in without)


@pytest.mark.parametrize(("task", "name", "sizes"), CASES)
def test_a_cloud_is_segmented_alike_alone_and_in_another_order(task, name, sizes):
    model = build(task, name, sizes).eval().double()
    x, *category = inputs(model)
    x = x.double()
    scores = model(x, *category)
    alone = model(x[1:2], *(c[1:2] for c in category))
    torch.testing.assert_close(alone, scores[1:2])
    order = torch.randperm(x.shape[2])
    shuffled = model(x[..., order], *category)
    torch.testing.assert_close(shuffled, scores if task is Classification else scores[..., order])


@pytest.mark.parametrize(("task", "name", "sizes"), CASES)
def test_the_linear_head_is_one_layer_over_the_features(task, name, sizes):
    model = build(task, name, {**sizes, "head": "linear"})
    assert sum(1 for _ in model.head.parameters()) == 2
    model.freeze_encoder()
    x, *category = inputs(model)
    cloud, local = model.encoder(x)

    def normalized(values):  # with the biased variance of this batch
        centered = values - values.mean((0, *range(2, values.ndim)), keepdim=True)
        return centered / (centered.square().mean((0, *range(2, values.ndim)), keepdim=True) + 1e-6).sqrt()

    cloud, local = normalized(cloud), normalized(local) if task is not Classification else None
    if category:
        cloud = torch.cat([cloud, F.one_hot(category[0], 3)], dim=1)
    if task is Classification:
        expected = F.linear(cloud, model.head.linear.weight, model.head.linear.bias)
    else:
        repeated = torch.cat([cloud[:, :, None].expand(-1, -1, x.shape[2]), local], dim=1)
        expected = model.head.linear(repeated)
    torch.testing.assert_close(model(x, *category), expected, atol=1e-4, rtol=1e-4)
    plain = build(task, name, {**sizes, "head": "linear", "batch_norm": False})
    assert list(plain.head.state_dict()) == ["linear.weight", "linear.bias"]  # as in checkpoints of earlier versions
    with pytest.raises(ValueError, match="unknown head 'deep'; expected one of published, linear"):
        task(model.encoder, head="deep", **sizes)


def test_a_frozen_encoder_has_no_graph_and_stays_in_evaluation_mode():
    model = build(SemanticSegmentation, "dgcnn_semseg", {"num_classes": 7})
    model.freeze_encoder()
    before = {key: value.clone() for key, value in model.encoder.state_dict().items()}
    assert model.train().head.training and not any(part.training for part in model.encoder.modules())
    assert not model.features(inputs(model)[0].mT).local.requires_grad
    model(*inputs(model)).square().sum().backward()
    assert all(p.grad is None for p in model.encoder.parameters()) and model.head.conv9.weight.grad.any()
    assert all(torch.equal(value, before[key]) for key, value in model.encoder.state_dict().items())
    assert not model.eval().head.training


def test_the_category_changes_the_scores():
    for name in ("dgcnn_partseg", "pointnet_partseg"):
        model = build(PartSegmentation, name, {"num_categories": 3, "num_parts": 7}).eval()
        x, category = inputs(model)
        assert not torch.allclose(model(x, category), model(x, (category + 1) % 3))


@pytest.mark.parametrize("bias", [False, True])
def test_product_with_repeated_cloud_features_equals_the_textbook_form(bias):
    torch.manual_seed(0)
    cloud, local = torch.randn(2, 5, dtype=torch.float64), torch.randn(2, 3, 6, dtype=torch.float64)
    conv = torch.nn.Conv1d(8, 4, 1, bias=bias).double()
    repeated = torch.cat([cloud[:, :, None].expand(-1, -1, 6), local], dim=1)
    expected = torch.relu(conv(repeated))
    torch.testing.assert_close(scores_of_points(cloud, local.mT, conv, torch.relu), expected)


PUBLISHED = {
    "dgcnn_partseg": "conv7.0.weight 64 16 1, conv7.1.running_var 64, conv8.0.weight 256 1280 1, "
    "conv9.0.weight 256 256 1, conv10.0.weight 128 256 1, conv11.weight 50 128 1",
    "pointnet_partseg": "convs1.weight 256 4944 1, convs1.bias 256, convs2.weight 256 256 1, convs3.weight 128 256 1, "
    "convs4.weight 50 128 1, bns1.weight 256, bns2.weight 256, bns3.running_mean 128",
    "dgcnn_semseg": "conv7.0.weight 512 1216 1, conv8.0.weight 256 512 1, conv9.weight 13 256 1",
    "dgcnn_cls": "linear1.weight 512 2048, bn6.weight 512, linear2.bias 256, bn7.weight 256, linear3.weight 40 256",
    "pointnet_cls": "linear1.weight 512 1024, bn6.weight 512, linear2.weight 40 512",
}
SIZES = {"num_categories": 16, "num_parts": 50, "num_classes": 40}


@pytest.mark.parametrize(("task", "name", "few"), CASES)
def test_names_and_widths_are_those_of_published_files(task, name, few):
    shapes = {key: tuple(map(int, shape)) for key, *shape in map(str.split, PUBLISHED[name].split(","))}
    sizes = {key: 13 if task is SemanticSegmentation else SIZES[key] for key in few}
    # The published PointNet part layout has an embedding of 2,048; the others have 1,024.
    model = build(task, name, sizes, emb_dims=2048 if name == "pointnet_partseg" else 1024)
    state = model.published_state_dict()
    assert {key: tuple(state[key].shape) for key in shapes} == shapes
    assert len(state) == len(model.state_dict())
    head_names = {key.split(".")[0] for key in model.head.state_dict()}
    assert head_names == {key.split(".")[0] for key in shapes}
    assert type(model.head).sizes(state, model.encoder) == sizes


def textbook_edges(x, neighbors_of, k):
    """(B, C, N) features and (B, D, N) coordinates of the graph -> (B, 2C, N, k), as the original paper writes it."""
    distance = torch.cdist(neighbors_of.mT, neighbors_of.mT)
    index = distance.topk(k, dim=2, largest=False).indices
    edges = []
    for cloud, near in zip(x, index, strict=True):
        center = cloud[:, :, None].expand(-1, -1, k)
        edges.append(torch.cat([cloud[:, near] - center, center]))
    return torch.stack(edges)


@pytest.mark.parametrize("training", [False, True])
def test_nine_channels_equal_a_textbook_network_whose_first_graph_is_of_the_room(training):
    model = build(SemanticSegmentation, "dgcnn_semseg", {"num_classes": 7, "dropout": 0.0}, in_channels=9).double()
    model.train(training)
    x = inputs(model)[0].double()
    e, h = model.encoder, model.head
    layers, now, graph = [], x, x[:, 6:9]
    for blocks in ((e.conv1, e.conv2), (e.conv3, e.conv4), (e.conv5,)):
        edges = textbook_edges(now, graph, 4)
        for block in blocks:
            edges = block(edges)
        now = graph = edges.amax(3)
        layers.append(now)
    local = torch.cat(layers, 1)
    pooled = e.conv6(local).amax(2, keepdim=True).expand(-1, -1, x.shape[2])
    expected = h.conv9(h.conv8(h.conv7(torch.cat([pooled, local], 1))))
    torch.testing.assert_close(model(x), expected)


def test_an_encoder_without_head_for_the_task_is_refused():
    with pytest.raises(ValueError, match="part segmentation has no head for DGCNNCls; expected one of DGCNNPartSeg"):
        PartSegmentation(build_encoder("dgcnn_cls", emb_dims=8), num_categories=2, num_parts=4)
