"""Training, evaluation and every script with --device on an emulated GPU; planted faults show that it would notice."""

import copy
import functools
import importlib
import json
import math
import re
from unittest import mock

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import train_crossnet_con as pretraining
from benchmarks import dry_run, dynamic_edgeconv, edgeconv, estimate, frame, gpu_check, losses, neighbours, step
from benchmarks.dry_run import Case, cases, outcome, small_networks
from benchmarks.emulated_gpu import GpuTensor, emulated_gpu, on_gpu
from benchmarks.fake_gpu import fakes_gpus
from benchmarks.reference.textbook import textbook_edge_conv, textbook_knn
from downstream import predict
from downstream.classification import few_shot, finetune, tsne
from downstream.classification import main as linear_svm
from downstream.segmentation import main_partseg, main_semseg, visualize
from models import CrossNet
from models.image import IMAGE_ENCODERS
from models.ops import triton_kernels
from models.ops.edge_conv import edge_conv, edge_conv_two_layers
from models.ops.knn import knn
from models.ops.layers import edge_block
from tests.support.pairs import cloud, write_demo_set, write_pairs, write_ply
from tests.support.segmentation_sets import write_parts, write_rooms

pytest.importorskip("triton", reason="Triton is not installed")
pytestmark = pytest.mark.skipif(not fakes_gpus(), reason="PyTorch before 2.10 plays no GPU without a driver")
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


def planted(root, tmp_path, monkeypatch, change):
    """Outcome of a run whose model does ``change(losses)`` at the end of each forward pass."""
    forward = CrossNet.forward
    monkeypatch.setattr(CrossNet, "forward", lambda self, *args, **inputs: change(forward(self, *args, **inputs)))
    return outcome(PLAIN, root, tmp_path)


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
    with pytest.raises(RuntimeError, match="that has been closed"):
        x + 1
    assert not torch.distributed.is_initialized()
    y = torch.ones(2, requires_grad=True)
    y.square().sum().backward()
    assert torch.equal(y.grad, torch.full((2,), 2.0)) and type(y.grad) is torch.Tensor
    assert not isinstance(nn.Linear(2, 3)(torch.ones(2, 2)), GpuTensor)


class Precisions(TorchDispatchMode):
    """Note whether matrix products of float32 may be rounded to TF32."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in ("mm", "bmm", "addmm", "addmm_", "baddbmm"):
            self.found.append(torch.get_float32_matmul_precision())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("layers", [1, 2])
def test_products_of_neighbors_and_edge_convs_are_exact_in_both_directions(layers):
    """Also where the environment has switched TF32 on, and in a backward pass that recomputes the forward pass."""
    torch.set_float32_matmul_precision("high")
    try:
        with emulated_gpu(), Precisions() as products:
            blocks = [edge_block(6, 8).to("cuda"), edge_block(8, 8).to("cuda")][:layers]
            x = torch.rand(24, 3).to("cuda").requires_grad_()
            out = (edge_conv, edge_conv_two_layers)[layers - 1](x, knn(x[None], 4)[0], *blocks)
            forward = len(products.found)
            out.sum().backward()
        assert set(products.found) == {"highest"} and 2 <= forward <= len(products.found) - 4
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")


# --- every script with --device ---


@pytest.fixture(scope="module")
def pretrained(root, tmp_path_factory):
    """Return a checkpoint of each kind, by the name of its encoder or task."""
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


@pytest.mark.parametrize("task", ["parts", "rooms", "pretraining"])
def test_predictions_are_made_on_a_gpu(task, tmp_path, pretrained):
    for seed in (1, 2):
        write_ply(tmp_path / f"{seed}.ply", cloud(seed))
    words = ["--model_path", pretrained[task], "--output_dir", tmp_path / "out", "--device", "cuda"]
    words += ["--neighbors", 1] if task == "pretraining" else []
    with emulated_gpu():
        found = predict.main([str(word) for word in (*words, "--num_points", 24, *tmp_path.glob("*.ply"))])
    assert len(found["predicted"]) == 2 and not found["skipped"]


BENCHMARKS = (losses, neighbours, step, edgeconv, dynamic_edgeconv)


@pytest.fixture
def in_this_process(monkeypatch):
    """Measure here what benchmarks measure in fresh processes, with small image networks."""
    monkeypatch.setitem(IMAGE_ENCODERS, "resnet18", dry_run.TinyImageNet)
    for script in (frame, estimate):
        monkeypatch.setattr(script, "in_fresh_process", lambda name, argv: importlib.import_module(name).main(argv))


def textbook_layer(block, k):
    """Stand for torch_geometric's layer."""
    layer = copy.deepcopy(block)
    layer.run = lambda x: textbook_edge_conv(x.mT, textbook_knn(x.mT, k), layer).mT.flatten(0, 1)
    return layer, "the textbook's"


@pytest.mark.usefixtures("in_this_process")
@pytest.mark.parametrize("script", BENCHMARKS, ids=lambda script: script.__name__)
def test_a_benchmark_runs_on_a_gpu(script, tmp_path, monkeypatch):
    monkeypatch.setattr(dynamic_edgeconv, "geometric_layer", textbook_layer)
    with emulated_gpu():
        script.main(["--quick", "--threads", "1", "--device", "cuda", "--json", str(tmp_path / "found.json")])
    assert json.loads((tmp_path / "found.json").read_text())


@pytest.mark.usefixtures("in_this_process")
def test_the_estimate_runs_on_a_gpu(root, tmp_path, capsys):
    words = "--seconds 0.01 --epochs 1 --num_points 24 --eval_points 24 --k 4 --emb_dims 16 --image_model resnet18"
    words += f" --image_size 16 --batch_size 4 --workers 0 --gpus 2 --shapes 16 --device cuda --data_root {root}"
    with emulated_gpu():
        found = estimate.main(words.split())
    assert found["machine"]["gpu"] == "an emulated GPU" and found["peak_mb"] > 0
    assert found["probe_sets"][0]["dataset"] == "demo" and "15 us each, assumed" in capsys.readouterr().out


@pytest.mark.usefixtures("in_this_process")
def test_the_checks_of_a_gpu_run_on_one(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "ENCODERS", ["dgcnn_cls"])
    monkeypatch.setattr(gpu_check, "VARIANTS", ("plain", "chunks"))  # nothing compiles here
    monkeypatch.setattr(gpu_check, "Report", functools.partial(gpu_check.Report, sizes=gpu_check.SMALL))
    monkeypatch.setattr(gpu_check, "command_output", lambda *_, **__: "")  # other processes have no emulated GPU
    monkeypatch.setattr(gpu_check, "stop_and_resume", lambda *_, **__: "")
    words = ["--only", "environment", "runs", "speed", "training", "--output_dir", str(tmp_path)]
    with emulated_gpu(), mock.patch.object(torch.cuda.nccl, "version", lambda: (2, 0)):
        rows = gpu_check.main(words)
    wrong = [f"{row.name}: {row.detail}" for row in rows if row.status == gpu_check.FAIL]
    assert not wrong and len(rows) == 1 + 4 + 2 + 3 * 2
