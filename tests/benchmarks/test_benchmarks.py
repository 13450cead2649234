"""Every benchmark at sizes that say nothing: the keys it promises, and that what it compares is the same."""

import itertools
import json
import multiprocessing
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from threadpoolctl import threadpool_info, threadpool_limits
from torch.autograd import DeviceType
from torch.testing._internal.distributed.fake_pg import FakeStore

import train_crossnet_con
from benchmarks import (
    dynamic_edgeconv,
    edgeconv,
    estimate,
    loader,
    losses,
    measure,
    neighbours,
    plan_hours,
    run_all,
    step,
    svm,
)
from benchmarks.plan import Plan
from benchmarks.reference.textbook_pairs import TextbookPairs, augment_cloud
from benchmarks.reproduce import Runner
from engine.grad_cache import backward_in_chunks
from models import CrossNet, build_encoder
from models.ops.batch_norm import SyncBatchNorm
from tests.support.pairs import write_demo_set, write_pairs
from tests.support.several import run_together
from utils.errors import UserError
from utils.processes import run_jobs


def is_comparison(result):
    for form in ("ours", "textbook"):
        assert len(result[form]["seconds"]) == len(result["time_ratios"]) and min(result[form]["seconds"]) > 0
    return result["time_ratio"] == pytest.approx(np.median(result["time_ratios"]))


def is_documented(result, path):
    assert json.loads(path.read_text()) == result
    return {"settings", "machine", "versions", "git_commit"} <= result.keys()


def test_times_are_taken_in_turn_and_compared_pair_by_pair():
    calls = []
    seconds = measure.seconds_in_turn({name: lambda n=name: calls.append(n) for name in "ab"}, repeats=2)
    assert calls == list("abab") and {name: len(times) for name, times in seconds.items()} == {"a": 2, "b": 2}
    result = measure.compare(
        {"ours": [1.0, 2.0, 4.0], "textbook": [2.0, 8.0, 12.0]},
        {"ours": {"peak_mb": 20, "before_mb": 10}, "textbook": {"peak_mb": 60, "before_mb": 10}},
    )
    assert (result["time_ratios"], result["time_ratio"]) == ([2, 4, 3], 3)
    assert (result["memory_ratio"], result["step_memory_ratio"], result["ours"]["peak_mb"]) == (3, 5, 20)


def memory_of_a_large_array():
    return measure.memory_of(lambda: np.ones(1 << 25).sum())  # 268 MB


def test_memory_counts_what_the_call_took():
    # In a fork, whose peak begins at its present size: this process may have been larger before.
    (found,) = run_jobs(memory_of_a_large_array, [()], workers=1, context=multiprocessing.get_context("fork"))
    assert 250 < found["peak_mb"] - found["before_mb"] < 400


def test_a_fresh_process_that_fails_is_an_error_that_names_it():
    with pytest.raises(UserError, match="python -m benchmarks.nothing --x ended with code 1 .*No module named"):
        measure.in_fresh_process("benchmarks.nothing", ["--x"])


def test_loader_compares_equal_work_on_pairs_of_any_source(tmp_path, capsys):
    write_pairs(tmp_path / "data", 8, points=20)
    arguments = ["--quick", "--data_root", str(tmp_path / "data"), "--json", str(tmp_path / "out.json")]
    threads = torch.get_num_threads()
    result = loader.main(arguments)
    assert torch.get_num_threads() == threads
    assert is_comparison(result) and is_documented(result, tmp_path / "out.json")
    assert result["settings"]["points"] == 20
    for form in ("ours", "textbook", "whole"):
        assert result[form]["samples_per_second"] == pytest.approx(1 / result[form]["seconds_median"])
    stages = result["stages_ms"]
    assert set(stages["textbook"]) <= set(stages["ours"]) and "decode" in stages["textbook"]
    assert "samples/s of a worker" in capsys.readouterr().out
    with pytest.raises(UserError, match="--batch 9 is more than the 8 shapes"):
        loader.main(["--data_root", str(tmp_path / "data"), "--batch", "9"])


