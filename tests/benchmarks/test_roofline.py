"""The counting roofline at a size of seconds: what it counts is what the step does."""

import argparse

import pytest
import torch

from benchmarks import roofline
from benchmarks.estimate import all_reduces_of_step
from benchmarks.fake_gpu import DEVICE, Recorder, fake_gpu, fakes_gpus
from models import CrossNet, build_encoder
from train_crossnet_con import PretrainConfig, build_parser
from utils.errors import UserError

pytest.importorskip("triton", reason="Triton is not installed")
pytestmark = pytest.mark.skipif(not fakes_gpus(), reason="PyTorch before 2.10 plays no GPU without a driver")
TINY = ("--quick", "--model", "dgcnn_cls", "--k", "4")


@pytest.fixture(scope="module")
def plain():
    return roofline.main([*TINY])


def test_every_stage_is_counted(plain):
    stages = {"augmentation", "neighbours", "EdgeConv", "conv5 and pooling", "images", "heads and loss", "optimizer"}
    assert stages < plain["stages"].keys()
    assert all(plain["stages"][stage]["seconds"] > 0 for stage in stages)
    assert plain["shapes_per_s"] == pytest.approx(2 / plain["total"]["seconds"])


def test_flops_are_those_of_the_layers(plain):
    rows, widths = 2 * 2 * 1024, (3, 64, 64, 128)
    # conv5: W x forward, and backward one product for each of W and x.
    assert plain["stages"]["conv5 and pooling"]["flops"] == 3 * 2 * rows * 512 * 1024
    # EdgeConv: a and c forward; a and c again, gradients of W's halves and of x for each backward.
    edges = sum(2 * rows * i * o * (2 + 2 + 2 + 2) for i, o in zip(widths, (64, 64, 128, 256), strict=True))
    of_first_x = 2 * rows * 3 * 64 * 2  # the cloud itself needs no gradient
    assert plain["stages"]["EdgeConv"]["flops"] == pytest.approx(edges - of_first_x, rel=0.01)


def test_half_precision_moves_less_and_ranks_talk(plain):
    half = roofline.main([*TINY, "--amp", "bf16", "--channels_last", "--ranks", "4", "--operations", "2"])
    model = CrossNet(build_encoder("dgcnn_cls", k=4), image_model="resnet18")
    words = ["--image_model", "resnet18", "--batch_size", "2"]
    config = PretrainConfig.from_flags(build_parser().parse_args(words))
    assert half["collectives"] == all_reduces_of_step(model, config) > 40
    assert half["stages"]["conv5 and pooling"]["bytes"] < 0.8 * plain["stages"]["conv5 and pooling"]["bytes"]
    assert half["settings"]["ranks"] == 4
    seconds = [cost["seconds"] for _, _, cost in half["operations"]]
    assert len(seconds) == 2 and seconds[0] >= seconds[1] > 0


def test_gradients_of_the_walk_are_of_the_parameters_shapes():
    with fake_gpu(Recorder()), torch.device(DEVICE):
        layer = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 1))
        x = torch.empty(5, 3)
        (layer(x) + layer(2 * x)).sum().backward()
        assert all(p.grad.shape == p.shape and p.grad.device == DEVICE for p in layer.parameters())


def test_bytes_of_an_operation():
    stages = roofline.Stages(counting=True)
    with fake_gpu(stages), torch.device(DEVICE):
        x, y = torch.empty(10, 8), torch.empty(8)
        with roofline._Count(stages):
            _ = x + y  # x and y read, the sum written
            x.mul_(2)  # read and written
            x.copy_(x + 0)  # the sum read and written, then read, x written
    moved = {name: cost.bytes for (_, name), cost in stages.costs.items()}
    assert moved == {"add": 4 * (80 + 8 + 80) + 4 * (80 + 80), "mul_": 4 * 160, "copy_": 4 * 160}


def test_unknown_flags_and_models_are_refused():
    with pytest.raises(SystemExit):
        roofline.main(["--model", "transformer"])
    with pytest.raises(UserError, match="--k 20 neighbors need at least as many points, not --num_points 10"):
        roofline.main(["--num_points", "10"])
    assert isinstance(roofline.build_parser(), argparse.ArgumentParser)
