"""Fixtures of the scripts that fine-tune."""

import pytest


@pytest.fixture
def run(request, data_root, tmp_path, small_runs):
    """Return a function that calls ``main`` of the test module's ``script``, by default with its ``SMALL`` flags."""

    def call(*arguments, small=request.module.SMALL, root=data_root):
        places = ["--data_root", root, "--output_dir", tmp_path / "runs", "--exp_name", "a"]
        argv = (*places, "--workers", 0, "--device", "cpu", *small, *arguments)
        return request.module.script.main([str(word) for word in argv])

    return call


@pytest.fixture
def evaluate(run):
    """Return a function that scores a checkpoint."""
    return lambda path, *arguments, **options: run("--eval", "--model_path", path, *arguments, small=[], **options)
