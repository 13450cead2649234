"""Fine-tuning for part segmentation, semantic segmentation and classification.

A run is a function of its seed: the order of samples depends on (seed, epoch), augmentation and dropout on (seed,
epoch, sample). A run that was stopped, even within an epoch, therefore continues to the same weights, and several
processes train the same model as one. They also share validation and tests.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import h5py
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset

from datasets.sampler import SampleKey
from datasets.streams import SampleStreams, Stream
from datasets.transforms import PointAugmentation
from downstream.features import calibrate_batch_norm, evaluating
from downstream.figures import check_output_path
from engine.checkpoint import load_checkpoint
from engine.config import RunConfig
from engine.data_workers import data_loader
from engine.device import resolve_device
from engine.faults import batches
from engine.load_model import (
    describe_encoder,
    describe_fine_tuned,
    encoder_from_checkpoint,
    encoder_from_flags,
    encoders_for,
    find_weights,
    load_strictly,
)
from engine.loop import train
from engine.optim import AMP_DTYPES, autocast, base_rate, cosine_lr
from engine.resume import resume
from engine.run_folder import RunFolder
from engine.task import FREE_ON_RESUME, Progress, Run, Task
from models import ENCODER_ALIASES, build_encoder, encoder_arguments, resolve_encoder_name
from models.ops.dropout import SampleDropout
from models.task_heads import HEADS, FineTuned
from utils.cli import flag, fraction, non_negative_float, non_negative_int, positive_int, write_json
from utils.collectives import broadcast_from_rank0, gather_rows, is_main, rank, world_size
from utils.errors import CheckpointError, UserError
from utils.files import replacing
from utils.progress import progress
from utils.released_flags import Switch, model_name, scheduler_name
from utils.reproducible import seed_everything

logger = logging.getLogger("crossnet")
SCHEDULERS = ("cosine", "step", "released")
SMOOTHING = 0.2
HEAD_SEED = 1_000_003
IGNORED = -100  # target of points whose label is not used
CALIBRATION_SAMPLES = 512
# The released scripts drop an incomplete last batch only with at least this many samples.
DROP_REST_FROM = 100
Scores = dict[str, Any]


@dataclass(kw_only=True)
class FineTuneConfig(RunConfig):
    """Settings that all fine-tuning runs share; docs/fidelity.md lists defaults that differ from the release."""

    pretrain_path: str | None = flag(
        group="model",
        metavar="FILE",
        help="start from the encoder of this checkpoint, ours or a published one, or from weights of this repository: "
        "pretrained[:NAME] (default: from scratch)",
    )
    emb_dims: int | None = flag(
        type=positive_int, metavar="E", help="width of the embedding (default: the checkpoint's; 1024)"
    )
    dropout: float | None = flag(type=fraction, metavar="P", help="dropout of the head (default: as published)")
    head: str = flag(
        "published",
        choices=HEADS,
        help="layers on top of the encoder; linear: one layer, to judge the features (--eval takes the checkpoint's)",
    )
    freeze_encoder: bool = flag(
        False, help="train the head alone; the encoder's weights and batch-norm statistics stay as they are"
    )
    calibrate_bn: bool = flag(
        False,
        help=f"before the first step set the encoder's batch-norm statistics from up to {CALIBRATION_SAMPLES} training "
        "samples, without labels; the fair baseline for --freeze_encoder is an untrained encoder with this",
    )
    epochs: int = flag(
        200, group="optimization", type=positive_int, metavar="E", help="passes over the training samples"
    )
    batch_size: int = flag(32, type=positive_int, metavar="B", help="samples per process and step")
    test_batch_size: int = flag(16, type=positive_int, metavar="B", help="samples per forward pass in tests")
    lr: float = flag(
        1e-3, type=non_negative_float, metavar="LR", help="peak learning rate of Adam; SGD uses 100 x this"
    )
    use_sgd: bool = flag(False, action=Switch, help="SGD with momentum instead of Adam")
    momentum: float = flag(0.9, type=non_negative_float, metavar="M", help="momentum of SGD")
    weight_decay: float = flag(1e-4, type=non_negative_float, metavar="WD", help="L2 penalty")
    scheduler: str = flag(
        "cosine",
        type=scheduler_name,
        choices=SCHEDULERS,
        help="cosine: decay once from the peak rate to a hundredth of it; step: halve every 20 epochs, down to 1e-5; "
        "released: like the released code (docs/fidelity.md): for classification the rate oscillates with every "
        "batch, for segmentation it is constant under Adam",
    )
    label_smoothing: float = flag(SMOOTHING, type=fraction, metavar="EPS", help="0 turns it off")
    amp: str = flag("off", choices=[*AMP_DTYPES], help="mixed precision of the training steps")
    eval_every: int = flag(
        1,
        group="selection of the best epoch",
        type=non_negative_int,
        metavar="EPOCHS",
        help="epochs between validations; 0 = never",
    )
    select_on: str = flag(
        "val",
        choices=("val", "test"),
        help="select best.pth on held-out training data (val) or, as released, on the test data",
    )
    eval: bool = flag(
        False, group="evaluation only", action=Switch, help="score --model_path on the test data without training"
    )
    model_path: str | None = flag(
        metavar="FILE", help="with --eval: checkpoint of this script, or a published state dict"
    )
    # Scripts declare these for their task.
    model: str | None = None
    k: int | None = None
    # Classification has neither.
    save_predictions: str | None = None
    point_label_fraction: float = 1.0


@dataclass(kw_only=True)
class SegmentationConfig(FineTuneConfig):
    """Settings that fine-tuning for labels of points has on top."""

    save_predictions: str | None = flag(
        group="evaluation only",
        metavar="F.h5",
        help="with --eval: keep what was predicted and what is true for every point",
    )
    point_label_fraction: float = flag(
        1.0,
        group="few labels",
        type=float,
        metavar="F",
        help="share of the points of each training and validation sample whose labels are used, at least one of "
        "every label in it; the loss ignores the others, the test uses all",
    )


def model_flag(task: type[FineTuned]) -> Any:
    """Declare ``model`` with the encoders of a task."""
    names = encoders_for(task)
    names += [alias for alias, name in ENCODER_ALIASES.items() if name in names]
    about = f"encoder (default: the checkpoint's; {names[0]} from scratch)"
    return flag(group="model", type=model_name(names), choices=names, help=about)


def k_flag(task: type[FineTuned]) -> Any:
    """Declare ``k``, by default the released one of a task."""
    about = f"neighbors per point (default: the checkpoint's; {task.released_k} from scratch)"
    return flag(group="model", type=positive_int, help=about)


def label_fraction_flag(group: str, share: str) -> Any:
    """Declare ``label_fraction``; ``share`` is what it is a fraction of, for the help."""
    more = "several values give one run each, in subfolders of the run folder"
    return flag([1.0], group=group, type=float, nargs="+", metavar="F", help=f"share of {share}; {more}")


def check_training_arguments(config: FineTuneConfig) -> None:
    """Check that the settings do not contradict each other.

    Raises:
        UserError: they do.
    """
    if config.eval and not config.model_path:
        raise UserError("--eval needs --model_path: the checkpoint to score")
    if config.model_path and not config.eval:
        raise UserError("--model_path needs --eval; to start from pretrained weights use --pretrain_path")
    kept = config.save_predictions
    if kept and not config.eval:
        raise UserError("--save_predictions keeps what --eval predicts; score the run's checkpoint with --eval")
    if kept and Path(kept).exists():
        raise UserError(f"{kept} exists; move it away, or give --save_predictions another name")
    if config.eval and config.pretrain_path:
        raise UserError("--eval scores a finished model (--model_path) and cannot be used with --pretrain_path")
    if config.batch_size * (1 if config.no_sync_bn else world_size()) < 2:
        raise UserError("--batch_size 1 gives batch norm no statistics; use 2 or more")
    if config.dropout is not None and config.head == "linear":
        raise UserError("--dropout belongs to --head published; --head linear has none")
    check_fraction(config.point_label_fraction, flag="--point_label_fraction")
    if config.freeze_encoder and not (config.eval or config.pretrain_path or config.calibrate_bn):
        logger.warning(
            "--freeze_encoder without --pretrain_path: an untrained encoder whose batch norms have seen no data; "
            "--calibrate_bn makes it a fair baseline"
        )
    if is_main():
        for path in filter(None, (config.json, kept)):
            check_output_path(path)


def write_arrays(path: str | Path, arrays: Mapping[str, Any]) -> None:
    """Write arrays and lists of names into an HDF5 file, which appears when it is complete.

    Args:
        path: file to write.
        arrays: by name; a name with slashes lies in groups.

    Raises:
        UserError: the file cannot be written.
    """
    with replacing(path) as temporary, h5py.File(temporary, "w") as file:
        for name, values in arrays.items():
            packed = {"compression": "gzip", "compression_opts": 1} if np.ndim(values) and len(values) else {}
            is_text = isinstance(values, list) and values and isinstance(values[0], str)
            kind = h5py.string_dtype() if is_text else None
            file.create_dataset(name, data=values, dtype=kind, **packed)


def smoothed_cross_entropy(
    scores: Tensor, target: Tensor, eps: float = SMOOTHING, *, reduction: str = "mean"
) -> Tensor:
    """Return the cross entropy with the released label smoothing: 1 - eps for the true class, eps / (K - 1) for others.

    PyTorch's label_smoothing spreads its share over all K classes including the true one, hence the factor.

    Shape:
        scores (B, K) or (B, K, N), target (B,) or (B, N) -> (); with ``reduction="none"`` as the target, flat

    Raises:
        UserError: the true class would get less than the others.
    """
    classes = scores.shape[1]
    smoothing = eps * classes / (classes - 1) if classes > 1 else 0.0
    if smoothing > 1:
        raise UserError(f"--label_smoothing {eps:g} with {classes} classes: expected at most 1 - 1/{classes}")
    if scores.ndim == 3 and (scores.is_cuda or reduction == "none"):
        # The CUDA loss of (B, K, N) is not deterministic.
        scores, target = scores.mT.flatten(0, 1), target.flatten()  # (B * N, K), (B * N,)
    return F.cross_entropy(scores.float(), target, label_smoothing=smoothing, reduction=reduction, ignore_index=IGNORED)


def cross_entropy_of_labeled(scores: Tensor, target: Tensor, eps: float = SMOOTHING) -> Tensor:
    """Return the mean over samples of the mean :func:`smoothed_cross_entropy` over their labeled points.

    A mean over the labeled points of the whole batch would depend on how samples are spread over processes.

    Shape:
        scores (B, K, N), target (B, N), ``IGNORED`` at points without a label -> ()
    """
    losses = smoothed_cross_entropy(scores, target, eps, reduction="none").view_as(target)  # (B, N)
    return (losses.sum(1) / (target != IGNORED).sum(1)).mean()


def fine_tuning_rate(
    step: int, *, scheduler: str, epochs: int, steps_per_epoch: int, base: float, lr: float, per_batch: bool = False
) -> float:
    """Return the learning rate of a step.

    Args:
        step: number of optimizer steps done.
        scheduler: one of ``SCHEDULERS``.
        epochs: of the run.
        steps_per_epoch: of the run.
        base: peak rate.
        lr: the flag ``--lr``, which the released cosine of the segmentation scripts uses as its minimum, so that Adam's
            rate is constant.
        per_batch: whether the released cosine advances every batch instead of every epoch, down to a hundredth of the
            peak rate, as in the released classification script.
    """
    epoch = step // steps_per_epoch
    if scheduler == "cosine":
        return cosine_lr(step, total=epochs * steps_per_epoch, base=base, floor=base / 100)
    if scheduler == "step":
        return max(base * 0.5 ** (epoch // 20), min(base, 1e-5))
    if per_batch:
        return cosine_lr(step, total=epochs, base=base, floor=base / 100)
    return cosine_lr(epoch, total=epochs, base=base, floor=lr)


def trained_points(payload: Mapping[str, Any]) -> int | None:
    """Return the points of a sample that a checkpoint's run trained on; None if it does not say."""
    count = payload.get("num_points") or payload.get("arguments", {}).get("num_points")
    return count if isinstance(count, int) and count > 0 else None


