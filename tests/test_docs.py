"""What the pages show works: their Python, and the files and links that they name."""

import argparse
import importlib
import os
import re
import shlex
import subprocess

import numpy as np
import pytest
import torch
from PIL import Image

from datasets.pair_sources import open_source
from docs import make_figure
from engine.load_model import encoder_from_checkpoint
from models import ENCODERS, CrossNet, build_encoder, pretrained
from tests.support.checkpoints import save_encoder
from tests.support.paths import ROOT
from tests.support.weights import publish_tiny
from utils.errors import UserError

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "data/README.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES += sorted((ROOT / "weights").glob("*.md"))
BY_NAME = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def python_blocks(page):
    return re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)


@pytest.mark.parametrize("page", ["README.md", "docs/weights.md"])
def test_an_encoder_loads_as_the_page_says(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pretrained, "WEIGHTS", tmp_path)
    publish_tiny(tmp_path, ["dgcnn_cls"])
    save_encoder(tmp_path / "checkpoints/crossnet/last.pth", build_encoder("dgcnn_cls", k=4, emb_dims=16))
    names = {"clouds": torch.randn(2, 3, 32)}
    exec(python_blocks(ROOT / page)[0], names)
    assert names["features"].pooled.shape == (2, 32) and names["features"].local.shape == (2, 512, 32)


def test_features_of_arrays_are_those_of_the_page(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    encoder = build_encoder("dgcnn_cls", k=4, emb_dims=16)
    save_encoder(tmp_path / "checkpoints/crossnet/last.pth", encoder)
    names = {"clouds": [5 + 3 * cloud for cloud in np.random.default_rng(0).normal(size=(2, 32, 3))]}
    exec(python_blocks(ROOT / "docs/evaluation.md")[0], names)
    assert np.linalg.norm(names["points"], axis=2).max(1) == pytest.approx(1)
    assert names["features"].shape == (2, 32)


def test_a_clone_finds_neighbors_of_meshes_as_the_page_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pretrained, "WEIGHTS", tmp_path)
    publish_tiny(tmp_path, ["dgcnn_cls"])
    names = {}
    exec(python_blocks(ROOT / "docs/weights.md")[1], names)
    assert names["features"].shape == (3, 32) and names["neighbor"].shape == (3,)


def test_the_encoder_of_the_page_trains_saves_and_loads(tmp_path):
    (block,) = python_blocks(ROOT / "docs/extending.md")
    try:
        exec(block, {})
        encoder = build_encoder("mean_net", emb_dims=8, width=4)
        model = CrossNet(encoder, image_model="resnet18")
        views, pictures = torch.randn(2, 2, 3, 16), torch.rand(2, 3, 32, 32)
        assert encoder(views[0]).local.shape == (2, 4, 16)
        model(*views, rgb=pictures, gray=pictures[:, :1]).total.backward()
        assert encoder.embed.weight.grad.abs().sum() > 0
        save_encoder(tmp_path / "run/last.pth", encoder)
        again = encoder_from_checkpoint(tmp_path / "run/last.pth")
        assert again.config() == {"emb_dims": 8, "width": 4}
        assert torch.equal(again.hidden.weight, encoder.hidden.weight)
    finally:
        ENCODERS.pop("mean_net", None)


@pytest.mark.parametrize(("last_line", "again"), [("stopped by SIGTERM at step 7", True), ("error: no pairs", False)])
def test_the_job_script_gives_tasks_their_cores_and_submits_itself_again_after_sigterm(tmp_path, last_line, again):
    """Stand-ins for Slurm's commands write down what they are asked."""
    log, folder = tmp_path / "checkpoints/crossnet/run.log", tmp_path / "bin"
    log.parent.mkdir(parents=True)
    folder.mkdir()
    stand_ins = {
        "scontrol": "echo node1; echo node2",
        "srun": f'echo "$@" >asked; echo "{last_line}" >>{log}; touch -t 203801010000 {log}; exit 1',
        "sbatch": "touch submitted",
    }
    for name, text in stand_ins.items():
        (folder / name).write_text(f"#!/bin/bash\n{text}\n", encoding="utf-8")
        (folder / name).chmod(0o755)
    slurm = {"SUBMIT_DIR": tmp_path, "JOB_NODELIST": "node[1-2]", "NNODES": 2, "JOB_ID": 1, "CPUS_PER_TASK": 32}
    environment = {f"SLURM_{name}": str(value) for name, value in slurm.items()}
    environment["PATH"] = f"{folder}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(["bash", str(ROOT / "docs/slurm.sh")], env={**os.environ, **environment}, check=False)
    asked = (tmp_path / "asked").read_text(encoding="utf-8")
    assert done.returncode == 1
    assert "--cpus-per-task=32" in asked and "--rdzv_endpoint=node1:29500" in asked and "--resume" in asked
    assert (tmp_path / "submitted").exists() is again


