import json
import logging
import math
import os
import re
import shutil
import signal
import sys
import types

import pytest
import torch

from datasets.shapenet_render import ShapeNetRender
from datasets.transforms import RandomSubset
from engine import faults, loop, resume
from engine.checkpoint import load_checkpoint, save_checkpoint
from engine.load_model import crossnet_from_checkpoint, encoder_from_checkpoint
from engine.run_folder import CHECKPOINTS
from engine.task import Progress, Run
from tests.robustness.faults import REFERENCE, same_end, wait_for
from tests.support.comparing import equal, metrics
from tests.support.files import contents, cut
from tests.support.pairs import cloud, cloud_path, write_demo_set, write_pairs, write_ply
from tests.support.several import exit_codes, output_of, start_together
from tests.support.small_run import arguments, small_runs
from train_crossnet_con import LinearProbe, Pretraining, build_parser, main
from utils.cli import EXIT_TERMINATED
from utils.errors import CheckpointError, DataError, UserError

pytestmark = pytest.mark.usefixtures("small_runs")
KEYS = ["epoch", "step", "loss", "loss_intra", "loss_cross", "lr", "shapes_per_s", "data_wait"]


def train(root, out, *more):
    return main(arguments(root, out, *more))


@pytest.fixture(scope="module")
def reference(data_root, tmp_path_factory):
    """Train without interruption."""
    out = tmp_path_factory.mktemp("reference")
    with small_runs(curves=True):
        record = train(data_root, out, *REFERENCE, "--json", out / "result.json")
    return out / "crossnet", record


def test_run_folder_holds_what_is_promised(reference):
    folder, record = reference
    files = {"last.pth", "previous.pth", "best.pth", "config.json", "metrics.jsonl", "run.log", "curves.png"}
    assert {path.name for path in folder.iterdir()} == files
    records = metrics(folder)
    assert [list(r) for r in records] == [
        KEYS,
        [*KEYS, "demo_val_accuracy", "demo_test_accuracy"],
        [*KEYS, "demo_val_accuracy", "demo_test_accuracy"],
    ]
    assert [(r["epoch"], r["step"]) for r in records] == [(1, 4), (2, 8), (3, 12)]
    for r in records:
        assert r["loss"] == pytest.approx(r["loss_intra"] + r["loss_cross"]) and r["shapes_per_s"] > 0
        assert r["lr"] == pytest.approx(0.0005 * (1 + math.cos(math.pi * (r["step"] - 1) / 12)))
        assert 0 <= r["data_wait"] <= 1
    assert record == records[-1] == json.loads((folder.parent / "result.json").read_text())
    config = json.loads((folder / "config.json").read_text())
    assert config["arguments"]["k"] == 4 and config["arguments"]["lr"] == 1e-3 and config["versions"]["torch"]
    log = (folder / "run.log").read_text()
    assert "1 shapes without rendering left out" in log and "step 12/12" in log and "epoch 3  step 12" in log


def test_checkpoint_rebuilds_the_encoder_alone(reference):
    folder, _ = reference
    payload = torch.load(folder / "last.pth", weights_only=True)
    assert payload["format"] == 1 and payload["progress"]["step"] == 12 and payload["global_batch"] == 4
    assert not any(key.startswith("point_encoder") for key in payload["heads_and_image_encoders"])
    encoder = encoder_from_checkpoint(folder / "last.pth")
    assert (encoder.k, encoder.emb_dims) == (4, 16)
    assert equal(dict(encoder.state_dict()), dict(payload["point_encoder"]))


def test_checkpoint_rebuilds_the_whole_model(reference, tmp_path):
    path = reference[0] / "last.pth"
    model, payload = crossnet_from_checkpoint(path)
    assert payload["arguments"]["image_size"] == 16 and list(model.image_encoders) == ["rgb", "gray"]
    kept = {f"point_encoder.{key}": value for key, value in payload["point_encoder"].items()}
    kept |= payload["heads_and_image_encoders"]
    assert kept.keys() == model.state_dict().keys()
    assert all(torch.equal(value, kept[key]) for key, value in model.state_dict().items())
    for change, message in (
        ({"heads_and_image_encoders": None}, "does not hold what this version writes"),
        ({"arguments": {}}, "does not hold what this version writes .KeyError"),
        ({"arguments": {**payload["arguments"], "image_modality": "rgb"}}, "does not fit the pretraining model"),
    ):
        save_checkpoint(tmp_path / "a.pth", {**payload, **change})
        with pytest.raises(CheckpointError, match=message):
            crossnet_from_checkpoint(tmp_path / "a.pth")
    del payload["heads_and_image_encoders"]
    save_checkpoint(tmp_path / "a.pth", payload)
    with pytest.raises(CheckpointError, match="contains no projection heads"):
        crossnet_from_checkpoint(tmp_path / "a.pth")


