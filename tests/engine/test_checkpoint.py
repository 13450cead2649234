import argparse
import errno
import logging
import math
import os
import pathlib
import pickle
import tracemalloc
import zipfile

import numpy as np
import pytest
import torch
from torch import nn

from engine.checkpoint import checkpoint_errors, load_checkpoint, save_checkpoint
from engine.load_model import describe_encoder, encoder_from_checkpoint, encoder_from_flags, load_strictly
from models import ENCODERS, PointEncoder, build_encoder
from tests.support.checkpoints import encoder_payload, save_encoder
from tests.support.comparing import equal
from tests.support.files import contents, cut
from utils.cli import check_writable
from utils.errors import CheckpointError, UserError

KWARGS = {
    "dgcnn_cls": {"k": 5, "emb_dims": 24},
    "dgcnn_partseg": {"k": 6, "emb_dims": 16},
    "dgcnn_semseg": {"k": 4, "emb_dims": 16, "in_channels": 9},
    "pointnet_cls": {"emb_dims": 24},
    "pointnet_partseg": {"emb_dims": 16},
}


@pytest.fixture(autouse=True)
def names_without_weights(monkeypatch):
    """Give the encoders that are built for the names of their tensors no weights, which take a second to fill."""

    def build(name, **kwargs):
        with torch.device("meta"):
            return build_encoder(name, **kwargs)

    monkeypatch.setattr("engine.published_weights.build_encoder", build)


def make(name, **kwargs):
    """Return an encoder whose batch norms have seen data."""
    encoder = build_encoder(name, **(KWARGS[name] | kwargs))
    for module in encoder.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.uniform_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return encoder


def same(a, b):
    x = torch.randn(2, a.in_channels, 12)
    outputs = (net.eval()(x).pooled for net in (a, b))
    return type(a) is type(b) and equal(a.state_dict(), b.state_dict()) and torch.equal(*outputs)


@pytest.mark.parametrize("name", ENCODERS)
def test_every_encoder_comes_back_without_any_flag(name, tmp_path):
    encoder = make(name)
    back = encoder_from_checkpoint(save_encoder(tmp_path / "new" / "a.pth", encoder, other=[1, "x", {"y": None}]))
    assert describe_encoder(back) == {"name": name, "kwargs": KWARGS[name]}
    assert back.training and same(encoder, back)
    assert torch.load(tmp_path / "new" / "a.pth", weights_only=True)["other"] == [1, "x", {"y": None}]


def block(prefix, conv, norm):
    """Names of a layer and its batch norm in a Sequential, as the field's heads have them."""
    state = nn.BatchNorm1d(norm).state_dict()
    return {f"{prefix}.0.weight": torch.randn(conv), **{f"{prefix}.1.{key}": value for key, value in state.items()}}


def norm(prefix, width):
    return {f"{prefix}.{key}": value for key, value in nn.BatchNorm1d(width).state_dict().items()}


