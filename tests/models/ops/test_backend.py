"""Triton kernels against plain formulas: on a GPU if there is one, else in Triton's interpreter."""

import logging
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from engine.device import resolve_device
from models import build_encoder
from models.ops import backend
from models.ops.edge_conv import edge_conv
from models.ops.knn import flatten_neighbors, knn
from models.ops.layers import edge_block
from tests.support.comparing import assert_close
from tests.support.paths import ROOT
from utils.errors import UserError

triton = pytest.importorskip("triton", reason="Triton is not installed")
from models.ops import triton_kernels  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
VERSION = tuple(map(int, triton.__version__.split(".")[:2]))
pytestmark = pytest.mark.skipif(
    DEVICE.type == "cpu" and VERSION < (3, 1), reason="no GPU, and Triton 3.0's interpreter does not write its outputs"
)


@pytest.fixture
def chosen(monkeypatch):
    """Return a function that sets CROSSNET_KERNELS and clears the cache of earlier checks."""
    backend._working_kernels.cache_clear()
    yield lambda choice: monkeypatch.setenv(backend.VARIABLE, choice)
    backend._working_kernels.cache_clear()


@pytest.fixture
def unchecked(monkeypatch, chosen):
    """``chosen`` without the check at first use, which has a separate test and is slow in the interpreter."""
    monkeypatch.setattr(backend, "check", lambda *_: None)
    return chosen


def first_of_the_largest(values, k):
    """Places of the k largest, ascending; of equal ones the first."""
    return values.sort(dim=1, descending=True, stable=True).indices[:, :k].sort(dim=1).values


def nearest(points, k):
    """(B, N, C) -> (B, N, k) places of the k nearest points, ascending; of equally distant ones the first."""
    distances = (points[:, :, None] - points[:, None]).square().sum(-1)
    return first_of_the_largest(-distances.flatten(0, 1), k).unflatten(0, distances.shape[:2])