def test_the_loss_falls_far_below_chance(data_root, tmp_path):
    # Without augmentation an object's two views are told from the others' soon.
    flags = "--without scale rotate translate jitter dropout color flip --epochs 10 --eval_every 0 --save_every 0"
    flags += " --log_every 100 --image_modality rgb --num_points 48"
    train(data_root, tmp_path, *flags.split())
    losses = [record["loss_intra"] for record in metrics(tmp_path / "crossnet")]
    assert losses[-1] < 0.5 * math.log(2 * 4 - 1) and losses[-1] < losses[0], losses


def test_sigterm_to_the_whole_group_saves_and_ends_cleanly(data_root, reference, tmp_path):
    argv = arguments(data_root, tmp_path, *REFERENCE, "--workers", "1", "--save_every", "0")

    def alone():
        os.setsid()  # a process group of this run and its data worker
        main(argv)

    (process,) = start_together(alone, tmp_path / "logs", 1)
    wait_for(process, tmp_path / "crossnet" / "run.log", "step 2/12")
    os.killpg(process.pid, signal.SIGTERM)
    codes, output = exit_codes([process]), output_of(tmp_path / "logs")
    assert codes == [EXIT_TERMINATED], output
    assert "Traceback" not in output and output.count("stopped by SIGTERM at step") == 1
    stopped = load_checkpoint(tmp_path / "crossnet" / "last.pth")["progress"]
    assert 2 <= stopped["step"] < 12 and stopped["samples"] == 4 * (stopped["step"] - 4 * stopped["epoch"])
    main([*argv, "--resume"])
    same_end(tmp_path / "crossnet", reference[0])


@pytest.mark.parametrize("when", ["step", "last step of an epoch", "probe"])
def test_sigterm_at_any_moment_loses_nothing(data_root, reference, tmp_path, monkeypatch, when):
    step, probe = Run.step, LinearProbe.__call__

    def terminating_step(self, batch):
        if self.progress.step == {"step": 5, "last step of an epoch": 7}.get(when):
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, batch)

    def terminating_probe(self, *args, **kwargs):
        os.kill(os.getpid(), signal.SIGTERM)
        return probe(self, *args, **kwargs)

    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as caught:
        patch.setattr(Run, "step", terminating_step)
        if when == "probe":
            patch.setattr(LinearProbe, "__call__", terminating_probe)
        train(data_root, tmp_path, *REFERENCE)
    assert caught.value.code == 143 and signal.getsignal(signal.SIGTERM) == before
    progress = load_checkpoint(tmp_path / "crossnet" / "last.pth")["progress"]
    assert progress["step"] == {"step": 6}.get(when, 8)
    train(data_root, tmp_path, *REFERENCE, "--resume")
    same_end(tmp_path / "crossnet", reference[0])


def copy_run(reference, tmp_path, *names):
    folder = tmp_path / "crossnet"
    folder.mkdir()
    for name in names or [path.name for path in reference[0].iterdir()]:
        (folder / name).write_bytes((reference[0] / name).read_bytes())
    return folder


def test_a_finished_run_resumes_to_its_own_end(data_root, reference, tmp_path):
    folder = copy_run(reference, tmp_path)
    before = contents(folder)
    assert train(data_root, tmp_path, *REFERENCE, "--resume") == reference[1]
    after = contents(folder)
    assert all(after[name] == before[name] for name in ("last.pth", "best.pth", "metrics.jsonl", "curves.png"))
    says = r"nothing is left to train: all 3 epochs are done; .* cannot be extended, .*; --model_path \S+/last.pth "
    assert re.search(says, (folder / "run.log").read_text())


def refused(root, out, message, *more, kind=UserError):
    """Check that the run stops with a message and leaves everything as it is."""
    before = contents(out)
    with pytest.raises(kind, match=message):
        train(root, out, *more)
    assert contents(out) == before


def test_an_existing_run_is_kept(data_root, reference, tmp_path):
    copy_run(reference, tmp_path)
    refused(data_root, tmp_path, "holds an earlier run .*--resume.*--overwrite", *REFERENCE)
    refused(data_root, tmp_path, "holds an earlier run", *REFERENCE, "--resume", reference[0] / "last.pth")
    absent = tmp_path / "absent"
    for flag, value in (("--batch_size", 17), ("--num_points", 49), ("--list", absent), ("--device", "foo")):
        refused(data_root, tmp_path, str(value), *REFERENCE, "--overwrite", flag, value)
    refused(tmp_path / "nothing", tmp_path, "does not exist", *REFERENCE, "--overwrite", kind=DataError)


def test_overwrite_starts_again(data_root, reference, tmp_path):
    folder = copy_run(reference, tmp_path)
    (folder / "notes.txt").write_text("mine")
    train(data_root, tmp_path, "--epochs", 1, "--eval_every", 0, "--overwrite")
    assert [r["step"] for r in metrics(folder)] == [4]
    assert not (folder / "best.pth").exists() and (folder / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    "change", ["--lr 0.002", "--k 5", "--epochs 4", "--batch_size 5", "--seed 2", "--use_sgd", "--objective ave"]
)
def test_resume_with_other_settings_is_an_error_that_names_them(data_root, reference, tmp_path, change):
    copy_run(reference, tmp_path)
    flag = change.split()[0]
    refused(data_root, tmp_path, f"other settings .*{flag} .* there, .* here", *REFERENCE, *change.split(), "--resume")


