"""Two processes (gloo) compute what one process with both halves of the data computes."""

import pytest
import torch
import torch.multiprocessing as mp

from tests.models import processes
from tests.support.comparing import assert_close
from tests.support.small_run import small_runs


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """Every case's results, per process."""
    folder = tmp_path_factory.mktemp("processes")
    with small_runs():
        mp.start_processes(processes.main, (str(folder),), processes.PROCESSES, start_method="fork")
    return [torch.load(folder / f"{process}.pt", weights_only=True) for process in range(processes.PROCESSES)]


@pytest.mark.usefixtures("small_runs")
@pytest.mark.parametrize("case", processes.CASES)
def test_two_processes_equal_one(two_processes, case):
    expected = processes.CASES[case]()
    first, second = (results[case] for results in two_processes)
    rows = [name for name in expected if name.startswith("rows")]
    assert_close(second, first, tolerance=1e-12, without=rows)  # the processes agree
    assert_close({**first, **{name: torch.cat([first[name], second[name]]) for name in rows}}, expected, tolerance=1e-9)
