"""Functions that are compiled on a GPU: what is chosen, and that the fused forms are the plain ones."""

import pytest
import torch

from models.ops import compiled, pooling
from tests.models.ops.test_pooling import example, ours, outcome, plain
from tests.support.comparing import assert_close


def doubled(x):
    return x * 2, x + 1


@pytest.fixture
def checked(monkeypatch):
    def of(compile):
        monkeypatch.setattr(torch, "compile", compile)
        return compiled._Checked(doubled)

    return of


def test_a_compiled_function_stays_if_it_agrees(checked):
    calls = []
    function = checked(lambda plain: lambda x: calls.append(0) or plain(x))
    for _ in range(3):
        assert torch.equal(function(torch.ones(2))[0], torch.full((2,), 2.0))
    assert len(calls) == 3


def fails(plain):
    raise RuntimeError("no compiler here\nand a long trace")


@pytest.mark.parametrize(
    ("compile", "reason"),
    [(fails, "no compiler here"), (lambda plain: lambda x: (x * 2.01, x + 1), "differs from plain operations by")],
)
def test_without_a_compiled_function_that_agrees_the_plain_one_runs(checked, caplog, compile, reason):
    function = checked(compile)
    for _ in range(2):
        assert torch.equal(function(torch.ones(2))[0], torch.full((2,), 2.0))
    assert [record.getMessage().startswith("doubled is not compiled: ") for record in caplog.records] == [True]
    assert reason in caplog.text


def test_where_functions_are_compiled(monkeypatch):
    on_gpu = type("OnGPU", (), {"is_cuda": True})()
    assert compiled.fused(doubled, torch.ones(1)) is doubled
    assert isinstance(compiled.fused(doubled, on_gpu), compiled._Checked)
    monkeypatch.setenv("CROSSNET_KERNELS", "torch")
    assert compiled.fused(doubled, on_gpu) is doubled


@pytest.mark.parametrize("points", [17, 32])
@pytest.mark.parametrize("mean", [False, True])
def test_the_pooled_layer_in_its_fused_form_equals_the_plain_modules(monkeypatch, points, mean):
    torch.compiler.reset()
    graph = lambda function, x: torch.compile(function, backend="aot_eager", fullgraph=True)  # noqa: E731
    monkeypatch.setattr(pooling, "fused", graph)
    inputs = example(points=points, gains="non-zero")
    actual, expected = outcome(ours(mean), *inputs, mean=mean), outcome(plain, *inputs, mean=mean)
    assert_close(actual, expected, tolerance=1e-11)


def test_the_fused_gradient_is_the_plain_one_to_the_last_bit():
    y, grad_mean = torch.randn(2, 9, 5), torch.randn(2, 1, 5)
    slope_y, constant, scale, shift = torch.randn(4, 5)
    addend, place = torch.randn(2, 5), torch.randint(-3, 12, (2, 1, 5))  # also in tiles before and after
    tile = (y, slope_y, constant, scale, shift, grad_mean, 0.2, True)
    expected = pooling._add_at(pooling._gradient(*tile), place, addend, (place >= 0) & (place < 9))
    assert torch.equal(pooling._whole_gradient(place, addend, *tile), expected)