def test_a_finished_run_says_how_its_weights_can_be_trained_further(data_root, reference, tmp_path):
    folder = copy_run(reference, tmp_path)
    says = r"--epochs 3 there, 4 here.*nor extended where its learning rate follows .*--model_path \S+/last.pth "
    refused(data_root, tmp_path, says, *REFERENCE, "--epochs", 4, "--resume")
    # What the message advises.
    more = (*REFERENCE, "--epochs", 1, "--exp_name", "more", "--model_path", folder / "last.pth")
    assert train(data_root, tmp_path, *more)["epoch"] == 1


@pytest.mark.parametrize("fails", ["wandb", "workers", "first batch"])
def test_a_start_that_fails_leaves_the_folder_as_it_was(data_root, reference, tmp_path, monkeypatch, fails):
    def fail(*args, **kwargs):
        raise UserError("not today")

    name = {
        "wandb": "engine.loop.WandbMirror",
        "workers": "engine.loop.data_workers",
        "first batch": "engine.loop.batches",
    }
    with monkeypatch.context() as patch:
        patch.setattr(name[fails], fail)
        refused(data_root, tmp_path / "new", "not today", *REFERENCE)
        folder = copy_run(reference, tmp_path)
        refused(data_root, tmp_path, "not today", *REFERENCE, "--overwrite")
        (folder / "metrics.jsonl").unlink()
    record = train(data_root, tmp_path / "new", "--epochs", 1, "--eval_every", 0)  # no --overwrite is needed
    assert record["epoch"] == 1
    train(data_root, tmp_path, "--epochs", 1, "--eval_every", 0, "--overwrite")
    assert not list(folder.glob("*.replaced")) and not (folder / "best.pth").exists()


def test_resume_with_other_shapes_or_another_kind_of_file_is_an_error(data_root, reference, tmp_path):
    folder = copy_run(reference, tmp_path)
    ids = ShapeNetRender(data_root).ids
    (tmp_path / "list.txt").write_text("\n".join(ids[:15]))
    flags = (*REFERENCE, "--list", tmp_path / "list.txt", "--resume")
    refused(data_root, tmp_path, "other shapes", *flags, kind=CheckpointError)
    encoder = load_checkpoint(folder / "last.pth")
    save_checkpoint(folder / "encoder.pth", {key: encoder[key] for key in ("encoder", "point_encoder")})
    flags = (*REFERENCE, "--resume", folder / "encoder.pth")
    refused(data_root, tmp_path, "not a pretraining checkpoint", *flags, kind=CheckpointError)
    refused(data_root, tmp_path, "does not exist", *REFERENCE, "--resume", folder / "absent.pth", kind=CheckpointError)


def test_a_run_with_the_earlier_point_head_cannot_resume_but_its_encoder_can_be_used(data_root, reference, tmp_path):
    folder = tmp_path / "crossnet"
    shutil.copytree(reference[0], folder)
    payload = load_checkpoint(folder / "last.pth")
    rest = payload["heads_and_image_encoders"]
    rest |= {"point_head.0.bias": torch.zeros(1024), "point_head.0.weight": torch.zeros(1024, 32)}
    save_checkpoint(folder / "last.pth", payload)
    message = "point head's hidden layer had 1024 units .*of commit .*--model_path"
    with pytest.raises(CheckpointError, match=message):
        train(data_root, tmp_path, *REFERENCE, "--resume")
    few = ("--epochs", 1, "--eval_every", 0, "--exp_name", "again", "--model_path", folder / "last.pth")
    assert train(data_root, tmp_path, *few)["epoch"] == 1


def test_settings_that_change_nothing_learned_may_change_on_resume(data_root, reference, tmp_path):
    folder = copy_run(reference, tmp_path)
    flags = ("--svm_c", 1, "--save_every", 0, "--workers", 1, "--eval_root", data_root, "--log_every", 3)
    assert train(data_root, tmp_path, *REFERENCE, *flags, "--resume") == reference[1]
    assert (folder / "best.pth").read_bytes() == (reference[0] / "best.pth").read_bytes()


@pytest.mark.parametrize("damaged", [["last.pth"], ["last.pth", "previous.pth"]])
def test_a_damaged_checkpoint_is_set_aside_for_the_newest_whole_one(data_root, reference, tmp_path, damaged):
    folder = copy_run(reference, tmp_path)
    for name in damaged:
        cut(folder / name)
    left = {name: load_checkpoint(folder / name)["progress"]["step"] for name in CHECKPOINTS if name not in damaged}
    before = contents(folder)
    train(data_root, tmp_path, *REFERENCE, "--resume")
    same_end(folder, reference[0])
    for name in damaged:
        assert (folder / f"{name}.damaged").read_bytes() == before[name]
        assert f"{name} is damaged" in (folder / "run.log").read_text()
    newest = max(left, key=left.get)
    assert f"continuing from {folder / newest}, the newest intact one" in (folder / "run.log").read_text()