def published(name):
    """Return a state dict as published: the encoder's names, batch norms registered twice, heads."""
    encoder = make(name)
    state = dict(encoder.state_dict())
    width = encoder.feature_dim
    if name.startswith("dgcnn"):
        for i in range(1, 6 if name == "dgcnn_cls" else 7):
            state |= {f"bn{i}.{k.split('.')[-1]}": v for k, v in state.items() if k.startswith(f"conv{i}.1.")}
    if name == "dgcnn_cls":  # WangYueFt/dgcnn, antao97/dgcnn.pytorch: classifier
        state |= {"linear1.weight": torch.randn(512, width), "linear2.weight": torch.randn(256, 512)}
        state |= {"linear2.bias": torch.randn(256), "linear3.weight": torch.randn(40, 256)}
        state |= {"linear3.bias": torch.zeros(40)} | norm("bn6", 512) | norm("bn7", 256)
    if name == "dgcnn_partseg":
        for i in (1, 2):
            state |= {
                f"transform_net.bn{i}.{k.split('.')[-1]}": v
                for k, v in state.items()
                if k.startswith(f"transform_net.conv{i}.1.")
            }
        state |= block("conv7", (64, 16, 1), 64) | block("conv8", (256, width + 256, 1), 256)
        state |= block("conv9", (256, 256, 1), 256) | block("conv10", (128, 256, 1), 128)
        state |= {"conv11.weight": torch.randn(50, 128, 1)}
        state |= norm("bn7", 64) | norm("bn8", 256) | norm("bn9", 256) | norm("bn10", 128)
    if name == "dgcnn_semseg":
        state |= block("conv7", (512, width + 192, 1), 512) | block("conv8", (256, 512, 1), 256)
        state |= {"conv9.weight": torch.randn(13, 256, 1)} | norm("bn7", 512) | norm("bn8", 256)
    if name == "pointnet_cls":
        state |= {"linear1.weight": torch.randn(512, width), "linear2.weight": torch.randn(40, 512)}
        state |= {"linear2.bias": torch.randn(40)} | norm("bn6", 512)
    if name == "pointnet_partseg":
        for i, (a, b) in enumerate(((256, 256), (256, 256), (128, 256), (50, 128)), 1):
            state |= {f"convs{i}.weight": torch.randn(a, b, 1), f"convs{i}.bias": torch.randn(a)}
        state |= norm("bns1", 256) | norm("bns2", 256) | norm("bns3", 128)
    head = nn.Sequential(nn.Linear(width, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 8))
    return encoder, state | {f"inv_head.{key}": value for key, value in head.state_dict().items()}


@pytest.mark.parametrize("form", ["bare", "module.", "state_dict", "model_state_dict"])
@pytest.mark.parametrize("name", ENCODERS)
def test_published_weights_open_with_model_and_k(name, form, tmp_path, caplog):
    encoder, state = published(name)
    if form == "module.":
        state = {f"module.{key}": value for key, value in state.items()}
    elif form != "bare":
        state = {form: state, "epoch": 3, "optimizer": {"lr": 0.1}}
    torch.save(state, tmp_path / "published.pth")
    k = KWARGS[name].get("k")
    with caplog.at_level(logging.INFO, "crossnet"):
        back = encoder_from_checkpoint(tmp_path / "published.pth", model=name, k=k)
    assert same(encoder, back) and describe_encoder(back)["kwargs"] == KWARGS[name]
    heads = [key for key in state if build_encoder(name).published_heads.match(key.removeprefix("module."))]
    if form in ("bare", "module."):
        assert f"published.pth: {len(heads)} tensors of heads are left out" in caplog.text
    if k:
        assert encoder_from_checkpoint(tmp_path / "published.pth", model=name).k == 20
        assert "--k 20 is used" in caplog.text
    caplog.clear()
    guessed = encoder_from_checkpoint(tmp_path / "published.pth", k=k)
    assert same(encoder, guessed) and describe_encoder(guessed)["kwargs"] == KWARGS[name]
    assert f"does not name its encoder; by its tensors it is a {name}" in caplog.text


WRAPPERS = {
    "torch.compile": (None, "_orig_mod."),
    "DataParallel of torch.compile": ("state_dict", "module._orig_mod."),
    "torch.compile of DataParallel": ("model_state_dict", "_orig_mod.module."),
    "an attribute": ("model", "model."),
    "a net": ("net", "net."),
    "an encoder": ("encoder", "encoder."),
    "a trainer": ("model_state", "module.encoder."),
    "Lightning": ("state_dict", "online.point_encoder."),
    "nested": ("checkpoint.model", ""),
}