@pytest.mark.parametrize("n", [1, 5, 32, 45])
def test_selection_of_every_number(n):
    values = torch.randn(2, n)
    values[0, n // 2 :] = values[0, 0]  # ties, some of them at the k-th value
    for k in {1, (n + 1) // 2, n}:
        found = triton_kernels.largest(values.to(DEVICE), k).cpu()
        torch.testing.assert_close(found, first_of_the_largest(values, k))


def test_selection_among_special_values():
    values = torch.tensor(
        [
            [-0.0, 0.0, 0.0, -0.0, -1.0],
            [float("inf"), 3e38, -float("inf"), -3e38, float("inf")],
            [1e-45, -1e-45, 0.0, 2e-45, -2e-45],
            [7.0, 7.0, 7.0, 7.0, 7.0],
        ]
    )
    for k in (1, 2, 3, 5):
        found = triton_kernels.largest(values.to(DEVICE), k).cpu()
        torch.testing.assert_close(found, first_of_the_largest(values, k))


def test_selection_with_values_that_are_not_numbers_names_different_places():
    values = torch.full((1, 9), float("nan"))
    values[0, 3] = 1.0
    found = triton_kernels.largest(values.to(DEVICE), 4).cpu()
    assert found.unique().numel() == 4 and 0 <= found.min() and found.max() < 9


@pytest.mark.parametrize("coordinates", [1, 3, 4])
def test_nearest_points(coordinates):
    points = torch.randn(2, 11, coordinates)
    points[1, 3:8] = points[1, 0]  # as input dropout leaves them
    torch.testing.assert_close(triton_kernels.nearest(points.to(DEVICE), 4).cpu(), nearest(points, 4))


def test_selection_from_padded_rows_reads_none_of_the_padding():
    space = torch.full((3, triton_kernels.padded(21)), float("inf"))
    values = space[:, :21].normal_()
    expected = first_of_the_largest(values, 5)
    for rows in (values, values.contiguous(), values[:, ::1][:2], values.flip(1).flip(1)):
        found = triton_kernels.largest(rows.to(DEVICE), 5).cpu()
        torch.testing.assert_close(found, expected[: len(rows)])


@pytest.mark.parametrize("n", [100, 130])
@pytest.mark.parametrize("k", [1, 20, 33])
def test_selection_by_the_maxima_of_groups(n, k):
    cluster = torch.zeros(n)
    cluster[::32] = 5 - torch.arange(len(cluster[::32]))  # the largest share one group of four
    rows = [
        torch.randn(n),
        cluster,
        torch.arange(25).repeat(n // 25 + 1)[:n].float(),  # every value several times
        torch.zeros(n),
        torch.where(torch.arange(n) % 3 > 0, 0.0, -1.0),  # more of the largest than k
        torch.where(torch.arange(n) < k - 1, 1.0, -0.5),  # equal values at the k-th
        torch.full((n,), -float("inf")),
    ]
    values = torch.stack(rows)
    found = triton_kernels.largest(values.to(DEVICE), k).cpu()
    torch.testing.assert_close(found, first_of_the_largest(values, k))


def test_rows_of_more_than_one_warp():
    values = torch.randn(1, 2100)
    values[0, 50:1500] = values[0, 3]
    for k in (7, 1500):
        found = triton_kernels.largest(values.to(DEVICE), k).cpu()
        torch.testing.assert_close(found, first_of_the_largest(values, k))


def test_neighbors_by_products_of_a_ragged_cloud(unchecked):
    unchecked("triton")
    points = torch.randn(2, 21, 6)
    distances = (points[:, :, None] - points[:, None]).square().sum(-1)
    expected = distances.topk(4, largest=False).indices.sort(-1).values
    torch.testing.assert_close(knn(points.to(DEVICE), 4).cpu(), expected)


def test_nearest_points_of_a_strided_cloud():
    points = torch.randn(3, 2, 7).to(DEVICE).permute(1, 2, 0)
    torch.testing.assert_close(triton_kernels.nearest(points, 3), triton_kernels.nearest(points.contiguous(), 3))


@pytest.mark.parametrize(("points", "k", "width"), [(1, 1, 1), (9, 3, 16), (21, 7, 130)])
def test_edges_against_autograd(points, k, width):
    a, c, grad_at_argmax = torch.randn(3, points, width).to(DEVICE)
    grad_scale, constant, about = torch.randn(3, width).to(DEVICE)
    sign = torch.where(constant < 0, -1.0, 1.0)
    neighbors = torch.rand(points, points).topk(k, dim=1).indices.to(DEVICE)
    neighbors[: points // 2, -1] = neighbors[: points // 2, 0]  # a row may be the same row's neighbor twice
    exact_a, exact_c = (x.double().requires_grad_() for x in (a, c))
    h = exact_a[neighbors] + exact_c[:, None]
    extremes = (h * sign).amax(1) * sign

    found, argmax, total, squares = triton_kernels.edge_extremes(a, c, neighbors, sign, about=about)
    torch.testing.assert_close(found.double(), extremes, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(a.gather(0, argmax.long()) + c, found)
    torch.testing.assert_close(total.double(), (h - about).sum((0, 1)), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(squares.double(), (h - about).square().sum((0, 1)), rtol=1e-5, atol=1e-5)
    same, _, *sums = triton_kernels.edge_extremes(a, c, neighbors, sign, about=None)
    assert torch.equal(same, found) and not any(part.any() for part in sums)

    energy = (grad_scale * h.square() / 2 + constant * h).sum()
    energy = energy + (grad_at_argmax * (exact_a.gather(0, argmax.long()) + exact_c)).sum()
    expected = torch.autograd.grad(energy, (exact_a, exact_c))
    for mine, exact in zip(
        triton_kernels.edge_gradients(a, c, neighbors, grad_scale, constant, grad_at_argmax, argmax),
        expected,
        strict=True,
    ):
        torch.testing.assert_close(mine.double(), exact, rtol=1e-4, atol=1e-4)


def test_what_is_not_a_number_stays_among_the_extremes():
    a, c = torch.zeros(3, 1), torch.zeros(3, 1)
    a[1] = float("nan")
    neighbors, sign = torch.tensor([[0, 1, 2], [1, 2, 0], [0, 2, 2]]), torch.ones(1)
    extremes, *_ = triton_kernels.edge_extremes(*(x.to(DEVICE) for x in (a, c, neighbors, sign)), about=None)
    assert extremes.isnan().flatten().tolist() == [True, True, False]


def layer_outcome(x, neighbors, clouds, train):
    """Output, gradients and buffers of one EdgeConv."""
    torch.manual_seed(1)
    block = edge_block(2 * x.shape[1], 6).to(DEVICE).train(train)
    with torch.no_grad():
        block[1].weight.copy_(torch.tensor([1.0, -0.5, 0.0, 2.0, -1.0, 0.7]))
    x = x.clone().requires_grad_()
    out = edge_conv(x, neighbors, block, clouds=clouds)
    (out * torch.randn(out.shape).to(DEVICE)).sum().backward()
    return {"output": out, "x": x.grad, **{name: p.grad for name, p in block.named_parameters()}, **block.state_dict()}


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_a_layer_is_the_same_in_both_forms(unchecked, train):
    clouds = torch.randn(2, 11, 4) + 100.0
    clouds[1, 3:9] = clouds[1, 0]  # rows 14 to 19 are row 11; which of them is the extreme is open
    unchecked("torch")
    neighbors = flatten_neighbors(knn(clouds.to(DEVICE), 4))
    rows = clouds.flatten(0, 1).to(DEVICE)
    plain = layer_outcome(rows, neighbors, 2, train)
    unchecked("triton")
    assert backend.backend_for(rows) is triton_kernels
    found = layer_outcome(rows, neighbors, 2, train)
    for outcome in (plain, found):
        outcome["x"][11] += outcome["x"][14:20].sum(0)
        outcome["x"][14:20] = 0
        del outcome["1.weight"]  # at a gain of zero all edges tie
    assert_close(found, plain, tolerance=1e-5)


def test_an_encoder_is_the_same_in_both_forms(unchecked):
    clouds = torch.randn(2, 3, 9).to(DEVICE)
    outcomes = []
    for choice in ("torch", "triton"):
        unchecked(choice)
        torch.manual_seed(2)
        encoder = build_encoder("dgcnn_cls", k=3, emb_dims=8).to(DEVICE)
        pooled, local = encoder(clouds)
        (pooled.square().sum() + local.sum()).backward()
        outcomes.append({"pooled": pooled, "local": local, **{n: p.grad for n, p in encoder.named_parameters()}})
    assert_close(*outcomes, tolerance=1e-4)


def test_the_check_at_first_use_passes(chosen, caplog):
    chosen("triton")
    with caplog.at_level(logging.INFO, logger="crossnet.kernels"), torch.inference_mode():
        assert backend.backend_for(torch.zeros(1, device=DEVICE)) is triton_kernels
        assert backend.backend_for(torch.zeros(1, device=DEVICE)) is triton_kernels
    assert len(caplog.records) == 1 and "CROSSNET_KERNELS=torch turns them off" in caplog.text


# --- the check at first use, of kernels in plain operations: the interpreter takes seconds for each ---


def edge_extremes(a, c, neighbors, sign, *, about):
    h = a[neighbors] + c[:, None]
    extremes, place = (h * sign).max(1)
    sums = torch.zeros(2, a.shape[1]) if about is None else [((h - about) ** power).sum((0, 1)) for power in (1, 2)]
    return extremes * sign, neighbors.gather(1, place), *sums


def edge_gradients(a, c, neighbors, grad_scale, constant, grad_at_argmax, argmax):
    a, c = (x.detach().requires_grad_() for x in (a, c))
    h = a[neighbors] + c[:, None]
    energy = (grad_scale * h.square() / 2 + constant * h).sum()
    energy = energy + (grad_at_argmax * (a.gather(0, argmax.long()) + c)).sum()
    return torch.autograd.grad(energy, (a, c))


PLAIN = {"nearest": nearest, "largest": first_of_the_largest}
PLAIN |= {"edge_extremes": edge_extremes, "edge_gradients": edge_gradients}


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_the_check_computes_gradients_whatever_its_caller_needs(chosen, monkeypatch, context):
    monkeypatch.setitem(sys.modules, "models.ops.triton_kernels", SimpleNamespace(**PLAIN))
    chosen("triton")
    with context():
        assert backend.backend_for(torch.zeros(1, device=DEVICE)).nearest is nearest


def wrong_everywhere(name):
    def spoiled(*inputs, **named):
        out = PLAIN[name](*inputs, **named)
        return (out + 1) % 12 if torch.is_tensor(out) else (out[0], out[1] + 1, *out[2:])

    return spoiled


def ties_are_lost(values, k):
    out = first_of_the_largest(values, k)
    ties = (values.sort(1, descending=True).values.diff(dim=1)[:, k - 1] == 0)[:, None]
    return torch.where(ties, torch.zeros_like(out), out)


def one_place_twice(points, k):
    out = nearest(points, k)
    out[..., 1] = torch.where(out[..., 0] == 0, out[..., 0], out[..., 1])
    return out


def nothing_without_moments(*inputs, about):
    extremes, *others = edge_extremes(*inputs, about=about)
    return extremes * (about is not None), *others


def nothing_from_short_places(*inputs):
    return tuple(part * (inputs[-1].dtype != torch.int16) for part in edge_gradients(*inputs))


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        *((name, wrong_everywhere(name)) for name in PLAIN),
        ("largest", ties_are_lost),
        ("nearest", one_place_twice),
        ("edge_extremes", nothing_without_moments),
        ("edge_gradients", nothing_from_short_places),
    ],
)
def test_a_kernel_that_is_wrong_always_or_in_one_case_is_noticed(name, fault):
    cpu = torch.device("cpu")
    backend.check(SimpleNamespace(**PLAIN), cpu)
    with pytest.raises(RuntimeError, match="differ from the plain formula"):
        backend.check(SimpleNamespace(**PLAIN | {name: fault}), cpu)


def test_without_working_kernels_the_plain_form_runs_with_a_warning(monkeypatch, chosen, caplog):
    def broken(*_):
        raise RuntimeError("no compiler here\nand a long trace")

    monkeypatch.setattr(backend, "check", broken)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    chosen("auto")
    on_gpu = SimpleNamespace(is_cuda=True, dtype=torch.float32, device=torch.device("cuda:0"))
    with caplog.at_level(logging.WARNING, logger="crossnet.kernels"):
        assert backend.backend_for(on_gpu) is None
        assert backend.backend_for(on_gpu) is None
    assert [record.getMessage() for record in caplog.records] == [
        "using PyTorch operations on cuda:0, since the Triton kernels do not work there: no compiler here"
    ]
    chosen("triton")
    with pytest.raises(UserError, match="CROSSNET_KERNELS=triton .* cannot run on cuda:0: no compiler here"):
        backend.backend_for(on_gpu)


@pytest.mark.parametrize("error", [RuntimeError("illegal memory access"), torch.cuda.OutOfMemoryError("full")])
def test_a_check_that_breaks_the_device_or_finds_no_memory_is_not_taken_for_an_answer(monkeypatch, chosen, error):
    def failing(*_):
        raise error

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(backend, "check", failing)
    monkeypatch.setattr(torch.cuda, "synchronize", failing)
    chosen("auto")
    on_gpu = SimpleNamespace(is_cuda=True, dtype=torch.float32, device=torch.device("cuda:0"))
    expected = UserError if "illegal" in str(error) else torch.cuda.OutOfMemoryError
    with pytest.raises(expected, match="left cuda:0 unusable .*CROSSNET_KERNELS=torch|full"):
        backend.backend_for(on_gpu)


def test_a_gpu_is_checked_once_whatever_it_is_called(monkeypatch, chosen):
    checks = []
    monkeypatch.setattr(backend, "check", lambda *_: checks.append(1))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    chosen("triton")
    for name in ("cuda", "cuda:0"):
        backend.check_choice(torch.device(name))
        on_gpu = SimpleNamespace(is_cuda=True, dtype=torch.float32, device=torch.device(name))
        assert backend.backend_for(on_gpu) is triton_kernels
    assert len(checks) == 1


@pytest.mark.parametrize("broken_elsewhere", [False, True])
def test_processes_agree_on_the_form_and_say_which_one_cannot(monkeypatch, chosen, caplog, broken_elsewhere):
    monkeypatch.setattr(backend, "check", lambda *_: None)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(backend, "world_size", lambda: 2)
    others = ["process 1 on cuda:1: no compiler"] if broken_elsewhere else []
    monkeypatch.setattr(backend, "all_gather_strings", lambda own: own + others)
    monkeypatch.setattr(backend, "_without_everywhere", [])
    chosen("auto")
    with caplog.at_level(logging.WARNING, logger="crossnet.kernels"):
        backend.agree_on_kernels(torch.device("cuda:0"))
    on_gpu = SimpleNamespace(is_cuda=True, dtype=torch.float32, device=torch.device("cuda:0"))
    assert backend.backend_for(on_gpu) is (None if broken_elsewhere else triton_kernels)
    assert caplog.text.count("process 1 on cuda:1: no compiler") == broken_elsewhere


def test_where_the_kernels_do_not_apply(unchecked, monkeypatch):
    x = torch.zeros(1, device=DEVICE)
    unchecked("triton")
    assert backend.backend_for(x.double()) is None and backend.backend_for(x.half()) is None
    unchecked("torch")
    assert backend.backend_for(x) is None
    unchecked("auto")
    assert backend.backend_for(torch.zeros(1)) is None  # a CPU
    with monkeypatch.context() as interpreting:
        interpreting.setenv("TRITON_INTERPRET", "1")  # slower than anything else, so only when asked for
        on_gpu = SimpleNamespace(is_cuda=True, dtype=torch.float32, device=torch.device("cuda:0"))
        assert backend.backend_for(on_gpu) is None


def test_a_choice_that_cannot_be_is_an_error(unchecked, monkeypatch):
    unchecked("cuda")
    for action in (lambda: backend.backend_for(torch.zeros(1)), lambda: resolve_device("cpu")):
        with pytest.raises(UserError, match="CROSSNET_KERNELS=cuda .* auto, triton, torch"):
            action()
    unchecked("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    for action in (lambda: backend.backend_for(torch.zeros(1)), lambda: resolve_device("cpu")):
        with pytest.raises(UserError, match="CROSSNET_KERNELS=triton .* need a GPU, the encoder runs on cpu"):
            action()


@pytest.mark.skipif(VERSION < (3, 3) or sys.platform != "linux", reason="needs Triton 3.3 and its assembler")
def test_every_kernel_compiles_for_gpus(tmp_path):
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-m", "tests.compile_kernels", "--capability", "90", "--points", "700"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    names = ("_select", "_edge_forward", "_gradient_of_centers", "_gradient_of_neighbors")
    assert all(f"{name} for compute capability 9.0: " in done.stdout for name in names)


def test_rows_too_wide_for_the_kernels_take_the_plain_form(unchecked, monkeypatch):
    monkeypatch.setattr(triton_kernels, "MAX_ROW", 8)
    unchecked("triton")
    for coordinates in (3, 5):
        points = torch.randn(1, 9, coordinates, device=DEVICE)
        found = knn(points, 2).sort(-1).values
        distances = torch.cdist(points, points)
        torch.testing.assert_close(found, distances.topk(2, largest=False).indices.sort(-1).values)