def test_a_best_checkpoint_that_is_damaged_too_is_found_again(data_root, reference, tmp_path):
    folder = copy_run(reference, tmp_path)
    for name in ("last.pth", "best.pth"):
        cut(folder / name)
    train(data_root, tmp_path, *REFERENCE, "--resume")
    assert (folder / "best.pth.damaged").exists()
    assert load_checkpoint(folder / "best.pth")["progress"]["epoch"] == 3
    ours, theirs = (load_checkpoint(path / "last.pth") for path in (folder, reference[0]))
    assert equal(ours["point_encoder"], theirs["point_encoder"]) and equal(ours["optimizer"], theirs["optimizer"])


@pytest.mark.parametrize("error", [ConnectionResetError(104, "Connection reset by peer"), EOFError()])
def test_a_worker_that_is_killed_while_it_hands_over_a_batch(error):
    class Loader:
        num_workers = 2

        def __iter__(self):
            yield 1
            raise error

    with pytest.raises(UserError, match="a process that reads data is gone .*--resume"):
        list(faults.batches(Loader()))
    Loader.num_workers = 0
    with pytest.raises(type(error)):
        list(faults.batches(Loader()))


def test_a_signal_waits_until_a_checkpoint_is_written():
    happened = []
    before = signal.signal(signal.SIGUSR1, lambda *_: happened.append("signal"))
    try:
        with faults.postponed(signal.SIGUSR1):
            os.kill(os.getpid(), signal.SIGUSR1)
            happened.append("saved")
        assert happened == ["saved", "signal"]
        os.kill(os.getpid(), signal.SIGUSR1)
        assert happened[2:] == ["signal"]
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_a_damaged_checkpoint_stays_where_it_is_if_the_run_cannot_go_on(data_root, reference, tmp_path):
    folder = copy_run(reference, tmp_path)
    cut(folder / "last.pth")
    help_text = "last.pth is damaged.*--resume without a path"
    refused(data_root, tmp_path, help_text, *REFERENCE, "--resume", folder / "last.pth", kind=CheckpointError)
    refused(data_root, tmp_path, "other settings", *REFERENCE, "--lr", "0.5", "--resume", kind=CheckpointError)


def test_a_run_whose_checkpoints_are_all_damaged_is_never_started_over(data_root, reference, tmp_path):
    folder = copy_run(reference, tmp_path)
    for name in CHECKPOINTS:
        cut(folder / name)
    refused(data_root, tmp_path, "no intact checkpoint: .*are damaged.*--overwrite", *REFERENCE, "--resume")


def test_resume_into_a_new_folder_leaves_the_old_one_and_finds_a_best_again(data_root, reference, tmp_path):
    before = contents(reference[0])
    train(data_root, tmp_path, *REFERENCE, "--resume", reference[0] / "previous.pth", "--exp_name", "other")
    assert contents(reference[0]) == before
    assert [r["epoch"] for r in metrics(tmp_path / "other")] == [3] and (tmp_path / "other" / "best.pth").is_file()
    ours, theirs = (load_checkpoint(folder / "last.pth") for folder in (tmp_path / "other", reference[0]))
    assert equal(ours["point_encoder"], theirs["point_encoder"])