@pytest.mark.parametrize("how", WRAPPERS)
@pytest.mark.parametrize("name", ["dgcnn_cls", "pointnet_partseg"])
def test_weights_are_found_in_any_entry_and_below_any_prefix(name, how, tmp_path, caplog):
    encoder, state = published(name)
    entry, prefix = WRAPPERS[how]
    state = {f"{prefix}{key}": value for key, value in state.items()}
    if prefix:
        state["image_encoder.conv1.weight"] = torch.ones(64, 3, 7, 7)  # of another network, left out
    for part in reversed(entry.split(".") if entry else []):
        state = {part: state, "epoch": 3, "args": argparse.Namespace(k=20), "best": np.float64(91.5)}
    torch.save(state, tmp_path / "other.pth")
    k = KWARGS[name].get("k")
    with caplog.at_level(logging.INFO, "crossnet"):
        assert same(encoder, encoder_from_checkpoint(tmp_path / "other.pth", k=k))
    assert "tensors of " in caplog.text and (not prefix or f"below {prefix!r} (1 others are left out)" in caplog.text)


def test_of_two_networks_the_usual_entry_is_taken_and_the_other_is_named(tmp_path, caplog):
    (encoder, state), (_, ema) = published("dgcnn_cls"), published("dgcnn_cls")
    torch.save({"ema": ema, "model": state}, tmp_path / "two.pth")
    with caplog.at_level(logging.INFO, "crossnet"):
        assert same(encoder, encoder_from_checkpoint(tmp_path / "two.pth", k=5))
    assert "the entry 'model'; weights in 'ema' are not used" in caplog.text


@pytest.mark.parametrize("form", ["zip", "legacy"])
def test_numbers_of_numpy_beside_the_weights_are_read(form, tmp_path):
    numbers = {
        "float": np.float64(1.5),
        "half": np.float16(0.25),
        "int": np.int32(-7),
        "bool": np.bool_(True),
        "complex": np.complex64(1 + 2j),
        "swapped": np.array([258], ">i4")[0],
    }
    content = {**numbers, "array": np.arange(3), "args": argparse.Namespace(x=1), "path": pathlib.Path("a")}
    torch.save({"model": content}, tmp_path / "a.pth", _use_new_zipfile_serialization=form == "zip")
    back = load_checkpoint(tmp_path / "a.pth")["model"]
    assert {key: back[key] for key in numbers} == {key: value.item() for key, value in numbers.items()}
    assert repr(back["array"]) == "<numpy.ndarray>" and repr(back["args"]) == "<argparse.Namespace>"
    assert "numpy._core.multiarray.scalar" not in str(torch.serialization.get_safe_globals())


@pytest.mark.parametrize(
    ("code", "data"), [("O", b"x" * 8), ("f8", b"x"), ("f8", "x" * 8), ("f8,f8", b"x" * 16), (3, b"")]
)
def test_numbers_of_numpy_that_are_none_are_refused(code, data, tmp_path):
    class Dtype:
        def __reduce__(self):
            return np.dtype, (code, False, True)

    class Scalar:
        def __reduce__(self):
            return np.float64(1).__reduce__()[0], (Dtype(), data)

    torch.save({"best": Scalar()}, tmp_path / "a.pth")
    refuse(tmp_path / "a.pth", "is damaged or not a checkpoint")


def test_what_cannot_be_loaded_says_what_it_holds_and_how_to_save_it(tmp_path):
    torch.save({"epoch": 3, "model": {"note": "none"}, "lr": 0.1}, tmp_path / "a.pth")
    refuse(tmp_path / "a.pth", r"it holds 'epoch' \(int\), 'model' \(dict\), 'lr' \(float\)")
    torch.save(make("pointnet_cls"), tmp_path / "whole.pth")
    refuse(
        tmp_path / "whole.pth", r"plain types \(models\.pointnet\.\w+\).*weights_only=False\)\.state_dict\(\), NEW_FILE"
    )
    torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)).save(tmp_path / "script.pth")
    refuse(tmp_path / "script.pth", r"TorchScript program.*torch\.jit\.load\(FILE\)\.state_dict\(\)")


