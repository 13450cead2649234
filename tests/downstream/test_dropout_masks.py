"""Dropout masks of real fine-tuning steps, for every task and encoder: independent of one another, and repeatable."""

import itertools

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import Dataset

from datasets.sampler import SampleKey
from downstream import finetuning
from engine.run_folder import RunFolder
from engine.task import Run
from models import build_encoder
from models.task_heads import TASKS

SAMPLES = 4
SIZES = {
    "part segmentation": {"num_categories": 3, "num_parts": 7},
    "semantic segmentation": {"num_classes": 7},
    "classification": {"num_classes": 7},
}
CALLS = {  # dropouts in a forward pass, as published
    "part segmentation": {"dgcnn_partseg": 2, "pointnet_partseg": 0},
    "semantic segmentation": {"dgcnn_semseg": 1},
    "classification": {"dgcnn_cls": 2, "pointnet_cls": 1},
}
CASES = [(task, name, calls) for task, names in CALLS.items() for name, calls in names.items()]


class Noise(Dataset):
    """Clouds of no meaning, with the inputs and targets of a task."""

    def __init__(self, task):
        self.task, self.points = task, torch.randn(SAMPLES, 16, 3, generator=torch.Generator().manual_seed(0))

    def __len__(self):
        return SAMPLES

    def __getitem__(self, index):
        target = index % 7 if self.task == "classification" else torch.arange(16) % 7
        category = [index % 3] if self.task == "part segmentation" else []
        return self.points[index], *category, target


def fine_tuning(tmp_path, task, name):
    arguments = ["--output_dir", str(tmp_path), "--batch_size", str(SAMPLES), "--workers", "0", "--device", "cpu"]
    config = finetuning.FineTuneConfig.from_flags(finetuning.FineTuneConfig.parser(None).parse_args(arguments))
    torch.manual_seed(0)
    encoder = build_encoder(name, emb_dims=8, **({"k": 4} if name.startswith("dgcnn") else {}))
    tuning = finetuning.FineTuning(
        config,
        model=TASKS[task](encoder, **SIZES[task]),
        dataset=Noise(task),
        chosen=np.arange(SAMPLES),
        validate=None,
        score="",
        table={},
        identity="",
    )
    return Run(tuning, RunFolder(tmp_path / "a", overwrite=True))


def masks_of_a_step(tuning, *, epoch, order):
    """(call, sample) -> (n,) which entries a real step drops, for every call of every dropout of the model."""
    masks, calls = {}, itertools.count()

    def feed_ones(module, inputs):
        return (inputs[0] * 0 + 1,)

    def keep(module, inputs, output):
        call = next(calls)
        for sample, part in zip(order, output.chunk(SAMPLES), strict=True):
            masks[call, sample] = (part == 0).flatten()

    dropouts = [module for module in tuning.task.model.modules() if isinstance(module, nn.Dropout)]
    hooks = [m.register_forward_pre_hook(feed_ones) for m in dropouts]
    hooks += [m.register_forward_hook(keep) for m in dropouts]
    batch = [tuning.task.dataset[SampleKey(epoch, sample)] for sample in order]
    tuning.progress.epoch = epoch
    tuning.step([torch.stack([torch.as_tensor(value) for value in values]) for values in zip(*batch, strict=True)])
    for hook in hooks:
        hook.remove()
    return masks


def test_every_task_and_encoder_is_covered():
    heads = {(kind, encoder) for kind, task in TASKS.items() for encoder in task.heads}
    assert heads == {(task, type(build_encoder(name, emb_dims=8))) for task, name, _ in CASES}


@pytest.mark.parametrize(("task", "name", "calls"), CASES)
def test_masks_of_layers_calls_samples_and_epochs_are_pairwise_independent(tmp_path, task, name, calls):
    tuning = fine_tuning(tmp_path, task, name)
    masks = [mask for epoch in (0, 1) for mask in masks_of_a_step(tuning, epoch=epoch, order=range(SAMPLES)).values()]
    assert len(masks) == 2 * calls * SAMPLES
    for one, other in itertools.combinations(masks, 2):
        length = min(len(one), len(other))  # streams that are the same agree from their beginning on
        agreeing = (one[:length] == other[:length]).double().mean().item()
        assert abs(agreeing - 0.5) < 3 / length**0.5  # 6 standard deviations


@pytest.mark.parametrize(("task", "name", "calls"), [case for case in CASES if case[2]])
def test_a_samples_masks_follow_from_sample_and_epoch_alone(tmp_path, task, name, calls):
    first = masks_of_a_step(fine_tuning(tmp_path, task, name), epoch=1, order=range(SAMPLES))
    torch.manual_seed(99)
    again = fine_tuning(tmp_path, task, name)
    masks_of_a_step(again, epoch=0, order=range(SAMPLES))  # what was drawn before changes nothing
    second = masks_of_a_step(again, epoch=1, order=[2, 0, 3, 1])
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