def test_a_failed_start_from_a_checkpoint_elsewhere_leaves_no_folder(data_root, reference, tmp_path, monkeypatch):
    monkeypatch.setattr(Run, "step", lambda self, batch: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(data_root, tmp_path, *REFERENCE, "--resume", reference[0] / "previous.pth")
    assert contents(tmp_path) == {}


def test_checkpoints_are_written_on_systems_without_signals_of_ended_processes(data_root, tmp_path, short, monkeypatch):
    monkeypatch.setattr(resume, "SIGCHLD", None)
    train(data_root, tmp_path, *short)
    assert (tmp_path / "crossnet" / "last.pth").is_file()


@pytest.mark.parametrize("save_every", [1, 0])
def test_a_loss_that_is_not_finite_stops_with_a_message_and_finite_checkpoints(data_root, tmp_path, save_every):
    with pytest.raises(UserError, match=r"not finite at step \d+ \(epoch 1\).*lower --lr"):
        train(data_root, tmp_path, *REFERENCE, "--lr", "1e30", "--save_every", save_every)
    folder = tmp_path / "crossnet"
    assert not (folder / "metrics.jsonl").exists()
    if (folder / "last.pth").exists():
        payload = load_checkpoint(folder / "last.pth")
        tensors = [*payload["point_encoder"].values(), *payload["heads_and_image_encoders"].values()]
        assert all(tensor.isfinite().all() for tensor in tensors)


def test_weights_that_are_not_finite_are_never_saved(data_root, tmp_path, monkeypatch):
    def break_weights(self):
        if self.progress.step == 2:
            self.task.model.point_head[0].weight.data[0, 0] = math.inf  # the loss before it was finite

    monkeypatch.setattr(Run, "optimizer_step", break_weights)
    with pytest.raises(UserError, match="some weights are not finite at step 3"):
        train(data_root, tmp_path, *REFERENCE, "--save_every", 1)
    assert load_checkpoint(tmp_path / "crossnet" / "last.pth")["progress"]["step"] == 2


@pytest.fixture(scope="module")
def short(data_root, tmp_path_factory):
    """Return the flags of a run of two steps."""
    path = tmp_path_factory.mktemp("list") / "list.txt"
    path.write_text("\n".join(ShapeNetRender(data_root).ids[:8]))
    return ("--list", path, "--epochs", 1, "--eval_every", 0)


@pytest.mark.parametrize("modality", ["both", "rgb", "gray"])
@pytest.mark.parametrize("objective", ["con", "ave"])
def test_every_objective_and_modality_trains(data_root, tmp_path, short, objective, modality):
    record = train(data_root, tmp_path, *short, "--objective", objective, "--image_modality", modality, "--alpha", 0.5)
    weights = load_checkpoint(tmp_path / "crossnet" / "last.pth")["heads_and_image_encoders"]
    built = {name.split(".")[1] for name in weights if name.startswith("image_encoders")}
    assert built == ({"rgb", "gray"} if modality == "both" else {modality})
    # With one modality both objectives are the same function; alpha weighs the cross term everywhere.
    assert record["loss"] == pytest.approx(record["loss_intra"] + 0.5 * record["loss_cross"])
    assert math.isfinite(record["loss"]) and record["step"] == 2


def test_each_term_can_train_alone_and_a_checkpoint_without_its_weight_resumes(data_root, tmp_path, short):
    record = train(data_root, tmp_path, *short, "--intra_weight", 0)
    assert record["loss"] == pytest.approx(record["loss_cross"]) and record["loss_intra"] > 0
    path = tmp_path / "crossnet" / "last.pth"
    assert crossnet_from_checkpoint(path)[0].intra_weight == 0
    with pytest.raises(CheckpointError, match="--intra_weight 0.0 there, 1.0 here"):
        train(data_root, tmp_path, *short, "--resume")
    train(data_root, tmp_path, *short, "--overwrite")
    payload = load_checkpoint(path)
    for name in ("intra_weight", "without", "keep_every"):
        del payload["arguments"][name]
    save_checkpoint(path, payload)
    train(data_root, tmp_path, *short, "--resume")
    with pytest.raises(CheckpointError, match=r"--without \[\] there, \['color'\] here"):
        train(data_root, tmp_path, *short, "--without", "color", "--resume")
    with pytest.raises(UserError, match="--alpha 0 and --intra_weight 0 leave nothing to train on"):
        train(data_root, tmp_path, *short, "--alpha", 0, "--intra_weight", 0, "--overwrite")


def test_a_setting_that_was_removed_and_another_order_of_names_do_not_stop_a_run(data_root, tmp_path, short):
    path = tmp_path / "crossnet" / "last.pth"
    train(data_root, tmp_path, *short, "--without", "scale", "color")
    payload = load_checkpoint(path)
    save_checkpoint(path, {**payload, "arguments": {**payload["arguments"], "views": 1, "ema": 0.9}})
    train(data_root, tmp_path, *short, "--without", "color", "scale", "--resume")
    assert crossnet_from_checkpoint(path)[0].alpha == 1


def test_a_distance_between_kept_checkpoints_that_keeps_none_is_a_warning(data_root, tmp_path, short):
    train(data_root, tmp_path, *short, "--keep_every", 1000)
    assert "--keep_every 1000 keeps nothing" in (tmp_path / "crossnet" / "run.log").read_text()


@pytest.mark.parametrize("model", ["dgcnn_cls", "dgcnn_seg", "dgcnn_semseg", "pointnet_cls", "pointnet_partseg"])
def test_every_encoder_pretrains(data_root, tmp_path, short, model):
    train(data_root, tmp_path, *short, "--model", model)
    assert encoder_from_checkpoint(tmp_path / "crossnet" / "last.pth", model=model).emb_dims == 16


@pytest.mark.parametrize(
    "flags", ["--amp bf16", "--amp fp16", "--channels_last", "--mask_same_object", "--background released"]
)
def test_switches_train(data_root, tmp_path, short, flags):
    plain = train(data_root, tmp_path, *short, "--exp_name", "plain")
    record = train(data_root, tmp_path, *short, *flags.split())
    assert math.isfinite(record["loss"])
    close = pytest.approx(plain["loss"], rel=0.15)
    assert record["loss"] == (pytest.approx(plain["loss"], rel=1e-3) if flags == "--channels_last" else close)
    assert record["loss"] != plain["loss"] or flags == "--channels_last"


def test_compiled_parts_train_what_plain_ones_train(data_root, tmp_path, short, monkeypatch):
    """Traced and called through PyTorch's compiler; without its code generator, which needs a C++ compiler."""
    plain = train(data_root, tmp_path, *short, "--exp_name", "plain")
    compiled, original = [], torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda self: (compiled.append(self), original(self, backend="eager"))
    )
    record = train(data_root, tmp_path, *short, "--compile")
    assert len(compiled) == 5  # two image encoders, three heads
    assert record["loss"] == pytest.approx(plain["loss"], rel=1e-5)
    encoder_from_checkpoint(tmp_path / "crossnet" / "last.pth")


