"""Same seed, same machine: the same weights to the last bit, with any number of data workers; two processes too."""

import os

import pytest
import torch

from downstream.classification import finetune
from engine.checkpoint import load_checkpoint
from tests.support.several import run_together
from tests.support.small_run import arguments
from train_crossnet_con import main
from utils.reproducible import deterministic

pytestmark = pytest.mark.usefixtures("small_runs")


def bits(path):
    """Return every tensor of a checkpoint as bytes, by name."""
    payload = load_checkpoint(path)
    parts = ("point_encoder", "heads_and_image_encoders", "head")
    return {f"{part} {k}": v.numpy().tobytes() for part in parts for k, v in payload.get(part, {}).items()}


def all_equal(paths):
    first, *others = map(bits, paths)
    assert first and all(other == first for other in others)


def test_pretraining_repeats(data_root, tmp_path):
    def pretrain(name, *more):
        main(arguments(data_root, tmp_path, "--epochs", 2, "--eval_every", 0, "--exp_name", name, *more))
        return tmp_path / name / "last.pth"

    runs = [
        pretrain("plain"),
        pretrain("again", "--deterministic"),
        pretrain("workers", "--deterministic", "--workers", 2),
    ]
    all_equal(runs)
    assert bits(pretrain("other", "--seed", 2)) != bits(runs[0])


def test_pretraining_in_two_processes_repeats(data_root, tmp_path):
    flags = ("--epochs", 2, "--eval_every", 0, "--batch_size", 2, "--deterministic")

    def twice():
        for name, workers in (("a", 0), ("b", 1)):
            main(arguments(data_root, tmp_path, *flags, "--exp_name", name, "--workers", workers))

    run_together(twice, tmp_path / "logs")
    all_equal([tmp_path / "a" / "last.pth", tmp_path / "b" / "last.pth"])


def test_fine_tuning_repeats(data_root, tmp_path):
    common = (
        f"--dataset demo --data_root {data_root} --output_dir {tmp_path} --device cpu --epochs 2 --k 4 --emb_dims 16"
    )
    for name, more in (("a", "--workers 0"), ("b", "--workers 2 --deterministic")):
        torch.rand(3)  # what was drawn before does not matter
        finetune.main([*common.split(), *"--num_points 24 --batch_size 6 --exp_name".split(), name, *more.split()])
    all_equal([tmp_path / "a" / "last.pth", tmp_path / "b" / "last.pth"])
    all_equal([tmp_path / "a" / "best.pth", tmp_path / "b" / "best.pth"])


def test_cublas_learns_of_the_flag_before_the_kernels_are_checked(data_root, tmp_path, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")  # so that the test's end restores it
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    seen = []
    monkeypatch.setattr("engine.device.check_choice", lambda device: seen.append(os.environ["CUBLAS_WORKSPACE_CONFIG"]))
    main(arguments(data_root, tmp_path, "--epochs", 1, "--eval_every", 0, "--deterministic"))
    assert seen == [":4096:8"]


def test_the_flag_holds_inside_training_only():
    cudnn = torch.backends.cudnn
    before = (torch.are_deterministic_algorithms_enabled(), cudnn.deterministic, cudnn.benchmark)
    with deterministic(False):
        assert not torch.are_deterministic_algorithms_enabled() and cudnn.benchmark
    with pytest.raises(KeyError), deterministic(True):
        assert torch.are_deterministic_algorithms_enabled() and cudnn.deterministic and not cudnn.benchmark
        raise KeyError
    assert (torch.are_deterministic_algorithms_enabled(), cudnn.deterministic, cudnn.benchmark) == before