def warn_of_other_points(path: str | Path, payload: Mapping[str, Any], points: int) -> None:
    """Warn if a checkpoint is scored on samples of another number of points, which changes its neighbors."""
    if (trained := trained_points(payload) or points) != points:
        logger.warning("%s was trained on samples of %d points; these have %d (--num_points)", path, trained, points)


def check_fraction(fraction: float, *, flag: str = "--label_fraction") -> None:
    """Check a share of labels.

    Raises:
        UserError: it is not in (0, 1].
    """
    if not 0 < fraction <= 1:
        raise UserError(f"{flag} {fraction:g}: expected more than 0 and at most 1")


def choose_labeled(labels: np.ndarray, fraction: float, *, seed: int | Sequence[int]) -> np.ndarray:
    """Choose the samples (or points) whose labels a limited-label run may use: one of every class, the rest at random.

    Args:
        labels: (n,) classes.
        fraction: share of the samples, in (0, 1].
        seed: of the draw.

    Returns:
        Sorted indices: round(n * fraction) of them, or one per class if that is more.

    Raises:
        UserError: the fraction is not in (0, 1].
    """
    check_fraction(fraction)
    order = np.random.default_rng(seed).permutation(len(labels))
    first = order[np.unique(labels[order], return_index=True)[1]]
    rest = order[~np.isin(order, first)]
    missing = max(0, round(len(labels) * fraction) - len(first))
    return np.sort(np.concatenate([first, rest[:missing]]))