def test_one_chunk_trains_what_no_chunks_train(data_root, tmp_path, short):
    ends = []
    for flags in ((), ("--chunk_size", 4), ("--chunk_size", 2), ("--amp", "bf16", "--chunk_size", 2)):
        train(data_root, tmp_path, *short, "--overwrite", *flags)
        ends.append(load_checkpoint(tmp_path / "crossnet" / "last.pth")["point_encoder"])
    assert equal(ends[0], ends[1])
    assert not equal(ends[0], ends[2]) and not equal(ends[2], ends[3])


def test_accumulated_batches_are_one_step_with_the_mean_of_their_losses(data_root, tmp_path, short):
    """A rate too small to change anything: the losses of eight batches, two a step, and of the same batches alone."""
    flags = (*short, "--epochs", 1, "--lr", "1e-30", "--save_every", 0)
    alone = train(data_root, tmp_path, *flags, "--exp_name", "a")
    both = train(data_root, tmp_path, *flags, "--exp_name", "b", "--accumulate", 2)
    assert (alone["step"], both["step"]) == (2 * both["step"], alone["step"] // 2)
    assert both["loss"] == pytest.approx(alone["loss"], rel=1e-5)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--chunk_size", 1), "--chunk_size 1 leaves no statistics for batch norm"),
        (("--accumulate", 5), "--batch_size 4 x --accumulate 5 is larger .*16 pairs; use --batch_size 3 or less"),
    ],
)
def test_impossible_parts_of_a_batch_are_refused(data_root, tmp_path, flags, message):
    with pytest.raises(UserError, match=message):
        train(data_root, tmp_path, *flags)


def test_learning_rates_of_both_schedules_and_optimizers(data_root, tmp_path, short):
    rates = []
    step = Run.optimizer_step

    def note(self):
        rates.append((type(self.optimizer).__name__, self.optimizer.param_groups[0]["lr"]))
        step(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "optimizer_step", note)
        two = (*short, "--epochs", 2, "--save_every", 0)
        train(data_root, tmp_path, *two, "--exp_name", "a")
        train(data_root, tmp_path, *two, "--exp_name", "b", "--lr_schedule", "released")
        train(data_root, tmp_path, *two, "--exp_name", "c", "--use_sgd", "--lr", "1e-4")
    cosine = [(1 + math.cos(math.pi * step / 4)) / 2 for step in range(4)]
    released = [(1 + math.cos(math.pi * step / 2)) / 2 for step in range(4)]
    expected = [("Adam", 1e-3 * x) for x in cosine] + [("Adam", 1e-3 * x) for x in released]
    expected += [("SGD", 1e-2 * x) for x in cosine]
    assert [kind for kind, _ in rates] == [kind for kind, _ in expected]
    assert [rate for _, rate in rates] == pytest.approx([rate for _, rate in expected], abs=1e-12)


def test_wandb_gets_the_metrics_only_when_asked(data_root, tmp_path, short, monkeypatch):
    sent = []
    run = types.SimpleNamespace(log=lambda record, step: sent.append((record, step)), finish=lambda: sent.append("end"))
    stub = types.SimpleNamespace(init=lambda **kwargs: sent.append(kwargs["mode"]) or run)
    monkeypatch.setitem(sys.modules, "wandb", stub)
    train(data_root, tmp_path, *short, "--exp_name", "a")
    assert sent == []
    record = train(data_root, tmp_path, *short, "--exp_name", "b", "--wandb", "offline")
    assert sent == ["offline", (record, 2), "end"]


@pytest.mark.parametrize("select_on, best", [("val", 2), ("test", 1)])
def test_best_is_chosen_on_held_out_training_clouds_or_as_released_on_the_test_set(
    data_root, tmp_path, short, monkeypatch, select_on, best
):
    scores = iter([(10.0, 90.0), (30.0, 1.0), (20.0, 50.0)])

    def scripted(self, encoder, *, device):
        val, test = next(scores)
        return {"demo_val_accuracy": val, "demo_test_accuracy": test}

    monkeypatch.setattr(LinearProbe, "__call__", scripted)
    train(data_root, tmp_path, *short, "--epochs", 3, "--eval_every", 1, "--select_on", select_on)
    folder = tmp_path / "crossnet"
    assert load_checkpoint(folder / "best.pth")["progress"]["epoch"] == best
    assert load_checkpoint(folder / "last.pth")["progress"]["epoch"] == 3
    assert [r["demo_test_accuracy"] for r in metrics(folder)] == [90, 1, 50]


