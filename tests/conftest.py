"""Settings and fixtures of all tests."""

import os
from pathlib import Path

import pytest
import torch
from hypothesis import settings

# Tiny tensors: more threads only wait for each other. Child processes follow the environment.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)
# On a GPU numbers vary in their last bits, and commands in forks of this process could not use it.
if os.environ.get("CROSSNET_TEST_GPU") != "1":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is imported
# The suite draws the same examples every time; --hypothesis-profile=default looks for new ones.
settings.register_profile("repeatable", derandomize=True)
settings.load_profile("repeatable")


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Seed every test, so that it sees the same random numbers alone or in the whole suite."""
    torch.manual_seed(0)


# Fixtures import what they need only now: Triton must not be imported before the variable above is set.


@pytest.fixture
def small_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Train with a tiny image network and without pictures of the curves.

    By the test's own patches: two sets of patches of one attribute would have to be undone in order.
    """
    from tests.support import small_run

    small_run.make_runs_small(monkeypatch)


@pytest.fixture(scope="session")
def data_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of all tiny sets: pairs, labeled clouds, parts, rooms. Tests must not change it."""
    from tests.support import pairs, segmentation_sets

    root = tmp_path_factory.mktemp("data")
    pairs.write_pairs(root, 16, unpaired=1)
    pairs.write_demo_set(root)
    segmentation_sets.write_parts(root)
    segmentation_sets.write_rooms(root, segmentation_sets.ROOMS, blocks=1)
    return root
