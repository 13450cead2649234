"""The command that exports an encoder: what it writes computes the same, for any number of clouds and points."""

import json

import pytest
import torch
from torch import nn

from engine import export
from engine.checkpoint.__main__ import main
from engine.load_model import encoder_from_checkpoint
from models.ops.knn import knn
from tests.support.weights import TINY, save_pretraining, tiny_encoder
from utils.errors import UserError

onnxruntime = pytest.importorskip("onnxruntime")
NEEDS_PROGRAMS = pytest.mark.skipif(not hasattr(torch.compiler, "is_exporting"), reason="PyTorch before 2.7")
SIZES = [(1, 4), (2, 30), (3, 77)]


def run_command(tmp_path, name, form, *more):
    source = save_pretraining(tmp_path / "source.pth", tiny_encoder(name))
    out = tmp_path / f"encoder{export.FORMATS[form]}"
    return out, main(["export", str(source), "--format", form, "--out", str(out), *more])


def check_program(run, encoder):
    for clouds, points in SIZES:
        x = torch.randn(clouds, 3, points)
        for found, expected in zip(run(x), encoder(x), strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_safetensors_in_float16_keep_what_is_known_and_nothing_else(tmp_path):
    out, found = run_command(tmp_path, "dgcnn_cls", "safetensors", "--half", "--json", str(tmp_path / "found.json"))
    assert json.loads((tmp_path / "found.json").read_text()) == found
    assert {key: found[key] for key in ("kind", "epoch", "step", "git_commit")} == {
        **{"kind": "point-encoder", "epoch": 3, "step": 120, "git_commit": "abc"}
    }
    assert found["bytes"] == out.stat().st_size and b"/private" not in out.read_bytes()
    assert encoder_from_checkpoint(out).config() == TINY["dgcnn_cls"]
    again = main(["export", str(out), "--format", "safetensors", "--out", str(tmp_path / "full.safetensors")])
    assert again["difference"]["largest"] == 0 and again["step"] == 120


@NEEDS_PROGRAMS
def test_a_torch_program_computes_the_same_on_other_sizes(tmp_path):
    out, found = run_command(tmp_path, "pointnet_cls", "torch_export")
    assert found["difference"]["largest"] < 1e-4
    files = {"crossnet.json": ""}
    check_program(torch.export.load(out, extra_files=files).module(), tiny_encoder("pointnet_cls").eval())
    assert json.loads(files["crossnet.json"])["encoder"]["kwargs"] == TINY["pointnet_cls"]


@NEEDS_PROGRAMS
@pytest.mark.parametrize("name", ["dgcnn_cls", "dgcnn_partseg", "dgcnn_semseg", "pointnet_cls"])
def test_an_onnx_program_computes_the_same_on_other_sizes(name, tmp_path):
    onnx = pytest.importorskip("onnx")
    out, found = run_command(tmp_path, name, "onnx")
    assert found["difference"]["largest"] < 1e-4
    program = onnx.load(out)
    assert {node.domain for node in program.graph.node} == {""} and not program.functions  # no custom operator
    assert [(entry.domain, entry.version) for entry in program.opset_import] == [("", export.OPSET)]
    session = onnxruntime.InferenceSession(str(out), providers=["CPUExecutionProvider"])
    assert session.get_inputs()[0].shape == ["clouds", 3, "points"]
    assert json.loads(session.get_modelmeta().custom_metadata_map["crossnet"])["encoder"]["name"] == name
    run = lambda x: map(torch.from_numpy, session.run(["pooled", "local"], {"points": x.numpy()}))  # noqa: E731
    check_program(run, tiny_encoder(name).eval())


class Neighbors(nn.Module):
    def forward(self, points):
        return knn(points, 5)


@NEEDS_PROGRAMS
def test_an_onnx_program_finds_the_same_neighbors_but_for_ties(tmp_path):
    pytest.importorskip("onnxscript")
    free = ({0: torch.export.Dim("clouds"), 1: torch.export.Dim("points", min=5)},)
    with torch.no_grad():
        program = torch.onnx.export(
            *(Neighbors().eval(), (torch.randn(2, 20, 3),)), dynamo=True, dynamic_shapes=free, input_names=["points"]
        )
    program.save(tmp_path / "knn.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "knn.onnx"), providers=["CPUExecutionProvider"])
    grid = torch.cartesian_prod(*[torch.arange(4.0)] * 3)[None]  # full of equal distances
    for points in (torch.randn(1, 6, 3), torch.randn(3, 200, 3), grid):
        (index,) = session.run(None, {"points": points.numpy()})
        distances = torch.cdist(points.double(), points.double())
        found, expected = (distances.gather(2, i).sort(2).values for i in (torch.from_numpy(index), knn(points, 5)))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_what_cannot_be_exported_is_told(tmp_path, monkeypatch, capsys):
    with pytest.raises(UserError, match="a file of --format onnx ends in .onnx"):
        main(["export", "a.pth", "--format", "onnx", "--out", str(tmp_path / "a.pt2")])
    (tmp_path / "a.onnx").touch()
    with pytest.raises(UserError, match=r"a.onnx exists; choose another --out, or --overwrite"):
        main(["export", "a.pth", "--format", "onnx", "--out", str(tmp_path / "a.onnx")])
    with pytest.raises(UserError, match="--half rounds weights in --format safetensors only"):
        run_command(tmp_path, "pointnet_cls", "torch_export", "--half")
    encoder = tiny_encoder("pointnet_cls")
    with torch.no_grad():
        encoder.conv1.weight[0] = 1e6
    source = str(save_pretraining(tmp_path / "large.pth", encoder))
    with pytest.raises(UserError, match="weights are too large for float16 .conv1.weight"):
        main(["export", source, "--format", "safetensors", "--half", "--out", str(tmp_path / "large.safetensors")])
    monkeypatch.setattr(export, "_optional", lambda package: None)
    why = "pip install onnx onnxscript" if hasattr(torch.compiler, "is_exporting") else "needs PyTorch 2.7 or newer"
    with pytest.raises(UserError, match=why):
        run_command(tmp_path, "pointnet_cls", "onnx")