@pytest.mark.parametrize("change, best", [((), 90), (("--svm_c", 1), 20), (("--eval_dataset", "modelnet40"), 20)])
def test_the_best_is_chosen_again_if_the_resumed_run_is_scored_otherwise(
    data_root, tmp_path, short, monkeypatch, change, best
):
    scores = iter([90.0, 20.0])

    def scripted(self, encoder, *, device):
        score = next(scores)
        return {f"{self.dataset}_{split}_accuracy": score for split in ("val", "test")}

    monkeypatch.setattr(LinearProbe, "__init__", lambda self, name, *_, **__: setattr(self, "dataset", name))
    monkeypatch.setattr(LinearProbe, "__call__", scripted)
    flags = (*short, "--epochs", 2, "--save_every", 1, "--eval_every", 1)
    train(data_root, tmp_path, *flags)
    folder = tmp_path / "crossnet"
    assert load_checkpoint(folder / "last.pth")["arguments"]["eval_dataset"] == ["demo"]  # what auto found
    os.replace(folder / "previous.pth", folder / "last.pth")
    scores = iter([20.0])
    train(data_root, tmp_path, *flags, "--resume", *change)
    assert load_checkpoint(folder / "best.pth")["progress"]["best"] == best


def test_the_probe_holds_out_training_clouds_of_every_class(data_root):
    probe = LinearProbe("demo", data_root, num_points=24)
    assert sorted([*probe.fit, *probe.held_out]) == list(range(30))
    assert torch.tensor(probe.train.labels[probe.held_out]).bincount().tolist() == [2, 2, 2]


def test_a_probe_with_few_clouds_holds_out_what_it_can(tmp_path):
    write_demo_set(tmp_path, train=3, test=1)
    probe = LinearProbe("demo", tmp_path, num_points=24)
    assert len(probe.held_out) == 2 and len(probe.fit) == 7


def test_training_starts_from_a_checkpoint_with_its_k_and_says_so(data_root, reference, tmp_path, short):
    argv = [
        a for a in arguments(data_root, tmp_path, *short, "--model_path", reference[0] / "last.pth", "--lr", "1e-12")
    ]
    for flag in ("--k", "--emb_dims"):
        del argv[argv.index(flag) : argv.index(flag) + 2]
    main(argv)
    payload = load_checkpoint(tmp_path / "crossnet" / "last.pth")
    assert payload["encoder"]["kwargs"] == {"k": 4, "emb_dims": 16} and payload["arguments"]["k"] == 4
    start = load_checkpoint(reference[0] / "last.pth")["point_encoder"]["conv1.0.weight"]
    torch.testing.assert_close(payload["point_encoder"]["conv1.0.weight"], start)
    says = f"starts from all {len(payload['point_encoder'])} tensors of {reference[0] / 'last.pth'}"
    assert says in (tmp_path / "crossnet" / "run.log").read_text(encoding="utf-8")


def test_unreadable_samples_are_skipped_and_counted_and_stop_the_run_when_many(data_root, tmp_path, caplog):
    training = object.__new__(Pretraining)
    progress, training.dataset = Progress(read=96), range(150)
    with caplog.at_level(logging.WARNING, "crossnet"):
        training.count_bad_samples({"index": [0] * 4, "bad": ["a.ply is broken"]}, progress)
    assert (progress.bad, progress.read) == (1, 100) and "skipped: a.ply is broken" in caplog.text
    with pytest.raises(UserError, match="2 of 104 samples could not be read, more than 1 %; the last one: b.ply"):
        training.count_bad_samples({"index": [0] * 4, "bad": ["b.ply is broken"]}, progress)
    progress = Progress(read=296, bad=2)
    training.count_bad_samples({"index": [0] * 4, "bad": ["b.ply is broken"]}, progress)


def test_clouds_of_uneven_size_train(tmp_path, monkeypatch):
    drawn = []

    def note(self, points, streams, counts=None):
        drawn.append(counts)
        return original(self, points, streams, counts)

    original = RandomSubset.__call__
    monkeypatch.setattr(RandomSubset, "__call__", note)
    for i, name in enumerate(write_pairs(tmp_path / "data", 8)):
        write_ply(cloud_path(tmp_path / "data", name), cloud(i, (70, 256, 64, 100, 30, 200, 64, 90)[i]))
    flags = ("--num_points", 64, "--epochs", 1, "--eval_every", 0, "--strict_data")
    train(tmp_path / "data", tmp_path, *flags)
    assert sorted(torch.cat(drawn[::2]).tolist()) == [30, 64, 64, 70, 70, 70, 70, 70]
    log = (tmp_path / "crossnet" / "run.log").read_text()
    assert "clouds of 30 to 256 points: 1 of 8 have fewer than 64, and their points repeat" in log
    with pytest.raises(UserError, match="--num_points 300 is more than the clouds of .* have: 256"):
        train(tmp_path / "data", tmp_path, *flags, "--overwrite", "--num_points", 300)


