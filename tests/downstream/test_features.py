import io
import sys

import numpy as np
import pytest
import torch
from torch import nn

from datasets.registry import find_datasets, open_classification_set
from downstream.features import calibrate_batch_norm, extract_features
from models import ENCODERS, PointFeatures, build_encoder
from tests.support.files import Terminal, cut, write_h5
from utils.errors import DataError, UserError


def clouds(count=7, size=24, seed=0):
    return np.random.default_rng(seed).normal(size=(count, size, 3)).astype(np.float32)


def encoder(name="dgcnn_cls", **kwargs):
    torch.manual_seed(0)
    arguments = {"emb_dims": 16, **({"k": 4} if name.startswith("dgcnn") else {}), **kwargs}
    return build_encoder(name, **arguments)


class Recorder(nn.Module):
    """Encoder that records its inputs."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.dropout = nn.Dropout(0.5)
        self.inputs, self.modes, self.gradients = [], [], []

    def forward(self, x):
        self.inputs.append(x)
        self.modes.append(self.training)
        self.gradients.append(torch.is_grad_enabled())
        return PointFeatures(self.dropout(x.amax(2)) * self.scale, x)


@pytest.mark.parametrize("name", sorted(ENCODERS))
def test_features_are_the_pooled_ones_whatever_the_batch_size(name):
    model, points = encoder(name), clouds()
    model.eval()
    with torch.no_grad():
        expected = model(torch.from_numpy(points).transpose(1, 2)).pooled.numpy()
    for batch_size in (1, 3, 50):
        features = extract_features(model, points, batch_size=batch_size)
        assert features.dtype == np.float32 and features.shape == (7, model.feature_dim)
        np.testing.assert_allclose(features, expected, rtol=1e-4, atol=1e-5)


def test_clouds_enter_in_order_and_as_they_are():
    model, points = Recorder(), clouds() + 100
    features = extract_features(model, points, batch_size=3)
    np.testing.assert_array_equal(torch.cat(model.inputs).transpose(1, 2).numpy(), points)
    np.testing.assert_array_equal(features, points.max(1))
    assert max(map(len, model.inputs)) <= 3


def test_the_encoder_is_frozen_and_its_modes_come_back():
    model = Recorder()
    model.train()
    model.dropout.eval()
    extract_features(model, clouds())
    assert not any(model.modes) and not any(model.gradients)
    assert model.training and not model.dropout.training
    real = encoder().train()
    before = {key: value.clone() for key, value in real.state_dict().items()}
    extract_features(real, clouds())
    assert all(torch.equal(value, before[key]) for key, value in real.state_dict().items())


def test_modes_come_back_after_an_error():
    model = encoder().train()
    with pytest.raises(ValueError, match="neighbou?rs"):
        extract_features(model, clouds(size=3))
    assert all(module.training for module in model.modules())


def test_features_follow_the_encoders_precision():
    model, points = encoder().double(), clouds()
    np.testing.assert_allclose(
        extract_features(model, points), extract_features(encoder(), points), rtol=1e-4, atol=1e-5
    )


def test_features_that_are_not_finite_are_an_error():
    model = encoder()
    with torch.no_grad():
        model.conv1[0].weight[0] = float("nan")
    with pytest.raises(UserError, match="not finite for 7 of 7 clouds"):
        extract_features(model, clouds())


def test_wrong_calls():
    with pytest.raises(ValueError, match="n > 0"):
        extract_features(encoder(), clouds(0))
    with pytest.raises(ValueError, match="batch_size"):
        extract_features(encoder(), clouds(), batch_size=0)


def test_a_short_job_shows_progress_on_a_terminal_alone(monkeypatch):
    for stream, progress, shown in ((io.StringIO(), True, 0), (Terminal(), True, 1), (Terminal(), False, 0)):
        monkeypatch.setattr(sys, "stderr", stream)
        extract_features(Recorder(), clouds(), progress=progress, text="my features")
        assert ("my features" in stream.getvalue()) == shown


def batch_norms(model):
    return [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]


@pytest.mark.parametrize("name", sorted(ENCODERS))
def test_calibration_sets_statistics_and_nothing_else(name):
    model = encoder(name)
    model.train()
    weights = {key: value.clone() for key, value in model.named_parameters()}
    points = clouds(12)
    momenta = [norm.momentum for norm in batch_norms(model)]
    assert calibrate_batch_norm(model, points, batch_size=4) == 12
    assert all(torch.equal(value, weights[key]) for key, value in model.named_parameters())
    assert [norm.momentum for norm in batch_norms(model)] == momenta
    assert all(module.training for module in model.modules())
    assert {int(norm.num_batches_tracked) for norm in batch_norms(model)} == {3}


@pytest.mark.parametrize("name", ["dgcnn_cls", "dgcnn_partseg", "pointnet_cls"])
def test_one_calibration_batch_gives_the_features_of_train_mode(name):
    # With all clouds in one batch the running statistics are that batch's, so both modes agree but for the unbiased
    # variance and the few neighbors that it changes.
    model, points = encoder(name), clouds(40, size=32)
    calibrate_batch_norm(model, points, batch_size=40)
    model.train()
    with torch.no_grad():
        in_training = model(torch.from_numpy(points).transpose(1, 2)).pooled.numpy()
    calibrate_batch_norm(model, points, batch_size=40)
    features = extract_features(model, points)
    assert np.isclose(features, in_training, rtol=0.05, atol=0.05).mean() > 0.97
    uncalibrated = extract_features(encoder(name), points)
    assert np.isclose(uncalibrated, in_training, rtol=0.05, atol=0.05).mean() < 0.5


def test_statistics_are_the_plain_mean_over_batches():
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(3)
    norm.register_parameter("unused", nn.Parameter(torch.zeros(1)))

    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = norm

        def forward(self, x):
            return PointFeatures(self.norm(x).amax(2), x)

    norm.running_mean.fill_(99.0)  # what was there does not count
    points = clouds(12) * [1, 2, 3] + [1, 0, -4]
    calibrate_batch_norm(Plain(), points.astype(np.float32), batch_size=4)
    # Equal batches: the mean of the batch means is the mean of all, whatever the order.
    np.testing.assert_allclose(norm.running_mean.numpy(), points.mean((0, 1)), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(norm.running_var.numpy(), points.var((0, 1)), rtol=0.2)


def test_calibration_takes_at_most_so_many_clouds_by_its_seed():
    def mean(seed):
        model = encoder()
        used = calibrate_batch_norm(model, clouds(30), max_clouds=6, batch_size=4, seed=seed)
        return used, model.conv1[1].running_mean.clone()

    assert mean(1)[0] == 6
    assert torch.equal(mean(1)[1], mean(1)[1])
    assert not torch.equal(mean(1)[1], mean(2)[1])


def test_calibration_makes_no_batch_of_one():
    # dgcnn_partseg's transformer has batch norm on one vector per cloud.
    model = encoder("dgcnn_partseg")
    assert calibrate_batch_norm(model, clouds(5), batch_size=2) == 5
    assert calibrate_batch_norm(model, clouds(3), batch_size=1) == 3
    with pytest.raises(ValueError, match="at least two clouds"):
        calibrate_batch_norm(model, clouds(1))


def test_dropout_stays_off_while_calibrating():
    class WithDropout(nn.Module):
        def __init__(self):
            super().__init__()
            self.dropout, self.norm = nn.Dropout(0.5), nn.BatchNorm1d(3)

        def forward(self, x):
            return PointFeatures(self.norm(self.dropout(x)).amax(2), x)

    model, points = WithDropout().train(), clouds(8) + 3
    calibrate_batch_norm(model, points, batch_size=8)
    np.testing.assert_allclose(model.norm.running_mean.numpy(), points.mean((0, 1)), rtol=1e-4)


def test_an_encoder_without_batch_norm_is_left_alone():
    model = Recorder()
    assert calibrate_batch_norm(model, clouds()) == 0 and model.inputs == []


def write_labeled(path, labels):
    return write_h5(path, data=clouds(len(labels)), label=np.array(labels, "u1"))


def test_data_sets_are_found_where_they_lie(tmp_path):
    assert find_datasets(tmp_path / "absent") == find_datasets(tmp_path) == []
    modelnet = tmp_path / "modelnet40_ply_hdf5_2048"
    write_labeled(modelnet / "ply_data_train0.h5", [1, 39])
    assert find_datasets(tmp_path) == []  # a split is missing
    write_labeled(modelnet / "ply_data_test0.h5", [1, 8])
    assert find_datasets(tmp_path) == ["modelnet10"]
    write_labeled(modelnet / "ply_data_test0.h5", [1, 39])
    assert find_datasets(tmp_path) == ["modelnet40", "modelnet10"]
    for split in ("train", "test"):
        write_labeled(tmp_path / "demo_hdf5" / f"ply_data_{split}0.h5", [0, 1])
        write_labeled(tmp_path / "ScanObjectNN" / "main_split" / f"{split}.h5", [0, 1])
    assert find_datasets(tmp_path) == ["modelnet40", "modelnet10", "scanobjectnn", "demo"]
    for name in find_datasets(tmp_path):
        assert len(open_classification_set(name, tmp_path, "train", num_points=5)) > 0
    (modelnet / "test_files.txt").write_text("ply_data_test9.h5\n")
    assert find_datasets(tmp_path) == ["scanobjectnn", "demo"]


def test_a_damaged_set_is_found_and_fails_when_it_is_opened(tmp_path):
    for split in ("train", "test"):
        cut(write_labeled(tmp_path / "modelnet40_ply_hdf5_2048" / f"ply_data_{split}0.h5", [1, 39]))
    assert "modelnet40" in find_datasets(tmp_path)
    with pytest.raises(DataError, match="truncated"):
        open_classification_set("modelnet40", tmp_path, "train")


def test_unknown_set_and_variant(tmp_path):
    with pytest.raises(ValueError, match="modelnet99"):
        open_classification_set("modelnet99", tmp_path, "train")
    with pytest.raises(UserError, match="PB_T50_RS"):
        open_classification_set("scanobjectnn", tmp_path, "train", variant="hard")