def test_bare_weights_that_fit_no_encoder_exactly_are_not_guessed(tmp_path):
    for name in ENCODERS:
        _, state = published(name)
        missing = next(key for key in encoder_keys(name) if key.endswith("conv3.0.weight") or key == "conv3.weight")
        for wrong in ({missing: torch.zeros(())}, {missing: torch.zeros(7, 7)}, {"unknown.weight": torch.zeros(2)}):
            torch.save(state | wrong, tmp_path / "a.pth")
            refuse(tmp_path / "a.pth", "holds bare weights .* not exactly those of one encoder: .*--model")
        torch.save({key: value for key, value in state.items() if key != missing}, tmp_path / "a.pth")
        refuse(tmp_path / "a.pth", "--model")
        refuse(tmp_path / "a.pth", f"{missing}", model=name)  # as the message says


def encoder_keys(name):
    return build_encoder(name, emb_dims=8).state_dict()


def test_released_names_of_encoders_open_too(tmp_path):
    torch.save(published("dgcnn_partseg")[1], tmp_path / "a.pth")
    back = encoder_from_checkpoint(tmp_path / "a.pth", model="dgcnn_seg", k=6)
    assert describe_encoder(back)["name"] == "dgcnn_partseg"


def refuse(path, message, **kwargs):
    with pytest.raises(CheckpointError, match=message) as caught:
        encoder_from_checkpoint(path, **kwargs)
    text = str(caught.value)
    assert str(path) in text and "\n" not in text and len(text) < 500
    return text


def test_another_model_is_an_error(tmp_path):
    path = save_encoder(tmp_path / "a.pth", make("pointnet_cls"))
    refuse(path, "holds a pointnet_cls, not the dgcnn_cls", model="dgcnn_cls")
    torch.save(published("dgcnn_cls")[1], tmp_path / "b.pth")
    refuse(tmp_path / "b.pth", "does not fit the encoder dgcnn_semseg: tensors .*conv6.0.weight", model="dgcnn_semseg")
    refuse(tmp_path / "b.pth", "does not fit the encoder pointnet_cls: tensors .*conv1.weight", model="pointnet_cls")


def test_tensors_that_do_not_fit_are_named(tmp_path):
    state = published("dgcnn_cls")[1]
    cases = {
        "missing: conv3.1.running_mean": {k: v for k, v in state.items() if k != "conv3.1.running_mean"},
        "unknown: surprise": state | {"surprise": torch.zeros(1)},
        r"conv2.0.weight is \(64, 128, 1\), not \(64, 128, 1, 1\)": state
        | {"conv2.0.weight": state["conv2.0.weight"].squeeze(3)},
    }
    for message, changed in cases.items():
        torch.save(changed, tmp_path / "a.pth")
        refuse(tmp_path / "a.pth", message, model="dgcnn_cls", k=5)
    encoder = make("dgcnn_cls")
    broken = {key: value for key, value in encoder.state_dict().items() if not key.startswith("conv5")}
    save_checkpoint(tmp_path / "b.pth", encoder_payload(encoder, point_encoder=broken))
    refuse(tmp_path / "b.pth", r"tensors 6 missing: conv5.0.weight, conv5.1.weight, conv5.1.bias \.\.\.")
    with pytest.raises(CheckpointError, match="x.pth does not fit a layer: tensors 1 missing: bias"):
        load_strictly(nn.Linear(2, 2), {"weight": torch.zeros(2, 2)}, path="x.pth", what="a layer")


def test_k_of_the_checkpoint_is_the_default_and_another_is_used_with_a_warning(tmp_path, caplog):
    path = save_encoder(tmp_path / "a.pth", make("dgcnn_cls"))
    assert encoder_from_checkpoint(path).k == encoder_from_checkpoint(path, k=5).k == 5
    assert caplog.text == ""
    assert encoder_from_checkpoint(path, k=9).k == 9
    assert "was trained with k = 5; --k 9" in caplog.text
    refuse(path, "embedding of 24, not --emb_dims 32", emb_dims=32)
    assert encoder_from_checkpoint(path, emb_dims=24).emb_dims == 24


