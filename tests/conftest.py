"""Settings and fixtures of all tests."""

import os

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
def seeded():
    """Seed every test, so that it sees the same random numbers alone or in the whole suite."""
    torch.manual_seed(0)
