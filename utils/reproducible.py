"""Reproducibility: seeds, deterministic algorithms, random states and versions."""

from __future__ import annotations

import contextlib
import functools
import os
import platform
import random
import subprocess
import sys
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]


def seed_everything(seed: int) -> None:
    """Seed Python's, NumPy's and PyTorch's generators."""
    random.seed(seed)
    np.random.seed(seed % (1 << 32))
    torch.manual_seed(seed)


@contextlib.contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """Use deterministic algorithms in the block if ``wanted``; otherwise let cuDNN benchmark its algorithms.

    An operation without a deterministic algorithm warns with its name. On a CPU this changes nothing: results there are
    reproducible anyway.
    """
    cudnn = torch.backends.cudnn
    if not wanted:
        benchmark, cudnn.benchmark = cudnn.benchmark, True
        try:
            yield
        finally:
            cudnn.benchmark = benchmark
        return
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    cudnn_before = cudnn.deterministic, cudnn.benchmark
    torch.use_deterministic_algorithms(True, warn_only=True)
    cudnn.deterministic, cudnn.benchmark = True, False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        cudnn.deterministic, cudnn.benchmark = cudnn_before


def random_states() -> dict[str, Any]:
    """Return the states of PyTorch's generators as tensors, for a checkpoint."""
    states: dict[str, Any] = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_initialized():  # otherwise a CPU run would allocate memory on a GPU
        states["cuda"] = torch.cuda.get_rng_state_all()
    return states


def restore_random_states(states: dict[str, Any]) -> None:
    """Restore the result of ``random_states``; skip GPUs that are not in use."""
    torch.set_rng_state(states["cpu"])
    if torch.cuda.is_initialized():
        for i, state in enumerate(states.get("cuda", [])[: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(state, i)


def versions() -> dict[str, str]:
    """Return the versions that a result depends on."""
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        **{name: metadata.version(name) for name in ("torchvision", "numpy", "scikit-learn")},
        "platform": f"{sys.platform}-{platform.machine()}",
    }


@functools.cache
def git_commit(root: Path = ROOT) -> str:
    """Return the code's commit at the first call, ``-dirty`` if code changed, ``unknown`` if git does not track it.

    Documents and records do not count: ``benchmarks.reproduce`` writes them between the rows that it runs.
    """
    environment = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}  # git before 2.15 refuses the flag, but ignores this

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", *words], cwd=root, env=environment, capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()

    try:
        commit, _ = git("rev-parse", "HEAD", "HEAD:./").split()  # fails if the repository is another project's
        written = [f":(exclude){name}" for name in ("docs", "results", "*.md")]
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", *written)
        return commit + ("-dirty" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def provenance(**settings: Any) -> dict[str, Any]:
    """Return what a result depends on besides its data: settings, versions and commit, for a file or a checkpoint."""
    return {**settings, "versions": versions(), "git_commit": git_commit()}


def commit_of(record: Mapping[str, Any]) -> str:
    """Return the commit in a file that holds ``provenance``; earlier files have it as ``commit``."""
    return record["git_commit"] if "git_commit" in record else record["commit"]