@pytest.mark.parametrize(
    "change, message",
    [
        ({"format": 2}, "checkpoint format 2; this version reads 1"),
        ({"format": None}, "checkpoint format None"),
        ({"encoder": {"name": "point_mamba", "kwargs": {}}}, "describes an encoder that this version does not have"),
        ({"encoder": {"name": "pointnet_cls", "kwargs": {"depth": 3}}}, "describes an encoder .*depth"),
        ({"encoder": {"name": "dgcnn_cls", "kwargs": {"emb_dims": 24}}}, "describes an encoder .*lacks the setting k"),
    ],
)
def test_checkpoints_of_other_versions_are_refused(change, message, tmp_path):
    encoder = make("dgcnn_cls")
    torch.save(encoder_payload(encoder, format=1) | change, tmp_path / "a.pth")
    refuse(tmp_path / "a.pth", message)


def flip(path):
    data = bytearray(path.read_bytes())
    data[data.index(bytes(4000)) + 100] = 1
    path.write_bytes(data)


DAMAGE = {
    "truncated": cut,
    "flipped": flip,
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_bytes(b"hello world\n"),
}


@pytest.mark.parametrize("how", DAMAGE)
def test_damaged_files_are_refused(how, tmp_path):
    path = tmp_path / "a.pth"
    save_encoder(path, make("pointnet_cls"), zeros=torch.zeros(1000))
    DAMAGE[how](path)
    refuse(path, "a.pth is damaged")


def test_what_is_no_checkpoint_is_refused(tmp_path):
    refuse(tmp_path / "absent.pth", "does not exist")
    refuse(tmp_path, "is a folder; give the checkpoint in it")
    torch.save([torch.zeros(1)], tmp_path / "list.pth")
    refuse(tmp_path / "list.pth", "holds a list")
    for content in ({}, {"a": 1}, {"state_dict": {"a": "b"}}):
        torch.save(content, tmp_path / "dict.pth")
        refuse(tmp_path / "dict.pth", "neither one of our checkpoints nor a state dict", model="dgcnn_cls")
    with zipfile.ZipFile(tmp_path / "zip.pth", "w") as archive:
        archive.writestr("data", "x")
    refuse(tmp_path / "zip.pth", "is damaged or not a checkpoint")


