"""Training, evaluation and every script with --device on an emulated GPU; planted faults show that it would notice."""

import json
import math
import re

import pytest
import torch
from torch import nn

import train_crossnet_con as pretraining
from benchmarks import dry_run, losses, neighbours
from benchmarks.dry_run import Case, cases, outcome, small_networks
from benchmarks.emulated_gpu import GpuTensor, emulated_gpu, on_gpu
from downstream.classification import few_shot, finetune, tsne
from downstream.classification import main as linear_svm
from downstream.segmentation import main_partseg, main_semseg, visualize
from models import CrossNet
from models.ops import triton_kernels
from tests.support.pairs import write_demo_set, write_pairs
from tests.support.segmentation_sets import write_parts, write_rooms

pytest.importorskip("triton", reason="Triton is not installed")
PLAIN = Case("pretraining", "dgcnn_cls", "off", "torch")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("sets")
    write_pairs(root, 16)
    write_demo_set(root, train=8, test=4)
    write_parts(root)
    write_rooms(
        root, ["Area_1_office_1", "Area_1_hall_1", "Area_1_hall_2", "Area_1_hall_3", "Area_2_office_1"], blocks=4
    )
    return root


@pytest.mark.parametrize("case", cases(), ids=str)
def test_a_run_on_a_gpu(case, root, tmp_path):
    assert outcome(case, root, tmp_path) == ""


def test_the_cases_cover_what_they_say():
    found = cases()
    assert len(set(map(str, found))) == len(found)
    own = [case for case in found if case.task == "pretraining" and case.processes == 1]
    plain = {(case.encoder, case.amp, case.form) for case in own if case.variant == "plain"}
    assert len(plain) == 3 * 3 * 2 + 2 * 3
    assert {(case.encoder, case.variant) for case in own} == {
        (encoder, variant) for encoder in dry_run.ENCODERS for variant in dry_run.VARIANTS
    }
    for name, values in (("amp", dry_run.AMP), ("form", dry_run.FORMS)):
        pairs = {(getattr(case, name), case.variant) for case in own}
        assert pairs == {(value, variant) for value in values for variant in dry_run.VARIANTS}


# --- planted faults ---


def planted(root, tmp_path, monkeypatch, change, case=PLAIN):
    """Outcome of a run whose model does ``change(losses)`` at the end of each forward pass."""
    forward = CrossNet.forward
    monkeypatch.setattr(CrossNet, "forward", lambda self, *args, **inputs: change(forward(self, *args, **inputs)))
    return outcome(case, root, tmp_path)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda x: x._replace(total=x.total + torch.zeros(1)), "expected all tensors to be on the same device"),
        (lambda x: x if float(x.total) < math.inf else None, "_local_scalar_dense.default needs values in step 1"),
        (lambda x: x._replace(intra=x.intra.cpu()), "a tensor is copied from the GPU in step 1"),
        (lambda x: x._replace(intra=x.intra + torch.ones(2).to(x.intra.device).sum()), "copied to the GPU, .* step 2"),
        (lambda x: x if len(x.total[None].nonzero()) else None, "aten.nonzero.default needs values in step 1"),
        (lambda x: x._replace(total=x.total[None][torch.zeros(1, dtype=torch.int64)].sum()), "indexed by one on the"),
        (lambda x: torch.cuda.synchronize() or x, "torch.cuda.synchronize is called in step 1"),
        (lambda x: x._replace(total=x.total.detach().requires_grad_()), "has no gradient"),
    ],
    ids=["device", "item", "cpu", "blocking copy", "nonzero", "index", "synchronize", "no gradient"],
)
def test_a_planted_fault_is_noticed(root, tmp_path, monkeypatch, change, expected):
    found = planted(root, tmp_path, monkeypatch, change)
    assert re.search(expected, found), found