def test_saving_counts_neither_as_training_nor_as_waiting(data_root, tmp_path, short, monkeypatch):
    clock = [0.0]

    def passing(seconds, function):
        def call(*args, **kwargs):
            clock[0] += seconds
            return function(*args, **kwargs)

        return call

    monkeypatch.setattr(loop, "time", types.SimpleNamespace(perf_counter=lambda: clock[0]))
    monkeypatch.setattr(Run, "step", passing(3, Run.step))
    monkeypatch.setattr(loop, "save", passing(100, loop.save))
    monkeypatch.setattr(ShapeNetRender, "_read", passing(0.25, ShapeNetRender._read))
    record = train(data_root, tmp_path, *short, "--save_every", 1)
    assert record["shapes_per_s"] == pytest.approx(4 / 4) and record["data_wait"] == pytest.approx(1 / 4)


def test_every_flag_is_explained():
    parser = build_parser()
    text = parser.format_help()
    for action in parser._actions:
        assert action.help, action.dest
        if action.default not in (None, False, "==SUPPRESS==") and not isinstance(action.default, list):
            assert f"(default: {action.default})" in " ".join(text.split()), action.dest
    defaults = vars(parser.parse_args([]))
    released = {"batch_size": 32, "epochs": 250, "lr": 1e-3, "weight_decay": 1e-5, "temperature": None, "seed": 1}
    released |= {"model": "dgcnn_cls", "image_model": "resnet50", "image_size": 224, "objective": "con", "svm_c": 0.01}
    released |= {"momentum": 0.9, "use_sgd": False, "dropout": 0.5, "lr_schedule": "cosine", "wandb": "disabled"}
    assert {key: defaults[key] for key in released} == released


def test_released_widths_apply_from_scratch(data_root, tmp_path, short):
    argv = arguments(data_root, tmp_path, *short)
    for flag in ("--k", "--emb_dims"):
        del argv[argv.index(flag) : argv.index(flag) + 2]
    main(argv)
    kwargs = load_checkpoint(tmp_path / "crossnet" / "last.pth")["encoder"]["kwargs"]
    assert kwargs == {"k": 20, "emb_dims": 1024}


@pytest.mark.parametrize(("objective", "given", "used"), [("con", (), 0.2), ("ave", (), 0.1), ("ave", (0.5,), 0.5)])
def test_temperature_defaults_to_the_objectives_released_one(data_root, tmp_path, short, objective, given, used):
    main(
        arguments(data_root, tmp_path, *short, "--objective", objective, *(f"--temperature={value}" for value in given))
    )
    assert load_checkpoint(tmp_path / "crossnet" / "last.pth")["arguments"]["temperature"] == used


def test_a_broken_cloud_stops_a_small_run_with_its_name(tmp_path, short):
    write_pairs(tmp_path / "data", 8)
    broken = cloud_path(tmp_path / "data", ShapeNetRender(tmp_path / "data").ids[3])
    broken.write_text("ply\n")
    for more in ((), ("--strict_data",)):
        with pytest.raises(DataError if more else UserError, match=str(broken)):
            train(tmp_path / "data", tmp_path, "--epochs", 1, "--exp_name", f"run{len(more)}", *more)


def test_checkpoints_along_the_run_are_kept_once_and_change_nothing(data_root, reference, tmp_path, monkeypatch):
    flags = (*REFERENCE, "--keep_every", 3, "--exp_name", "kept")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(loop, "evaluate", lambda run: (_ for _ in ()).throw(KeyboardInterrupt))  # after step 4
        train(data_root, tmp_path, *flags)
    folder = tmp_path / "kept"
    first = load_checkpoint(folder / "step_3.pth")["point_encoder"]
    refused(data_root, tmp_path, "holds an earlier run", *flags)
    train(data_root, tmp_path, *flags, "--resume")  # from step 2, so that step 3 comes again
    same_end(folder, reference[0])
    steps = {path.name: load_checkpoint(path) for path in folder.glob("step_*.pth")}
    assert {name: payload["progress"]["step"] for name, payload in steps.items()} == {
        f"step_{n}.pth": n for n in (3, 6, 9, 12)
    }
    last = load_checkpoint(folder / "last.pth")
    assert equal(steps["step_12.pth"]["point_encoder"], last["point_encoder"])
    head = {f"point_head.{name}": value for name, value in steps["step_12.pth"]["point_head"].items()}
    assert head and all(torch.equal(value, last["heads_and_image_encoders"][name]) for name, value in head.items())
    assert equal(dict(encoder_from_checkpoint(folder / "step_3.pth").state_dict()), dict(first))
    refused(data_root, tmp_path, "not a pretraining checkpoint", *flags, "--resume", folder / "step_3.pth")
    train(data_root, tmp_path, "--epochs", 1, "--eval_every", 0, "--exp_name", "kept", "--overwrite")
    assert not list(folder.glob("step_*"))