class Bomb:
    """Runs a command when it is unpickled without care."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
def test_code_in_a_checkpoint_is_refused_and_never_run(form, tmp_path):
    content = {"point_encoder": {}, "encoder": Bomb(tmp_path / "ran")}
    if form == "pickle":
        (tmp_path / "bomb.pth").write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, tmp_path / "bomb.pth", _use_new_zipfile_serialization=form == "zip")
    refuse(tmp_path / "bomb.pth", "is refused.*could run code")
    assert not (tmp_path / "ran").exists()
    torch.save(make("pointnet_cls"), tmp_path / "module.pth")
    refuse(tmp_path / "module.pth", "is refused", model="pointnet_cls")


def full_disk(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("fails", ["write", "fsync", "replace", "torch.save"])
def test_a_failing_write_leaves_the_old_checkpoint(fails, tmp_path, monkeypatch):
    path = save_encoder(tmp_path / "a.pth", make("pointnet_cls"))
    before = contents(tmp_path)
    if fails == "write":
        (tmp_path / "a.pth.tmp").symlink_to("/dev/full")
    elif fails == "torch.save":
        monkeypatch.setattr(torch, "save", lambda *args: (_ for _ in ()).throw(RuntimeError("unexpected pos 64")))
    else:
        monkeypatch.setattr(os, fails, full_disk)
    with pytest.raises(UserError, match="cannot write the checkpoint .*a.pth .*an earlier one is unchanged") as caught:
        save_checkpoint(path, {"x": torch.zeros(10)})
    assert ("is the disk full?" in str(caught.value)) == (fails == "torch.save")
    monkeypatch.undo()
    assert contents(tmp_path) == before and load_checkpoint(path)["encoder"]["name"] == "pointnet_cls"


def version(path):
    return load_checkpoint(path)["version"]


@pytest.mark.parametrize("links", [True, False])
def test_the_checkpoint_before_the_last_is_kept(links, tmp_path, monkeypatch):
    last, previous = tmp_path / "last.pth", tmp_path / "previous.pth"
    if not links:  # as on some network and memory-card file systems
        monkeypatch.setattr(os, "link", lambda *args: (_ for _ in ()).throw(OSError(errno.EPERM, "not permitted")))
    for number in range(3):
        save_checkpoint(last, {"version": number}, keep=previous)
        assert version(last) == number and (not number or version(previous) == number - 1)


@pytest.mark.parametrize("links", [True, False])
def test_a_file_that_cannot_be_replaced_stays_the_last(links, tmp_path, monkeypatch):
    last, previous = tmp_path / "last.pth", tmp_path / "previous.pth"
    if not links:
        monkeypatch.setattr(os, "link", lambda *args: (_ for _ in ()).throw(OSError(errno.EPERM, "not permitted")))
    for number in range(2):
        save_checkpoint(last, {"version": number}, keep=previous)
    replace = os.replace

    def fails(source, target):
        if str(source).endswith("last.pth.tmp"):
            raise OSError(errno.EIO, "input/output error")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(UserError, match="an earlier one is unchanged"):
        save_checkpoint(last, {"version": 2}, keep=previous)
    assert version(last) == 1 and not list(tmp_path.glob("*.tmp"))


def test_a_checkpoint_that_is_kept_already_is_kept_still(tmp_path):
    last, previous = tmp_path / "last.pth", tmp_path / "previous.pth"
    save_checkpoint(last, {"version": 0})
    os.link(last, previous)  # a process was killed between the two replacements
    save_checkpoint(last, {"version": 1}, keep=previous)
    assert (version(last), version(previous)) == (1, 0)
    assert {path.name for path in tmp_path.iterdir()} == {"last.pth", "previous.pth"}


def test_unwritable_folders_are_one_clear_error(tmp_path):
    (tmp_path / "file").write_text("a file, no folder")
    for folder in (tmp_path / "file", tmp_path / "file" / "deeper"):
        with pytest.raises(UserError, match="cannot write the checkpoint"):
            save_checkpoint(folder / "a.pth", {})
        with pytest.raises(UserError, match=f"cannot write to {folder}"):
            check_writable(folder)
    check_writable(tmp_path / "new" / "folder")
    assert contents(tmp_path / "new") == {"folder": None}


def test_a_compressed_checkpoint_is_refused_before_it_is_unpacked(tmp_path):
    path = save_encoder(tmp_path / "a.pth", make("pointnet_cls"))
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as bomb:
        for name in old.namelist():
            bomb.writestr(name, old.read(name) + (bytes(10 << 20) if name.endswith("data/0") else b""))
    refuse(tmp_path / "bomb.pth", "its members are compressed")


def test_a_length_that_an_older_file_claims_takes_no_memory(tmp_path):
    path = tmp_path / "older.pth"
    path.write_bytes(b"\x80\x02X" + (2**31 - 1).to_bytes(4, "little") + b"text")  # a text of 2 GB
    tracemalloc.start()
    with pytest.raises(CheckpointError, match="older.pth is damaged or not a checkpoint"):
        load_checkpoint(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10 << 20


@pytest.mark.parametrize(
    "tensor",
    [torch.zeros(1).expand(10**12), torch.zeros(3).to_sparse(), torch.zeros(3, device="meta")],
    ids=["expanded", "sparse", "meta"],
)
def test_tensors_whose_values_are_not_stored_are_refused(tensor, tmp_path):
    encoder = make("pointnet_cls")
    save_encoder(tmp_path / "a.pth", encoder, other={"deep": [tensor]})
    refuse(tmp_path / "a.pth", "a.pth is damaged or not a checkpoint .a tensor in it")


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"emb_dims": 10**9}, "tensors .*of another shape: conv5.weight"),
        ({"emb_dims": 10**18}, "settings of the wrong type or size"),
        ({"emb_dims": 24.0}, "settings of the wrong type or size"),
        ({"emb_dims": None}, "settings of the wrong type or size"),
    ],
)
def test_sizes_that_the_weights_do_not_have_take_no_memory(kwargs, message, tmp_path):
    state = make("pointnet_cls").state_dict()
    payload = {"encoder": {"name": "pointnet_cls", "kwargs": kwargs}, "point_encoder": state}
    save_checkpoint(tmp_path / "a.pth", payload)
    refuse(tmp_path / "a.pth", message)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_or_of_another_type_are_named(value, tmp_path):
    encoder = make("pointnet_cls")
    state = encoder.state_dict()
    state["conv2.weight"][3] = value
    save_checkpoint(tmp_path / "a.pth", encoder_payload(encoder, point_encoder=state))
    refuse(tmp_path / "a.pth", "tensors 1 not finite: conv2.weight")
    state["conv2.weight"] = torch.zeros_like(state["conv2.weight"], dtype=torch.complex64)
    state["bn1.num_batches_tracked"] = torch.tensor(1.5)
    save_checkpoint(tmp_path / "a.pth", encoder_payload(encoder, point_encoder=state))
    refuse(tmp_path / "a.pth", "2 of another type: .*conv2.weight is torch.complex64")


def test_entries_that_are_missing_or_of_another_kind_are_one_error(tmp_path):
    encoder = make("pointnet_cls")
    good = encoder_payload(encoder)
    for change in ({"encoder": 3}, {"encoder": {"name": "pointnet_cls"}}, {"point_encoder": [1]}, {"encoder": {}}):
        save_checkpoint(tmp_path / "a.pth", good | change)
        refuse(tmp_path / "a.pth", "does not hold what this version writes")


def test_a_mistake_of_the_program_is_not_taken_for_a_damaged_checkpoint():
    with (
        pytest.raises(CheckpointError, match="a.pth does not hold what this version writes"),
        checkpoint_errors("a.pth"),
    ):
        _ = [].items()  # a payload with a list where a mapping belongs
    with pytest.raises(AttributeError), checkpoint_errors("a.pth"):
        _ = nn.Linear(1, 1).no_such_name


class OfPlainTypes(PointEncoder):
    """An encoder whose settings have every type that a checkpoint keeps."""

    def __init__(self, *, wide: bool = True, widths: tuple[int, ...] = (4, 8), slope: float = 0.2, kind: str = "a"):
        super().__init__()
        self.wide, self.widths, self.slope, self.kind = wide, tuple(widths), slope, kind
        self.emb_dims = self.feature_dim = self.local_dim = self.widths[-1]
        self.conv = nn.Linear(3, self.feature_dim)

    def pooled_and_layers(self, points):
        rows = self.conv(points.flatten(0, 1))
        return rows.unflatten(0, points.shape[:2]).amax(1), [rows]


def test_an_encoder_with_settings_of_any_plain_type_is_rebuilt(tmp_path, monkeypatch):
    monkeypatch.setitem(ENCODERS, "plain", OfPlainTypes)
    encoder = OfPlainTypes(wide=False, widths=(2, 6), slope=0.5, kind="b")
    payload = encoder_payload(encoder)
    save_checkpoint(tmp_path / "a.pth", payload)
    back = encoder_from_checkpoint(tmp_path / "a.pth")
    assert back.config() == encoder.config() == {"wide": False, "widths": (2, 6), "slope": 0.5, "kind": "b"}
    features = back(torch.randn(2, 3, 5))
    assert features.pooled.shape == (2, 6) and features.local.shape == (2, 6, 5)
    payload["encoder"]["kwargs"]["kind"] = {"a": 1}
    save_checkpoint(tmp_path / "b.pth", payload)
    with pytest.raises(CheckpointError, match="wrong type or size"):
        encoder_from_checkpoint(tmp_path / "b.pth")


def test_flags_that_an_encoder_does_not_have_are_refused():
    assert encoder_from_flags("dgcnn_seg", k=3, emb_dims=8).config() == {"k": 3, "emb_dims": 8}
    with pytest.raises(UserError, match="--k: pointnet_cls has no such setting"):
        encoder_from_flags("pointnet_cls", k=3)
