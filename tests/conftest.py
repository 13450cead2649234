"""Settings and fixtures of all tests."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

# Tiny tensors: more threads only wait for each other. Child processes follow the environment.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)
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
def small_runs() -> Iterator[None]:
    """Train with a tiny image network and without pictures of the curves."""
    from tests.support import small_run

    with small_run.small_runs():
        yield


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
