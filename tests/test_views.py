"""``--views``: several pictures of an object in the cross-modal term."""

import math

import pytest
import torch

from datasets.sampler import SampleKey
from datasets.shapenet_render import ShapeNetRender, collate_pairs
from datasets.streams import SampleStreams, Stream
from datasets.transforms import RenderAugmentation, RenderPixels
from engine.checkpoint import load_checkpoint
from models.losses import crossnet_objective, nt_xent
from tests.robustness.faults import equal, metrics
from tests.support.pairs import write_pairs
from tests.support.several import run_together
from tests.support.small_run import arguments
from train_crossnet_con import main

pytestmark = pytest.mark.usefixtures("small_runs")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Write 8 pairs with two to four pictures."""
    root = tmp_path_factory.mktemp("data")
    write_pairs(root, 8)
    return root


def test_views_are_distinct_as_far_as_there_are_and_begin_with_the_single_one(root):
    one, three = (ShapeNetRender(root, views=views, transform=lambda image: image) for views in (1, 3))
    seconds = set()
    for epoch in range(20):
        for i in range(8):
            count = len(one.source.view_names(i))
            chosen, (single,) = (
                [one.source.view_names(i)[v] for v in data._choose_views(SampleKey(epoch, i), 0.4, count)]
                for data in (three, one)
            )
            assert len(chosen) == 3 and chosen[0] == single and len(set(chosen)) == min(3, count)
            seconds.add((i, chosen[1]))
    assert len(seconds) == sum(len(one.source.view_names(i)) - 1 for i in range(8))  # each of the others comes
    sample = three[SampleKey(1, 5)]
    assert len(sample["pixels"]) == 3 and sample["pixels"][0] == one[SampleKey(1, 5)]["pixels"]


def test_the_first_of_several_pictures_is_the_one_of_a_single_picture(root):
    batches = [
        collate_pairs(ShapeNetRender(root, views=views, transform=RenderPixels(16)).__getitems__([0, 3, 5]))
        for views in (1, 2)
    ]
    assert batches[1]["pixels"].shape[:2] == (3, 2) and batches[1]["sizes"].shape == (3, 2, 2)
    one, two = (
        RenderAugmentation(16)(
            batch["pixels"],
            batch["sizes"],
            SampleStreams(seed=1, epoch=0, index=batch["index"], purpose=Stream.RENDERING),
        )
        for batch in batches
    )
    for name in ("rgb", "gray"):
        assert two[name].shape[:2] == (3, 2) and torch.equal(two[name][:, 0], one[name])
        assert not torch.equal(two[name][:, 1], one[name])


@pytest.mark.parametrize("objective", ["con", "ave"])
@pytest.mark.parametrize("modality", ["both", "rgb"])
def test_the_cross_term_is_the_mean_over_the_pictures(objective, modality):
    generator = torch.Generator().manual_seed(0)
    t1, t2 = torch.randn(2, 5, 8, generator=generator)
    rgb, gray = torch.randn(2, 5, 3, 8, generator=generator)  # 5 objects with 3 pictures
    given = {"rgb": rgb, "gray": gray if modality == "both" else None}
    losses = crossnet_objective((t1, t2), **given, objective=objective, alpha=0.5, temperature=0.3)
    terms = []
    for v in range(3):
        if objective == "con" and modality == "both":
            terms.append(nt_xent(torch.cat([t1, t2]), torch.cat([rgb[:, v], gray[:, v]]), temperature=0.3))
        else:
            pictures = [rgb[:, v], gray[:, v]] if modality == "both" else [rgb[:, v]]
            terms.append(sum(nt_xent((t1 + t2) / 2, picture, temperature=0.3) for picture in pictures))
    cross = sum(terms) / 3
    torch.testing.assert_close(losses.cross, cross)
    torch.testing.assert_close(losses.total, nt_xent(t1, t2, temperature=0.3) + 0.5 * cross)


SHORT = ("--epochs", 1, "--eval_every", 0, "--views", 2)


def weights(folder):
    return load_checkpoint(folder / "last.pth")["point_encoder"]


def test_several_pictures_train_in_chunks_and_memory_layouts(root, tmp_path):
    for name, flags in (
        ("plain", ()),
        ("chunk", ("--chunk_size", 4)),
        ("ave", ("--objective", "ave", "--image_modality", "gray", "--chunk_size", 2, "--amp", "bf16")),
        ("last", ("--channels_last", "--accumulate", 2, "--val_fraction", 0.25)),
        ("single", ("--views", 1)),
    ):
        record = train(root, tmp_path, *SHORT, *flags, "--batch_size", 2 if name == "last" else 4, "--exp_name", name)
        assert all(math.isfinite(value) for value in record.values())
    assert equal(weights(tmp_path / "plain"), weights(tmp_path / "chunk"))
    assert not equal(weights(tmp_path / "plain"), weights(tmp_path / "single"))


def train(root, out, *more):
    return main(arguments(root, out, *more))


def test_two_processes_give_the_losses_of_one(root, tmp_path):
    flags = (*SHORT, "--lr", 1e-30, "--batch_size")
    run_together(lambda: train(root, tmp_path, *flags, 2, "--exp_name", "two"), tmp_path / "logs")
    one = train(root, tmp_path, *flags, 4)
    assert metrics(tmp_path / "two")[-1]["loss"] == pytest.approx(one["loss"], rel=1e-5)