def test_a_gradient_on_another_device_is_noticed(root, tmp_path, monkeypatch):
    class Leaves(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return torch.ones(grad.shape, device="cpu")

    found = planted(root, tmp_path, monkeypatch, lambda x: x._replace(total=Leaves.apply(x.total)))
    assert "got a gradient on cpu, its input is on cuda:0" in found


def test_a_part_without_gradient_is_noticed(root, tmp_path, monkeypatch):
    project = CrossNet.project_images
    monkeypatch.setattr(
        CrossNet,
        "project_images",
        lambda self, name, x: project(self, name, x).detach() if name == "gray" else project(self, name, x),
    )
    assert "has no gradient" in outcome(PLAIN, root, tmp_path)


@pytest.mark.parametrize("kernel", ["nearest", "edge_extremes", "edge_gradients"])
def test_a_launch_with_what_a_kernel_cannot_take_is_noticed(root, tmp_path, monkeypatch, kernel):
    real = getattr(triton_kernels, kernel)
    contiguous = torch.Tensor.contiguous

    def spoiled(*args, **named):
        with monkeypatch.context() as inside:
            inside.setattr(torch.Tensor, "contiguous", lambda x: contiguous(x.mT).mT if x.ndim > 1 else x)
            return real(*args, **named)

    monkeypatch.setattr(triton_kernels, kernel, spoiled)
    found = outcome(Case("pretraining", "dgcnn_cls", "off", "triton"), root, tmp_path)
    assert "is launched with" in found and "is not contiguous" in found


def test_a_launch_with_a_tensor_on_the_cpu_is_noticed():
    with emulated_gpu(form="triton"), pytest.raises(RuntimeError, match="is launched with .* on cpu"):
        triton_kernels.nearest(torch.rand(1, 8, 3), 2)


# --- the emulation itself ---


def test_the_emulated_gpu_computes_what_the_cpu_does(root, tmp_path):
    records = []
    for device in ("cpu", "cuda"):
        case = Case("pretraining", "dgcnn_cls", "off", "torch")
        shapes = tmp_path / "shapes.txt"
        shapes.write_text("\n".join(dry_run.ShapeNetRender(str(root)).ids[:8]))
        argv = [*dry_run.arguments(case, root, tmp_path, shapes), "--device", device]
        with small_networks(case):
            if device == "cuda":
                with emulated_gpu():
                    records.append(pretraining.main(argv))
            else:
                records.append(pretraining.main(argv))
    for name in ("loss", "loss_intra", "loss_cross"):
        assert records[1][name] == pytest.approx(records[0][name], rel=1e-4)


def test_nothing_of_the_emulated_gpu_is_left_behind():
    with emulated_gpu(form="triton", processes=4):
        x = nn.Linear(2, 3).to("cuda")(torch.ones(1, 2, device="cuda"))
        assert on_gpu(x) and x.device == torch.device("cuda:0") and torch.cuda.device_count() == 4
    with pytest.raises(RuntimeError, match="which is no longer there"):
        x + 1
    assert not torch.distributed.is_initialized()
    y = torch.ones(2, requires_grad=True)
    y.square().sum().backward()
    assert torch.equal(y.grad, torch.full((2,), 2.0)) and type(y.grad) is torch.Tensor
    assert not isinstance(nn.Linear(2, 3)(torch.ones(2, 2)), GpuTensor)


# --- every script with --device ---


@pytest.fixture(scope="module")
def pretrained(root, tmp_path_factory):
    """A checkpoint of each kind, by the name of its encoder or task."""
    out = tmp_path_factory.mktemp("runs")
    found = {}
    for task, encoder in (("pretraining", "dgcnn_cls"), ("parts", "dgcnn_partseg"), ("rooms", "dgcnn_semseg")):
        assert outcome(Case(task, encoder, "off", "torch"), root, out) == ""
        (out / "dry").rename(out / task)
        found[task] = str(next((out / task).rglob("last.pth")))
    return found


SCRIPTS = {
    "linear SVM": (linear_svm, "--dataset demo --model_path {pretraining} --num_points 24 --calibrate_bn --shots 1"),
    "few-shot": (few_shot, "--dataset demo --model_path {pretraining} --num_points 24 --ways 2 --shots 2 --queries 2"),
    "t-SNE": (tsne, "--dataset demo --model_path {pretraining} --num_points 24 --output {out}/tsne.png"),
    "classification": (finetune, "--dataset demo --pretrain_path {pretraining} --num_points 24 --epochs 1 --workers 0"
                       " --output_dir {out}"),
    "parts": (main_partseg, "--eval --model_path {parts} --num_points 32 --workers 0"),
    "rooms": (main_semseg, "--eval --model_path {rooms} --test_area 2 --workers 0 --protocol both"),
    "pictures": (visualize, "--model_path {parts} --num_points 32 --output_dir {out} --items 1 --workers 0"),
}  # fmt: skip


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_runs_on_a_gpu(name, root, tmp_path, pretrained):
    script, flags = SCRIPTS[name]
    with emulated_gpu() as gpu:  # Triton kernels write zeros here, and equal features crash scikit-learn's t-SNE
        script.main(["--data_root", str(root), "--device", "cuda", *flags.format(out=tmp_path, **pretrained).split()])
    assert not gpu.problems


BENCHMARKS = (losses, neighbours)


@pytest.mark.parametrize("script", BENCHMARKS, ids=lambda script: script.__name__)
def test_a_benchmark_runs_on_a_gpu(script, tmp_path):
    with emulated_gpu():
        script.main(["--quick", "--device", "cuda", "--json", str(tmp_path / "found.json")])
    assert json.loads((tmp_path / "found.json").read_text())