def test_both_data_paths_give_tensors_of_the_same_sizes_and_ranges(tmp_path):
    write_pairs(tmp_path / "data", 6, points=40)
    argv = ["--data_root", str(tmp_path / "data"), "--batch", "6", "--image_size", "24"]
    args = loader.BENCHMARK.parse_args(argv)
    ours, textbook = loader.prepare(args, tmp_path)
    path = loader.DataPath(ours, args)
    (batch,) = path.read()
    plain = [torch.stack(part) for part in zip(*(textbook[i] for i in range(6)), strict=True)]
    for a, b in zip(path.augment(batch), plain, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype and a.isfinite().all() and b.isfinite().all()
        assert abs(a.mean() - b.mean()) < 0.8 and 0.4 < a.std() / b.std() < 2.5


def test_the_textbook_augments_each_view_by_itself(tmp_path):
    points = np.random.default_rng(0).normal(size=(500, 3)).astype(np.float32)
    np.random.seed(0)
    views = torch.stack([augment_cloud(points) for _ in range(200)])
    assert not torch.equal(views[0], views[1])
    dropped = (views == views[:, :1]).all(2).double().mean(1)
    assert dropped.max() > 0.8 and abs(dropped.mean() - 0.4375) < 0.06
    write_pairs(tmp_path, 3, points=10, unpaired=1)
    assert len(TextbookPairs(tmp_path)) == 3


def test_the_threads_asked_for_are_those_of_numpy_too(monkeypatch):
    seen = []

    def measure_svm(args):
        seen.extend(pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas")
        raise KeyboardInterrupt

    monkeypatch.setattr(svm, "measure_svm", measure_svm)
    before = threadpool_info()
    with threadpool_limits(2, user_api="blas"), pytest.raises(KeyboardInterrupt):
        svm.main(["--quick", "--threads", "1"])
    assert set(seen) <= {1} and threadpool_info() == before  # none: macOS's BLAS cannot be limited


def test_svm_and_features_agree_with_the_textbook(tmp_path):
    result = svm.main(["--quick", "--json", str(tmp_path / "out.json")])
    assert is_comparison(result["svm"]) and is_comparison(result["features"])
    assert is_documented(result, tmp_path / "out.json")
    assert result["svm"]["agreement"] == 1 and result["svm"]["ours"]["accuracy"] > 30
    assert result["features"]["median_relative_difference"] < 1e-4


def test_ways_to_neighbors_find_the_same(tmp_path, capsys):
    result = neighbours.main(["--quick", "--widths", "3", "5", "--json", str(tmp_path / "out.json")])
    assert is_documented(result, tmp_path / "out.json")
    assert {width: set(ways) for width, ways in result["widths"].items()} == {
        "3": {"ours", "textbook", "cdist", "tree"},
        "5": {"ours", "textbook", "cdist"},
    }
    for ways in result["widths"].values():
        for part in ways.values():
            assert part["different"] < 0.02 and part["seconds_median"] > 0
    assert "4 neighbors of 2 x 64 points" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("module", "words", "message"),
    [
        (neighbours, "--k 9 --points 8", "--k 9 neighbors need at least as many points, not --points 8"),
        (edgeconv, "--k 9 --points 8", "--k 9 neighbors need at least as many points, not --points 8"),
        (edgeconv, "--model dgcnn_partseg --batch 1", "--batch 1: the transformer of dgcnn_partseg"),
        (dynamic_edgeconv, "--points 8", "--k 20 neighbors need at least as many points, not --points 8"),
        (step, "--points 8", "--k 20 neighbors need at least as many points, not --points 8"),
        (step, "--memory_points 8", "--k 20 neighbors need at least as many points, not --memory_points 8"),
        (step, "--batches 4 1", "of 1 object leave no statistics for batch norm"),
        (svm, "--points 8", "--points 8: the encoder's 20 neighbors"),
        (svm, "--classes 1", "--classes 1 leaves nothing to tell apart"),
        (svm, "--json /proc/none/svm.json", "cannot write"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_measured(module, words, message):
    with pytest.raises(UserError, match=message):
        module.BENCHMARK.parse_args(words.split())


def test_the_plain_way_uses_no_kernels_and_leaves_the_choice_as_it_was(monkeypatch):
    seen = []
    monkeypatch.setenv("CROSSNET_KERNELS", "triton")
    monkeypatch.setattr(neighbours, "knn", lambda points, k: seen.append(os.environ["CROSSNET_KERNELS"]))
    neighbours.plain(torch.zeros(1, 4, 3), 2)
    assert seen == ["torch"] and os.environ["CROSSNET_KERNELS"] == "triton"


def test_convolutions_of_both_forms_are_as_fast_as_cudnn_has_them():
    seen = []

    class Encoder(torch.nn.Linear):
        def forward(self, x):
            seen.append(torch.backends.cudnn.benchmark)
            return super().forward(x), x

    edgeconv.training_step(Encoder(3, 3), torch.zeros(1, 3))
    assert seen == [True] and not torch.backends.cudnn.benchmark


def test_synthetic_features_overlap():
    train_x, train_y, test_x, test_y = svm.synthetic_features(train=300, test=100, classes=5, dims=64)
    assert train_x.shape == (300, 64) and test_x.dtype == np.float32 and train_x.min() == 0
    assert sorted(set(train_y)) == list(range(5))
    distance = np.linalg.norm(test_x[:, None] - train_x[None], axis=2)
    nearest = train_y[distance.argmin(1)] == test_y
    assert 0.3 < nearest.mean() < 1


def test_loss_equals_lightlys(tmp_path):
    pytest.importorskip("lightly")
    result = losses.main(["--quick", "--json", str(tmp_path / "out.json")])
    assert is_comparison(result) and is_documented(result, tmp_path / "out.json")
    assert result["loss_difference"] < 1e-5 and result["gradient_difference"] < 1e-4


def test_a_profile_of_a_gpu_counts_every_kernel_once():
    def event(name, microseconds, kind, **more):
        return SimpleNamespace(key=name, self_device_time_total=microseconds, device_type=kind, **more)

    events = [
        event("aten::mm", 30, DeviceType.CPU),  # the time of its kernel, which comes next
        event("sm90_xmma_gemm_f32f32", 30, DeviceType.CUDA),
        event("_select", 50, DeviceType.CUDA),  # of Triton: without an operation
        event("void at::native::index_select_kernel", 20, DeviceType.CUDA),
        event("Optimizer.step", 100, DeviceType.CUDA, is_user_annotation=True),
    ]
    shares = edgeconv.shares_of(events, on_gpu=True)
    assert {stage: share for stage, share in shares.items() if share} == {
        "selection of neighbors": 50,
        "gather, scatter, reduce over neighbors": 20,
        "matrix products": 30,
    }


@pytest.mark.parametrize(("module", "needs"), [(losses, "lightly.loss"), (dynamic_edgeconv, "torch_geometric.nn")])
def test_a_missing_package_is_one_clear_message(module, needs, monkeypatch):
    monkeypatch.setitem(sys.modules, needs, None)
    with pytest.raises(UserError, match="cannot be imported .*pip install"):
        module.main(["--quick"])


def test_a_layer_equals_torch_geometrics(tmp_path):
    pytest.importorskip("torch_geometric")
    result = dynamic_edgeconv.main(["--quick", "--json", str(tmp_path / "out.json")])
    assert is_comparison(result) and is_documented(result, tmp_path / "out.json")
    assert result["difference"] < 1e-4 and result["gradient_difference"] < 1e-3 and "EdgeConv" in result["textbook_is"]


SMALL = (
    "--batch_size 4 --k 4 --emb_dims 16 --image_model resnet18 --image_size 16 --num_points 24 --workers 0 "
    "--device cpu --eval_points 24 --test_batch_size 4"
).split()


@pytest.fixture
def here(tmp_path, monkeypatch, small_runs):
    """Run in this process, or forked from it, what would run in fresh ones; return the list of their arguments.

    The set that stands for ModelNet40 is small.
    """
    asked = []
    monkeypatch.setattr(estimate, "in_fresh_process", lambda module, argv: asked.append(argv) or estimate.main(argv))
    sizes = {"dataset": "a set", "train": 40, "test": 20, "classes": 4}
    monkeypatch.setattr(estimate, "MODELNET40", sizes)

    really_run = subprocess.run

    def forked(command, **named):
        if "torch.distributed.run" not in command:
            return really_run(command, **named)
        assert command[5].endswith("train_crossnet_con.py")
        count, words = int(command[4].removeprefix("--nproc_per_node=")), command[6:]
        run_together(lambda: train_crossnet_con.main(words), tmp_path / "logs", count)
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(estimate.subprocess, "run", forked)
    return asked


def test_estimate_measures_the_real_step_and_multiplies(tmp_path, here, capsys):
    json_file = tmp_path / "out.json"
    wanted = ["--shapes", "1000", "--epochs", "3", "--gpus", "2", "--memory_gb", "100", "--seconds", "0.05"]
    wanted += ["--all_reduce_us", "1000", "--eval_every", "2", "--save_every", "100"]
    result = estimate.main([*wanted, "--check", "--json", str(json_file), *SMALL])
    assert is_documented(result, json_file)
    assert result["steps"] == 3 * (1000 // 8)
    assert result["step_seconds"] > result["all_reduce_seconds"] == pytest.approx(result["all_reduces"] / 1000)
    per_step = result["step_seconds"] + result["load_seconds"]  # without workers one comes after the other
    assert result["seconds_per_step"] == pytest.approx(per_step)
    # A probe after epochs 2 and 3. Checkpoints: one an epoch, at steps 100, 200 and 300, and the best of each probe.
    assert (result["probes"], result["checkpoints"]) == (2, 3 + 3 + 2)
    assert result["hours_of"] == {
        "steps": pytest.approx(result["steps"] * per_step / 3600),
        "probes": pytest.approx(2 * sum(result["probe_seconds"].values()) / 3600),
        "checkpoints": pytest.approx(8 * result["checkpoint_seconds"] / 3600),
    }
    assert min(result["hours_of"].values()) > 0 and result["hours"] == pytest.approx(sum(result["hours_of"].values()))
    assert result["shapes_per_s"] == pytest.approx(8 / per_step)
    assert result["bottleneck"] in ("reading data", "the training step") and result["peak_mb"] > 0
    assert (result["check"]["steps"], result["check"]["processes"]) == (estimate.BATCHES, 2)
    assert result["check"]["measured_seconds"] > 0
    sizes = [[word for flag, word in itertools.pairwise(argv) if flag == "--batch_size"] for argv in here]
    assert [size[-1] for size in sizes] == ["4", "2"]  # the last one counts
    shown = capsys.readouterr().out
    assert "hours" in shown and "2 probes on a set" in shown and "all-reduces of it, 1000 us each, given" in shown


def test_estimate_reads_the_data_named_and_knows_the_scripts_flags(tmp_path, here):
    write_pairs(tmp_path, 9, points=30)
    write_demo_set(tmp_path, train=8, test=4)
    wanted = ["--shapes", "9", "--epochs", "1", "--seconds", "0.05", "--data_root", str(tmp_path), "--accumulate", "2"]
    wanted += ["--cpu_time", "--threads", "1"]
    result = estimate.main([*wanted, *SMALL, "--batch_size", "2"])
    assert (result["steps"], result["settings"]["data"], "check" in result) == (2, tmp_path.name, False)
    assert all("--cpu_time" in argv for argv in here)
    assert result["probe_sets"] == [{"dataset": "demo", "train": 24, "test": 12, "classes": 3}]
    assert (result["probes"], result["all_reduces"]) == (1, 0)
    with pytest.raises(SystemExit):
        estimate.main(["--no_such_flag"])
    with pytest.raises(UserError, match="--shapes 3 do not fill one global batch of 4"):
        estimate.main(["--shapes", "3", "--seconds", "0.05", *SMALL])


PLAN_OF_TWO = """
title = "Results"
[roots]
pairs = "nowhere"
here = "{here}"
[pretraining.small]
needs = ["pairs/ShapeNet"]
flags = {{ data_root = "{{pairs}}", {small}, epochs = 3, val_fraction = 0.1 }}
[tables.t]
title = "t"
note = "n"
columns = {{ "all labels" = "test_accuracy_mean" }}
[[rows]]
name = "first"
table = "t"
label = "l"
pretraining = "small"
script = "downstream/classification/main.py"
flags = {{ dataset = "modelnet10", num_points = 24, shots = [1], shot_draws = 2, model_path = "{{pretrained}}" }}
[[rows]]
name = "second"
table = "t"
label = "l"
pretraining = "small"
script = "downstream/classification/finetune.py"
flags = {{ pretrain_path = "{{pretrained}}" }}
"""


def plan_of_two(folder, monkeypatch):
    """Write a plan of two rows that share a pretraining; return the command line that prices two seeds."""
    words = [word.removeprefix("--") for word in SMALL]
    given = zip(words[::2], words[1::2], strict=True)
    flags = ", ".join(f"{name} = {value if value.isdigit() else repr(value)}" for name, value in given)
    (folder / "plan.toml").write_text(PLAN_OF_TWO.format(here=folder, small=flags))
    monkeypatch.setitem(plan_hours.SIZES, "modelnet10", ({"train": 40, "test": 20}, 4))
    paths = ["--plan", folder / "plan.toml", "--results", folder / "results", "--work_dir", folder / "work"]
    return [*map(str, paths), "--seconds", "0.05", "--shapes", "100", "--seeds", "1", "2"]


def test_a_plan_is_priced_by_row_and_a_shared_pretraining_counts_once(tmp_path, here, monkeypatch, capsys):
    argv = plan_of_two(tmp_path, monkeypatch)
    result = estimate.main([*argv, "--json", str(tmp_path / "out.json")])
    assert json.loads((tmp_path / "out.json").read_text()) == json.loads(json.dumps(result))
    first, second = result["rows"]["first"], result["rows"]["second"]
    assert len(here) == 1 and first["missing_data"] == ["nowhere/ShapeNet"]
    assert first["hours_of"]["pretraining"] > 0 and first["hours_of"]["scoring"] > 0
    assert second["hours_of"] == {"pretraining": 0, "scoring": None}
    assert result["hours"] == pytest.approx(sum(first["hours_of"].values())) and result["hours_here"] == 0
    shown = capsys.readouterr().out
    assert "not priced: scoring of second; " in shown and "not here" in shown


def test_what_is_recorded_or_trained_costs_nothing_and_a_recorded_seed_prices_the_next(tmp_path, monkeypatch):
    costs = {"step_seconds": 3600, "load_seconds": 0, "checkpoint_seconds": 0, "cloud_seconds": 0, "dims": 8}
    monkeypatch.setattr(estimate, "measured", lambda *args, **named: costs)
    argv = plan_of_two(tmp_path, monkeypatch)
    runner = Runner(Plan.read(tmp_path / "plan.toml", {}), work=tmp_path, results=tmp_path, quick={})
    folder = tmp_path / "results" / "second" / "seed_1"
    folder.mkdir(parents=True)
    record = {"flags": runner.identity(runner.plan.rows[1]), "command_minutes": [9, 30]}
    (folder / "row.json").write_text(json.dumps(record))
    trained = tmp_path / "work" / "small" / "seed_2"  # two of three epochs
    trained.mkdir(parents=True)
    (trained / "last.pth").touch()
    (trained / "metrics.jsonl").write_text("{}\n" * 2)
    (trained / "config.json").write_text(json.dumps({"arguments": {"epochs": 3}}))
    rows = estimate.main(argv)["rows"]
    assert rows["second"]["seeds"] == [2] and rows["second"]["hours_of"] == {"pretraining": 0, "scoring": 0.5}
    # 90 of 100 pairs train, 22 batches of four.
    assert rows["first"]["hours_of"]["pretraining"] == pytest.approx(3 * 22 + 22)
    with pytest.raises(SystemExit):
        estimate.main([*argv, "--amp", "bf16"])


def test_a_check_in_one_process_trains_here(here):
    result = estimate.main(["--shapes", "9", "--epochs", "1", "--seconds", "0.05", "--check", *SMALL])
    assert (result["check"]["steps"], result["check"]["processes"]) == (estimate.BATCHES, 1)


def test_processes_that_cannot_train_together_are_one_message(monkeypatch):
    said = "W1: a launcher's word\nerror: 4 processes on this machine need a GPU each, it has 1\nE1: a trace"
    failed = type("Done", (), {"returncode": 1, "stderr": said})
    monkeypatch.setattr(estimate.subprocess, "run", lambda *a, **k: failed)
    with pytest.raises(UserError, match="--check: 4 processes cannot train together here: error: 4 processes on this"):
        estimate.train_together(["--batch_size", "2"], None, 4)


def test_a_prediction_takes_the_slower_of_workers_and_device_and_the_memory_that_is_left():
    args = estimate.parse_args(["--shapes", "100", "--epochs", "2", "--memory_gb", "2"])[0]
    args.all_reduce_us = 15
    full = {"step_seconds": 2.0, "load_seconds": 3.0, "peak_mb": 1000.0, "checkpoint_seconds": 0, "all_reduces": 236}
    full |= {"probe_sets": [], "cloud_seconds": 0.1}
    run_ = SimpleNamespace(batch_size=10, accumulate=1, workers=4, eval_every=1, save_every=500)
    found = estimate.predict(args, full, {"peak_mb": 800.0}, run_)
    assert (found["seconds_per_step"], found["bottleneck"]) == (3.0, "reading data")
    assert found["hours"] == pytest.approx(20 * 3 / 3600)
    assert (found["mb_per_object"], found["largest_batch"]) == (40, 35)
    run_.workers = 0
    assert estimate.predict(args, full, None, run_)["seconds_per_step"] == 5
    assert estimate.predict(args, full, None, run_)["largest_batch"] is None


@pytest.mark.parametrize(("steps", "every"), [(10, 4), (10, 5), (7, 20), (3, 0)])
def test_checkpoints_are_counted_as_the_loop_writes_them(steps, every):
    epochs = 6
    between = [step for step in range(1, steps * epochs + 1) if every and step % every == 0 and step % steps]
    found = estimate.count_checkpoints(steps=steps, epochs=epochs, save_every=every, probes=3)
    assert found == epochs + len(between) + 3


@pytest.mark.parametrize(
    ("model", "flags"),
    [
        ("dgcnn_cls", ""),
        ("dgcnn_cls", "--chunk_size 2 --mask_same_object"),
        ("dgcnn_partseg", "--objective ave"),
        ("dgcnn_semseg", "--no_sync_bn"),
        ("pointnet_partseg", "--image_modality gray"),
    ],
)
@pytest.mark.usefixtures("small_runs")
def test_all_reduces_are_as_many_as_a_step_makes(model, flags, monkeypatch):
    words = ["--batch_size", "4", "--image_model", "resnet18", "--model", model, *flags.split()]
    config = train_crossnet_con.PretrainConfig.from_flags(train_crossnet_con.build_parser().parse_args(words))
    small = {"emb_dims": 16, **({"k": 4} if model.startswith("dgcnn") else {})}
    names = ("image_model", "image_modality", "objective", "mask_same_object")
    model = CrossNet(build_encoder(model, **small), **{name: getattr(config, name) for name in names})
    expected = estimate.all_reduces_of_step(model, config)
    made = []
    monkeypatch.setattr(dist, "all_reduce", lambda x: made.append(x.shape))
    dist.init_process_group("fake", rank=0, world_size=4, store=FakeStore())
    try:
        if not config.no_sync_bn:
            SyncBatchNorm.convert(model)
        inputs = {name: torch.rand(4, 3, 16) for name in ("view1", "view2")}
        channels = {"rgb": 3, "gray": 1}
        inputs |= {name: torch.rand(4, channels[name], 16, 16) for name in model.image_encoders}
        if config.chunk_size:
            backward_in_chunks(model, inputs, chunk_size=config.chunk_size)
        else:
            model(**inputs).total.backward()
    finally:
        dist.destroy_process_group()
    assert len(made) == expected > 0


def test_the_page_shows_what_was_run_and_what_was_not(tmp_path, monkeypatch):
    job = run_all.Job("loss", "losses", "--batch 4")
    monkeypatch.setattr(run_all, "jobs", lambda data_root, gpu: [job])
    fake = json.dumps(
        measure.compare({"ours": [1.0], "textbook": [3.0]})
        | {
            "settings": {"batch": 4, "device": "cpu"},
            "machine": {"cpu": "a processor", "cores": 2, "gpu": None, "load_average_before": 0.5},
            "versions": {"python": "3", "torch": "2"},
            "git_commit": "c" * 40,
        }
    )

    def completed(command, **kwargs):
        assert command[1:] == ["-m", "benchmarks.losses", "--quick", "--json", command[-1]]
        open(command[-1], "w").write(fake)
        return type("Done", (), {"returncode": 0, "stderr": ""})

    monkeypatch.setattr(run_all.subprocess, "run", completed)
    results = run_all.main(["--quick", "--output_dir", str(tmp_path)])
    page = (tmp_path / "benchmarks.md").read_text()
    assert results["benchmarks"]["loss"]["time_ratio"] == 3
    assert "| NT-Xent against lightly's, 4 pairs, cpu | 1,000 ms | 3,000 ms | **3.0** (one round) |" in page
    assert "GPU: none, not run" in page and "a processor, 2 cores" in page and "--quick" in page
    assert "not run: no GPU here" in page and "python -m benchmarks.losses --quick" in page

    failed = type("Done", (), {"returncode": 2, "stderr": "error: lightly is not installed"})
    monkeypatch.setattr(run_all.subprocess, "run", lambda *a, **k: failed)
    run_all.main(["--quick", "--output_dir", str(tmp_path), "--only", "loss"])
    assert "**3.0**" in (tmp_path / "benchmarks.md").read_text()  # an earlier result stays
    run_all.main(["--quick", "--output_dir", str(tmp_path / "first"), "--only", "loss"])
    assert "not run: lightly is not installed" in (tmp_path / "first" / "benchmarks.md").read_text()
    with pytest.raises(UserError, match="--data_root .*nowhere does not exist"):
        run_all.main(["--output_dir", str(tmp_path), "--data_root", str(tmp_path / "nowhere")])
    monkeypatch.setattr(run_all, "ROOT", tmp_path)
    run_all.main(["--quick", "--only", "loss"])
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["benchmarks_quick"]
    with pytest.raises(UserError, match="no benchmark nothing; there are loss"):
        run_all.main(["--output_dir", str(tmp_path), "--only", "nothing"])
    with pytest.raises(UserError, match="results.json does not exist"):
        run_all.main(["--output_dir", str(tmp_path / "new"), "--redraw"])


def made_up(ratio=3.0, **settings):
    about = {"cpu": "a processor", "cores": 2, "gpu": None, "load_average_before": 0.5}
    memory = {"ours": {"peak_mb": 700, "before_mb": 500}, "textbook": {"peak_mb": 2100, "before_mb": 500}}
    return measure.compare({"ours": [1.0], "textbook": [ratio]}, memory) | {
        **{"settings": {"k": 20, "batch": 4, "points": 1024, "device": "cpu", **settings}, "machine": about},
        **{"versions": {"python": "3", "torch": "2"}, "commit": "c" * 40, "command": "python x", "wall_seconds": 60},
    }


def test_the_page_draws_every_result_there_may_be(tmp_path):
    shares = {"ours": {"matrix products": 60, "other": 40}, "textbook": {"matrix products": 20, "other": 80}}
    alone = made_up(points=8192)
    del alone["textbook"], alone["time_ratio"]
    loader_sizes = {"shapes": 8, "data": "pairs", "image_size": 224, "threads": 1}
    stages = {"ours": {"decode": 0.4, "gray*": 0.1}, "textbook": {"decode": 0.8, "gray*": 0.2}}
    rates = {
        form: {"samples_per_second": 100.0, "seconds_median": 0.01, "seconds": [0.01]} for form in ("ours", "textbook")
    }
    whole = {"samples_per_second": 50.0, "seconds_median": 0.02, "seconds": [0.02]}
    svm_sizes = {"train": 100, "test": 20, "dims": 8, "classes": 4, "clouds": 4}
    svm_part = made_up(9.0) | {"agreement": 0.999, "ours": {"seconds_median": 1.0, "accuracy": 80.0}}
    svm_part["textbook"] = {"seconds_median": 9.0, "accuracy": 80.1}
    loader_part = made_up(10.0, **loader_sizes) | {"stages_ms": stages, "whole": whole, **rates}
    del svm_part["memory_ratio"], loader_part["memory_ratio"]
    kept = made_up(**svm_sizes) | {"svm": svm_part}
    steps = [
        {"batch": b, "chunk_size": c, "peak_mb": 100.0 * (c or b), "seconds": 1.0} for b in (4, 8) for c in (None, 2)
    ]
    step_sizes = {"image_model": "resnet18", "image_size": 32, "amp": "off", "chunk_size": 2}
    step_sizes |= {"memory_points": 64, "memory_image_model": "resnet18", "memory_image_size": 32}
    run_sizes = {"shapes": 100, "epochs": 2, "batch_size": 4, "num_points": 64, "amp": "off", "image_model": "resnet18"}
    run_sizes |= {"gpus": 1}
    cost = {"shapes_per_s": 7.0, "hours": 1.5, "peak_mb": 900.0, "bottleneck": "the training step"}
    check = {"predicted_seconds": 1.0, "measured_seconds": 1.1, "error_percent": -9.0}
    rounds = measure.compare({"ours": [0.03, 0.03], "textbook": [0.3, 0.39]})
    scores = {"masks": rounds, "points": rounds, "command": "y", "wall_seconds": 1}
    ways = {"ours": {"seconds_median": 0.1, "different": 0.0}, "tree": {"seconds_median": 0.25, "different": 1e-5}}
    benchmarks = {
        "encoder": made_up(8.0, model="dgcnn_cls") | {"profile": shares},
        "encoder_8192": alone,
        "neighbours": made_up() | {"widths": {"3": ways}},
        **{f"points_{n}": made_up(n / 100, points=n) for n in (512, 1024, 2048)},
        **{f"k_{k}": made_up(k / 4, k=k) for k in (10, 40)},
        **{f"batch_{b}": made_up(4.0, batch=b) for b in (2, 8)},
        "step": made_up(5.0, **step_sizes) | {"large_batches": steps},
        "layer": {"not_run": "torch_geometric cannot be imported", "command": "z", "wall_seconds": 1},
        "loader": loader_part,
        "svm": made_up(**svm_sizes) | {"svm": svm_part, "features": made_up(6.0)},
        "svm_kept": kept,
        "scores": scores,
        "estimate": made_up(**run_sizes, image_size=64) | cost | {"check": check},
    }
    page = run_all.write_page({"quick": False, "benchmarks": benchmarks}, tmp_path).read_text()
    pictures = {path.name for path in (tmp_path / "benchmarks").glob("*.png")}
    assert pictures == {"cost.png", "profile.png", "loader.png", "speed.png", "memory_step.png"}
    assert all(f"(benchmarks/{name})" in page for name in pictures)
    assert "Sixteen would deliver 1,600: extrapolated, not measured" in page
    assert "not run: torch_geometric cannot be imported" in page and "99.90% of the predictions agree" in page
    assert "| decode | 0.400 | 0.800 |" in page and "1 / 1.1 (-9 %)" in page
    assert "| 4 x 1,024 points, cpu | 3 | tree | 250 | 2.5 | 1e-05 |" in page
    row = "| training step of dgcnn_cls, 4 x 1,024 points, k 20, cpu | 1 s | 8 s | **8.0** (one round) | 700 | 2,100 "
    assert row + "| 3.0; of the step alone 8.0 |" in page
    assert "against masks, CPU time | 30 ms | 345 ms | **11.5** (10.0 to 13.0, 2 rounds) |" in page
    page = run_all.write_page({"quick": False, "benchmarks": {"svm_kept": kept}}, tmp_path).read_text()
    assert "| linear SVM, 100 + 20 x 8, 4 classes, both with freed memory kept" in page and "## Linear SVM" in page


def test_benchmarks_read_the_data_that_is_named_from_any_folder_and_keep_what_is_done(tmp_path, monkeypatch):
    (tmp_path / "my pairs").mkdir()
    monkeypatch.chdir(tmp_path)
    words = []

    def stopped(command, **kwargs):
        if "benchmarks.svm" in command:
            raise KeyboardInterrupt
        words.append(command)
        open(command[-1], "w").write(json.dumps(made_up()))
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(run_all.subprocess, "run", stopped)
    with pytest.raises(KeyboardInterrupt):
        run_all.main(["--only", "loader", "svm", "--data_root", "my pairs", "--output_dir", "out"])
    assert words[0][words[0].index("--data_root") + 1] == str(tmp_path / "my pairs")
    kept = json.loads((tmp_path / "out/benchmarks/results.json").read_text())["benchmarks"]
    assert list(kept) == ["loader"] and f"--data_root '{tmp_path}/my pairs'" in kept["loader"]["command"]


def test_the_allocator_of_glibc_is_set_only_where_it_is(monkeypatch):
    names = {job.name for job in run_all.jobs(None, gpu=False)}
    monkeypatch.setattr(run_all.platform, "libc_ver", lambda: ("", ""))  # macOS
    assert names - {job.name for job in run_all.jobs(None, gpu=False)} == {"encoder_kept", "svm_kept"}


def test_a_mistake_shows_the_usage_of_the_estimate(capsys):
    for words in (["--unknown"], ["--batch_size", "none"]):
        with pytest.raises(SystemExit):
            estimate.parse_args(words)
        said = capsys.readouterr().err
        assert said.startswith("usage: python -m benchmarks.estimate ") and words[0] in said.splitlines()[-1]
