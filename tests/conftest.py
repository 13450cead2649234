"""What all tests share."""

import os

import pytest
import torch

# Tiny tensors: more threads only wait for each other. Child processes follow the environment.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded():
    """Every test starts from the same random numbers, alone or in company."""
    torch.manual_seed(0)
