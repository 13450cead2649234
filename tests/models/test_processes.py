"""Two processes (gloo) compute what one process with both halves of the data computes."""

import pytest
import torch
import torch.multiprocessing as mp

from tests.models import processes


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """Every case's results, per process; one start for all, since each process imports torch."""
    folder = tmp_path_factory.mktemp("processes")
    mp.spawn(processes.main, args=(str(folder),), nprocs=processes.PROCESSES)
    return [torch.load(folder / f"{process}.pt", weights_only=True) for process in range(processes.PROCESSES)]


@pytest.mark.parametrize("case", processes.CASES)
def test_two_processes_equal_one(two_processes, case):
    expected = processes.CASES[case]()
    first, second = (results[case] for results in two_processes)
    assert first.keys() == second.keys() == expected.keys()
    for name, value in expected.items():
        if name.startswith("rows"):
            actual = torch.cat([first[name], second[name]])
        else:
            actual = first[name]
            torch.testing.assert_close(second[name], actual, rtol=1e-12, atol=1e-12)  # the processes agree
        tolerance = 1e-9 * max(1.0, value.abs().max().item())
        torch.testing.assert_close(actual, value, rtol=0, atol=tolerance, msg=lambda text, n=name: f"{n}: {text}")