def hold_out(labels: np.ndarray, share: float, *, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Split samples into those to train on and those to select the best epoch; every class keeps one for training.

    Args:
        labels: (n,) classes.
        share: share of the samples to hold out, if classes have more than one.
        seed: of the draw.

    Returns:
        Sorted indices to train on and to hold out; the latter may be empty.
    """
    keep = choose_labeled(labels, 1 / max(len(labels), 1), seed=seed)  # one of every class
    others = np.setdiff1d(np.arange(len(labels)), keep)
    held = np.random.default_rng([seed, 1]).permutation(others)[: round(share * len(labels))]
    return np.setdiff1d(np.arange(len(labels)), held), np.sort(held)


def labels_text(config: FineTuneConfig, fraction: float) -> str:
    """Return how many labels a run uses: the share of the samples, and of their points where that is limited."""
    points = config.point_label_fraction
    return percent(fraction) + (f" of the samples, {percent(points)} of their points" if points < 1 else "")


def percent(fraction: float) -> str:
    """Format a fraction in percent; small ones keep their digits."""
    return f"{100 * fraction:.3g}%"


def labeled_points(labels: np.ndarray, fraction: float, *, seed: int, index: int) -> np.ndarray:
    """Return which points (N,) of a sample have a label that a run may use; see :func:`choose_labeled`.

    Args:
        labels: (N,) labels of the sample's points.
        fraction: share of the points, in (0, 1].
        seed: of the run.
        index: of the sample in its data set; each one has a separate draw.
    """
    known = np.zeros(len(labels), dtype=bool)
    known[choose_labeled(labels, fraction, seed=[seed, index])] = True
    return known


class FewPointLabels(Dataset):
    """A data set of which only a share of each sample's points is labeled; the others' target is ``IGNORED``.

    Args:
        dataset: its items end with the target (N,).
        fraction: as for :func:`labeled_points`.
        seed: of the run.
    """

    def __init__(self, dataset: Dataset, fraction: float, *, seed: int) -> None:
        self.dataset, self.fraction, self.seed = dataset, fraction, seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        *inputs, target = self.dataset[index]
        known = labeled_points(target.numpy(), self.fraction, seed=self.seed, index=index)
        return (*inputs, target.where(torch.from_numpy(known), IGNORED))


def start_model(
    config: FineTuneConfig, task: type[FineTuned], *, sizes: Mapping[str, int], in_channels: int | None = None
) -> tuple[FineTuned, list[str]]:
    """Build the model to train: encoder from ``--pretrain_path`` or from scratch, head from scratch.

    Args:
        config: settings of the run.
        task: the task.
        sizes: of the head.
        in_channels: values per point; None uses the checkpoint's, or 3 from scratch.

    Returns:
        The model, and lines about its origin for the log.

    Raises:
        CheckpointError: the checkpoint's encoder has no head for the task or takes other channels.
        UserError: the encoder does not have an argument.
    """
    seed_everything(config.seed)
    fitting = encoders_for(task)
    if config.pretrain_path:
        path = find_weights(config.pretrain_path, model=config.model or fitting[0])
        encoder = encoder_from_checkpoint(
            path, model=config.model, k=config.k, emb_dims=config.emb_dims, in_channels=in_channels
        )
        name = describe_encoder(encoder)["name"]
        if type(encoder) not in task.heads:
            raise CheckpointError(
                f"{config.pretrain_path} holds the encoder {name}, which has no head for {task.kind}: pretrain with "
                f"--model {' or '.join(fitting)}"
            )
    else:
        name = resolve_encoder_name(config.model or fitting[0])
        neighbors = config.k or (task.released_k if "k" in encoder_arguments(name) else None)
        encoder = encoder_from_flags(name, k=neighbors, emb_dims=config.emb_dims, in_channels=in_channels)
    # Otherwise the head's initial weights would depend on the encoder's origin.
    seed_everything(config.seed + HEAD_SEED)
    dropout = {} if config.dropout is None else {"dropout": config.dropout}
    model = task(encoder, head=config.head, **sizes, **dropout)
    if config.freeze_encoder:
        model.freeze_encoder()
    kwargs = ", ".join(f"{key} {value}" for key, value in describe_encoder(encoder)["kwargs"].items())
    encoder_text, head_text = (
        f"{len(part.state_dict())} tensors, {sum(p.numel() for p in part.parameters()):,} parameters"
        for part in (encoder, model.head)
    )
    origin = f"loaded from {config.pretrain_path}, all of it" if config.pretrain_path else "starts fresh"
    if config.freeze_encoder:
        origin += "; frozen"
    layers = ", ".join(dict.fromkeys(key.split(".")[0] for key in model.head.state_dict()))
    return model, [
        f"encoder {name} ({kwargs}): {encoder_text}: {origin}",
        f"head for {task.kind} ({layers}): {head_text}: starts fresh",
    ]


class _Keyed(Dataset):
    """Chosen samples of a data set, indexed by the sampler's keys; each item starts with the sample's index."""

    def __init__(self, dataset: Dataset, chosen: np.ndarray) -> None:
        self.dataset, self.chosen = dataset, chosen

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, key: SampleKey) -> tuple[Any, ...]:
        index = int(self.chosen[key.index])
        return (index, *self.dataset[index])


def inference_settings(config: Any) -> dict[str, Any]:
    """Return the settings of :func:`scores_of` that a script's flags choose: batch size, device and workers."""
    device = resolve_device(config.device)
    return {"batch_size": config.test_batch_size, "device": device, "workers": config.workers}


def scores_of(
    model: FineTuned,
    dataset: Dataset,
    *,
    batch_size: int,
    device: torch.device,
    workers: int = 0,
    chosen: Sequence[int] | None = None,
    copies: Sequence[Callable[[Tensor, Tensor], Tensor]] = (),
    inputs: int = 1,
) -> Iterator[tuple[Tensor, list[Tensor]]]:
    """Run a model over samples in evaluation mode, and restore its training mode.

    Several processes take turns at the batches and exchange the scores, so that each yields all of them.

    Args:
        model: its ``scores`` are called with points (B, N, C) and ``inputs - 1`` further tensors.
        dataset: its items are points (N, C), the further inputs, then anything else.
        batch_size: samples per forward pass.
        device: device of the model.
        workers: data-loading processes.
        chosen: indices of the samples, in order; None means all.
        copies: functions of a batch's points (B, N, C) and sample numbers (B,) that return modified points; the scores
            are then probabilities, averaged over the original points and all copies.
        inputs: number of tensors of an item that the model takes.

    Yields:
        The scores, on the device, and the batch as read.
    """
    part = dataset if chosen is None else Subset(dataset, [int(i) for i in chosen])
    numbered = enumerate(batches(data_loader(part, batch_size=batch_size, workers=workers, device=device)))
    count = -(-len(part) // batch_size)
    with (
        evaluating(model),
        progress(total=count, text="testing", unit="batches", leave=False, hidden=not is_main()) as bar,
    ):
        while group := list(itertools.islice(numbered, world_size())):
            bar.update(len(group))
            # Pad the last round so that every rank has a batch; the padded results are discarded.
            turns = [*group, *[group[0]] * (world_size() - len(group))]
            turn, batch = turns[rank()]
            points, *others = (tensor.to(device, non_blocking=True) for tensor in batch[:inputs])
            scores = model.scores(points, *others).float()
            if copies:
                number = torch.arange(len(points), device=device) + turn * batch_size
                scores = scores.softmax(1)
                for change in copies:
                    scores = scores + model.scores(change(points, number), *others).float().softmax(1)
                scores = scores / (1 + len(copies))
            of_all = gather_rows(scores, [len(batch[0]) for _, batch in turns])
            yield from zip(of_all[: len(group)], [batch for _, batch in group], strict=True)


class _OnBatches(nn.Module):
    """A model called with points (B, N, C), as batches hold them; gradients are averaged in ``forward`` only."""

    def __init__(self, model: FineTuned) -> None:
        super().__init__()
        self.model = model

    def forward(self, points: Tensor, *inputs: Tensor) -> Tensor:
        return self.model.scores(points, *inputs)


class FineTuning(Task):
    """Fine-tune one model on chosen samples.

    Args:
        config: settings of the run.
        model: encoder and head.
        dataset: items are points (N, C), further inputs of the model, and last the target.
        chosen: samples to train on.
        validate: returns scores of the model on held-out data; None if nothing is held out.
        score: name of the score that selects the best epoch.
        table: names of classes or parts, stored in the checkpoint.
        identity: text that identifies the training data.
        augmentation: of the training clouds.
        per_batch: as for ``fine_tuning_rate``.
        own_settings: see ``Task``.

    Raises:
        UserError: there are fewer than two samples, or fewer samples than processes.
    """

    free_on_resume = FREE_ON_RESUME | {"confusion_matrix"}

    def __init__(
        self,
        config: FineTuneConfig,
        *,
        model: FineTuned,
        dataset: Dataset,
        chosen: np.ndarray,
        validate: Callable[[nn.Module], Scores] | None,
        score: str,
        table: Mapping[str, Any],
        identity: str,
        augmentation: PointAugmentation | None = None,
        per_batch: bool = False,
        own_settings: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        super().__init__(config, resolve_device(config.device))
        if len(chosen) < 2:
            raise UserError(f"{len(chosen)} training sample(s): batch norm needs at least two")
        if len(chosen) < world_size():
            raise UserError(f"{len(chosen)} training samples for {world_size()} processes: start fewer processes")
        self.kind = model.kind
        self.model = model.to(self.device)
        self.network = self.wrap_distributed(_OnBatches(self.model))
        self.dropouts = SampleDropout.convert(self.model)
        self.limited = config.point_label_fraction < 1
        if self.limited:
            dataset = FewPointLabels(dataset, config.point_label_fraction, seed=config.seed)
        self.num_points = len(dataset[int(chosen[0])][0])
        self.dataset = _Keyed(dataset, chosen)
        # A data set smaller than a batch is one batch.
        batch = min(config.batch_size, len(chosen) // world_size())
        self.sampler = self.sampler_of(len(chosen), batch, keep_rest=len(chosen) < DROP_REST_FROM)
        self.score_held_out, self.score, self.table = validate, score, dict(table)
        self.identity, self.augmentation, self.per_batch = identity, augmentation, per_batch
        self.own_settings = own_settings

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of a step."""
        config = self.config
        return fine_tuning_rate(
            step,
            scheduler=config.scheduler,
            epochs=config.epochs,
            steps_per_epoch=len(self.sampler),
            base=base_rate(config),
            lr=config.lr,
            per_batch=self.per_batch,
        )

    def forward_backward(self, part: list[Tensor], progress: Progress, *, scale: Callable[[Tensor], Tensor]) -> Tensor:
        """Accumulate the gradients of a batch and return the loss, (1,)."""
        config = self.config
        index, points, *others, target = (tensor.to(self.device, non_blocking=True) for tensor in part)
        if self.augmentation is not None:
            streams = SampleStreams(seed=config.seed, epoch=progress.epoch, index=index, purpose=Stream.FINE_TUNING)
            points = self.augmentation(points, streams)
        for number, dropout in enumerate(self.dropouts, Stream.DROPOUT):
            # Use the indices in host memory; reading them from the GPU would wait for it.
            streams = SampleStreams(seed=config.seed, epoch=progress.epoch, index=part[0], purpose=number)
            dropout.reseed(streams.seeds())
        with autocast(self.device, config.amp):
            scores = self.network(points, *others)
        loss_of = cross_entropy_of_labeled if self.limited else smoothed_cross_entropy
        loss = loss_of(scores, target, config.label_smoothing)
        loss = loss * self.sampler.loss_weight(progress.samples // self.sampler.global_batch)
        scale(loss).backward()
        return loss.detach()[None]

    def calibrate(self) -> int:
        """Set the encoder's batch-norm statistics from samples of the data set, without labels; return how many."""
        dataset, seed = self.dataset.dataset, self.config.seed
        rows = np.random.default_rng(seed).permutation(len(dataset))[:CALIBRATION_SAMPLES]
        points = torch.stack([dataset[int(row)][0] for row in rows]).numpy()  # (n, N, C)
        # A copy, whose batch norms are not synchronized: every process sees the same samples.
        described = describe_encoder(self.model.encoder)
        encoder = build_encoder(described["name"], **described["kwargs"])
        encoder.load_state_dict(self.model.encoder.state_dict())
        used = calibrate_batch_norm(
            encoder,
            points,
            max_clouds=len(rows),
            batch_size=self.config.test_batch_size,
            seed=seed,
            device=self.device,
            progress=is_main(),
        )
        self.model.encoder.load_state_dict(encoder.state_dict())
        return used

    def evaluate(self) -> tuple[dict[str, float], float | None]:
        """Validate; return the scores and the one that selects the best epoch."""
        if self.score_held_out is None:
            return {}, None
        scores = {key: value for key, value in self.score_held_out(self.model).items() if isinstance(value, float)}
        return {f"{self.config.select_on}_{key}": value for key, value in scores.items()}, scores[self.score]

    def weights(self) -> dict[str, Any]:
        """Return encoder, head, the table of classes and the points of a sample, for a checkpoint."""
        return {**describe_fine_tuned(self.model), "table": self.table, "num_points": self.num_points}

    def load_weights(self, payload: Mapping[str, Any], path: Path) -> None:
        """Load the result of ``weights``."""
        load_strictly(self.model.encoder, payload["point_encoder"], path=path, what="these settings")
        load_strictly(self.model.head, payload["head"], path=path, what="these settings")

    def fingerprint(self) -> str:
        """Return a hash of the training samples and their order."""
        text = f"{self.identity} {json.dumps(self.table, sort_keys=True)} {self.dataset.chosen.tolist()}"
        return hashlib.sha256(text.encode()).hexdigest()


def score_best_and_last(run: Run, test: Callable[[nn.Module], Scores]) -> dict[str, Any]:
    """Score the best and the last weights on the test data.

    Returns:
        ``best`` (None without validation) and ``last``, each with epoch, validation and test scores.
    """
    task, progress, select_on = run.task, run.progress, run.config.select_on
    records = {record["epoch"]: record for record in broadcast_from_rank0(lambda: list(run.folder.metrics()))}

    def entry(epoch: int) -> dict[str, Any]:
        held_out = {k: v for k, v in records.get(epoch, {}).items() if k.startswith(f"{select_on}_")}
        return {"epoch": epoch, **held_out, "test": test(task.model)}

    last = entry(progress.epoch)
    best = None
    if progress.best_epoch == progress.epoch:
        best = last
    elif progress.best_epoch:
        path = run.folder / "best.pth"
        task.load_weights(broadcast_from_rank0(lambda: load_checkpoint(path)), path)
        best = entry(progress.best_epoch)
    return {"selected_on": select_on if best else None, "best": best, "last": last}


def fine_tune(run: Run, test: Callable[[nn.Module], Scores], report: Iterable[str]) -> dict[str, Any]:
    """Train or resume a run and test it; return the stored result of a finished run.

    Args:
        run: of a ``FineTuning``.
        test: returns the scores of a model on the test data.
        report: lines for the log.
    """
    task, config, folder = run.task, run.config, run.folder
    folder.start_log()
    calibrated = 0
    if resume(run):
        result = broadcast_from_rank0(lambda: earlier_result(folder)) if run.progress.epoch >= config.epochs else None
        if result is not None:
            logger.info("the result is that of %s", folder / "result.json")
            return result
    elif config.calibrate_bn:
        calibrated = task.calibrate()
    folder.write_config(config.provenance())
    for line in report:
        logger.info(line)
    logger.info(
        "%d training samples, %d steps of %d in %d process(es) on %s",
        *(len(task.dataset), task.total_steps, task.sampler.global_batch, world_size(), task.device),
    )
    if task.sampler.global_batch < config.batch_size * world_size():
        logger.info("fewer samples than --batch_size %d: each step uses all of them", config.batch_size)
    if calibrated:
        logger.info("the encoder's batch-norm statistics are those of %d samples", calibrated)
    if task.score_held_out is None:
        logger.info("nothing is held out, so the last epoch is reported instead of the best")
    start = time.perf_counter()
    train(run)
    seconds = time.perf_counter() - start
    result = {
        **score_best_and_last(run, test),
        "training_samples": len(task.dataset),
        "training_seconds": round(seconds, 1),
    }
    if is_main():
        write_json(folder / "result.json", result)
    return result


def earlier_result(folder: RunFolder) -> dict[str, Any] | None:
    """Return the result of a finished run in the folder, or None."""
    path = folder / "result.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def run_folders(config: FineTuneConfig, names: Sequence[str]) -> list[RunFolder]:
    """Return the folders of the runs of one call: the run folder for one run, subfolders of it for several.

    All are checked before the first run starts, so that an existing run in any of them stops the call at once.

    Raises:
        UserError: one holds a run and neither ``--resume`` nor ``--overwrite`` is given.
    """
    base = Path(config.output_dir) / config.exp_name
    if len(names) > 1 and config.resume not in (None, "auto"):
        raise UserError(f"--resume {config.resume} continues one run, but this call has {len(names)}: use --resume")
    paths = [base] if len(names) == 1 else [base / name for name in names]
    return [RunFolder(path, overwrite=config.overwrite, resume=config.resume) for path in paths]


def reported_entry(result: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """Return how the reported entry of a result was selected, and the entry: the best on held-out data, or the last."""
    if result["best"] is None:
        return "last", result["last"]
    return f"best on {result['selected_on']}", result["best"]