class Parsed(Exception):
    """The command line is right; the script goes no further."""


def commands(page):
    """Yield module and arguments of the commands in a page's blocks, without those with shell variables."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    for block in (text for language, text in blocks if not language):
        lines = re.sub(r"\\\n\s*", "", block).splitlines()
        for line in (line for line in lines if re.search(r"\b(python|torchrun) ", line)):
            words = shlex.split(line, comments=True)
            while words and re.match(r"[A-Z_]+=|(\.venv/bin/)?python$", words[0]):
                del words[0]
            if words[:1] == ["torchrun"]:
                words = words[next(i for i, word in enumerate(words) if word.endswith(".py")) :]
            if "$" in line or not words or words[:2] == ["-m", "pytest"]:
                continue
            if words[0] == "-m":
                yield words[1], words[2:]
            elif words[0].endswith(".py"):
                yield words[0].removesuffix(".py").replace("/", "."), words[1:]


@BY_NAME
def test_commands_have_flags_and_values_that_their_scripts_take(page, monkeypatch):
    parse_known = argparse.ArgumentParser.parse_known_args

    def parse(self, args=None, namespace=None):
        _, rest = parse_known(self, args, namespace)
        raise Parsed if not rest else AssertionError(f"unknown: {rest}")

    def fail(self, message):
        raise AssertionError(message)

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)
    monkeypatch.setattr(argparse.ArgumentParser, "error", fail)
    for module, words in commands(page):
        script = importlib.import_module("engine.checkpoint.__main__" if module == "engine.checkpoint" else module)
        try:
            script.main(words)
        except Parsed:
            continue
        except AssertionError as error:
            raise AssertionError(f"{page.name}: {module} {' '.join(words)}: {error}") from None
        raise AssertionError(f"{page.name}: {module} does not parse its command line")


@BY_NAME
def test_links_lead_to_files(page):
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8")):
        if not target.startswith(("http:", "https:", "mailto:")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}, which is not there"


def test_the_figure_of_the_method_is_drawn_from_any_pairs(data_root, tmp_path):
    shape = open_source(data_root).ids[0]
    words = ["--data_root", str(data_root), "--model", shape, "--out"]
    make_figure.main([*words, str(tmp_path / "figure.jpg")])
    with Image.open(tmp_path / "figure.jpg") as picture:
        assert picture.format == "JPEG" and picture.width > 2000 and len(picture.getcolors(1 << 24)) > 1000
    with pytest.raises(UserError, match="figure.xyz: the name must end in one of"):
        make_figure.main([*words, str(tmp_path / "figure.xyz")])
    with pytest.raises(UserError, match="contains no model nothing"):
        make_figure.main(["--data_root", str(data_root), "--model", "nothing", "--out", str(tmp_path / "other.png")])
    assert [path.name for path in tmp_path.iterdir()] == ["figure.jpg"]


def test_every_page_names_all_pages_in_the_order_of_the_readme():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (order,) = re.findall(r"Documentation, in reading order: (.*?\))\.", readme, flags=re.DOTALL)
    pages = dict(re.findall(r"\[([^]]+)\]\(docs/([^)]+)\)", order))
    assert sorted(pages.values()) == [path.name for path in sorted((ROOT / "docs").glob("*.md"))]
    places = {"CONTRIBUTING.md": ("", "docs/"), "data/README.md": ("../", "../docs/")}
    for page, (root, docs) in (places | {f"docs/{name}": ("../", "") for name in pages.values()}).items():
        links = (
            f"**{title}**" if page == f"docs/{name}" else f"[{title}]({docs}{name})" for title, name in pages.items()
        )
        expected = f"Documentation: [quick start]({root}README.md), {', '.join(links)}."
        assert expected in (ROOT / page).read_text(encoding="utf-8").splitlines(), page


@BY_NAME
def test_modules_and_scripts_that_are_named_exist(page):
    text = page.read_text(encoding="utf-8")
    for name in re.findall(r"python -m ((?:benchmarks|data|datasets|downstream|engine|tests)(?:\.\w+)+)", text):
        files = [ROOT / f"{name.replace('.', '/')}{end}" for end in (".py", "/__main__.py")]
        assert any(path.exists() for path in files), f"{page.name} names python -m {name}"
    for name in re.findall(r"\b((?:benchmarks|data|datasets|downstream|engine|models|tests|utils)/[\w/]+\.py)\b", text):
        assert (ROOT / name).exists(), f"{page.name} names {name}"
