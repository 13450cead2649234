r"""Pretrain a point-cloud encoder with CrossNet (Wu et al., IEEE TMM 2023), from clouds and renderings without labels.

Examples:
  # ShapeNet with the default settings (docs/fidelity.md), scored on ModelNet40 if that is in --data_root
  python train_crossnet_con.py --data_root data --exp_name crossnet

  # resume a stopped run; the result is that of an uninterrupted one
  python train_crossnet_con.py --data_root data --exp_name crossnet --resume

  # four GPUs, a global batch of 32 pairs (docs/distributed.md)
  torchrun --nproc_per_node=4 train_crossnet_con.py --data_root data --exp_name crossnet --batch_size 8

  # small machines: fewer points, smaller images, a smaller image network
  python train_crossnet_con.py --data_root data/demo --exp_name small --epochs 10 --batch_size 64 \
      --num_points 512 --image_size 64 --image_model resnet18

The run folder <output_dir>/<exp_name> gets last.pth, previous.pth (the one before), best.pth (by the probe or by
held-out pairs), with --keep_every step_<n>.pth, config.json, metrics.jsonl, run.log and curves.png. Evaluate last.pth
with downstream/classification/main.py.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from datasets.own_clouds import LABELED_FOLDER
from datasets.pair_sources import held_out_shapes, read_shape_list
from datasets.registry import CLASSIFICATION_SETS, find_datasets
from datasets.shapenet_render import ShapeNetRender, collate_pairs
from datasets.transforms import AUGMENTATIONS, BACKGROUNDS, PairAugmentation, RenderPixels
from downstream.pair_validation import PairValidation
from downstream.probe import LinearProbe
from engine.config import RunConfig
from engine.device import resolve_device
from engine.grad_cache import backward_in_chunks
from engine.launch import launch
from engine.load_model import describe_encoder, encoder_from_checkpoint, encoder_from_flags, load_strictly
from engine.loop import train
from engine.optim import AMP_DTYPES, LR_SCHEDULES, autocast, base_rate, learning_rate
from engine.resume import resume
from engine.run_folder import RunFolder
from engine.task import FREE_ON_RESUME, Progress, Run, Task
from models import ENCODER_ALIASES, ENCODERS, CrossNet
from models.crossnet import MODALITIES
from models.image import IMAGE_ENCODERS
from models.losses import OBJECTIVES, RELEASED_TEMPERATURE
from utils.cli import (
    check_writable,
    flag,
    fraction,
    non_negative_float,
    non_negative_int,
    positive_float,
    positive_int,
    write_json,
)
from utils.collectives import all_gather_strings, is_main, world_size
from utils.errors import CheckpointError, UserError
from utils.released_flags import IN_PRETRAINING, Switch, add_released_flags, model_name
from utils.reproducible import seed_everything

logger = logging.getLogger("crossnet")
# Free on resume: the probe does not affect training, and the fingerprint covers the shapes that --list selects.
PROBE_SETTINGS = {"eval_every", "eval_dataset", "eval_root", "eval_points", "svm_c", "select_on", "list"}


@dataclass(kw_only=True)
class PretrainConfig(RunConfig):
    """Settings of a pretraining run; ``k`` and ``emb_dims`` may be None until the encoder is built."""

    list: str | None = flag(
        group="data", metavar="FILE", help="use only the shapes in FILE, one <synset>/<model_id> or <model_id> per line"
    )
    num_points: int | None = flag(
        type=positive_int,
        metavar="N",
        help="points per view, drawn at random from larger clouds (default: all points, as released)",
    )
    image_size: int = flag(224, type=positive_int, metavar="PX", help="resize renderings to PX x PX")
    background: str = flag(
        "black",
        choices=[*BACKGROUNDS],
        help="background of transparent renderings; released: drop alpha, which shows the hidden colors",
    )
    without: Sequence[str] = flag(
        [],
        nargs="+",
        choices=AUGMENTATIONS,
        help="ablation: augmentations to leave out; held-out pairs keep them all, so that runs compare",
    )
    strict_data: bool = flag(False, help="stop at the first unreadable sample (default: at more than 1 %%)")
    val_fraction: float = flag(
        0.0,
        type=fraction,
        metavar="F",
        help="fraction of the pairs to hold out, at least 2 pairs; every epoch is scored on them, without labels",
    )
    model: str = flag(
        "dgcnn_cls",
        group="point encoder",
        type=model_name([*ENCODERS, *ENCODER_ALIASES]),
        choices=[*ENCODERS, *ENCODER_ALIASES],
        help="encoder to pretrain",
    )
    k: int | None = flag(
        type=positive_int,
        metavar="K",
        help="DGCNN: neighbors per point, itself included (default: 20, or that of --model_path)",
    )
    emb_dims: int | None = flag(
        type=positive_int, metavar="E", help="width of the embedding (default: 1024, or that of --model_path)"
    )
    dropout: float = flag(0.5, type=float, metavar="P", help="no effect: only the heads of fine-tuning have dropout")
    model_path: str | None = flag(
        metavar="FILE",
        help="initialize the encoder from this checkpoint; 'pretrained' means this repository's weights for --model "
        "(default: random weights)",
    )
    objective: str = flag(
        "con",
        group="objective",
        choices=OBJECTIVES,
        help="con: contrast both views with both images; ave: contrast the mean of the views with each image",
    )
    image_modality: str = flag("both", choices=MODALITIES, help="image branches to build")
    image_model: str = flag("resnet50", choices=[*IMAGE_ENCODERS], help="image encoders, randomly initialized")
    alpha: float = flag(1.0, type=non_negative_float, metavar="A", help="weight of the cross-modal term")
    intra_weight: float = flag(
        1.0, type=non_negative_float, metavar="W", help="weight of the term between the views of a cloud"
    )
    temperature: float | None = flag(
        type=positive_float, metavar="T", help="of NT-Xent (default: 0.2 for con, 0.1 for ave)"
    )
    mask_same_object: bool = flag(
        False, help="ablation of con: exclude the object's other view and image from the negatives"
    )
    batch_size: int = flag(
        32, group="optimization", type=positive_int, metavar="B", help="objects per batch and process"
    )
    accumulate: int = flag(
        1,
        type=positive_int,
        metavar="A",
        help="batches per optimizer step, whose gradients are averaged. This adds no negatives, since each batch has "
        "its own loss; for more negatives in little memory, use a large --batch_size with --chunk_size",
    )
    chunk_size: int | None = flag(
        type=positive_int,
        metavar="C",
        help="compute each batch in chunks of C objects: memory of C objects, negatives of the whole batch, about a "
        "third slower; exact, except that batch statistics are those of a chunk (default: off)",
    )
    epochs: int = flag(250, type=positive_int, metavar="E", help="passes over the data")
    lr: float = flag(1e-3, type=positive_float, metavar="LR", help="peak learning rate of Adam; SGD uses 100 x this")
    weight_decay: float = flag(1e-5, type=non_negative_float, metavar="WD", help="L2 penalty")
    use_sgd: bool = flag(False, action=Switch, help="use SGD with momentum instead of Adam")
    momentum: float = flag(0.9, type=non_negative_float, metavar="M", help="momentum of SGD")
    lr_schedule: str = flag(
        "cosine",
        choices=LR_SCHEDULES,
        help="cosine: from --lr to 0 over the run; released: as the released code, which steps the cosine every batch, "
        "so that the rate oscillates between --lr and 0 with a period of 2 x --epochs steps",
    )
    keep_every: int = flag(
        0,
        type=non_negative_int,
        metavar="STEPS",
        help="also keep point encoder and point head every STEPS steps, as step_<n>.pth; 0 for none",
    )
    amp: str = flag(
        "off",
        group="speed",
        choices=[*AMP_DTYPES],
        help="mixed precision; neighbor search, EdgeConv and loss remain in float32. off: float32, except that PyTorch "
        "lets cuDNN use TF32 for convolutions (torch.backends.cudnn.allow_tf32)",
    )
    channels_last: bool = flag(False, help="channels-last memory format for images; faster on most devices")
    compile: bool = flag(False, help="compile the image encoders and all heads with torch.compile")
    eval_every: int = flag(
        1,
        group="linear-SVM probe",
        type=non_negative_int,
        metavar="EPOCHS",
        help="epochs between probes, 0 for none; the GPU is idle while the CPU fits the SVM, 10 avoids most of that",
    )
    eval_dataset: Sequence[str] = flag(
        ["auto"],
        nargs="+",
        choices=["auto", *CLASSIFICATION_SETS],
        help="data sets of the probe; auto: all found in --data_root. The first one selects best.pth",
    )
    eval_root: str | None = flag(metavar="DIR", help="folder of these data sets (default: --data_root)")
    eval_points: int = flag(1024, type=positive_int, metavar="N", help="points per cloud of the probe")
    test_batch_size: int = flag(32, type=positive_int, metavar="B", help="clouds per forward pass")
    svm_c: float = flag(0.01, type=positive_float, metavar="C", help="C of the linear SVM")
    select_on: str = flag(
        "val",
        choices=("val", "test", "pairs"),
        help="select best.pth by the probe on held-out training clouds (val) or, as released, on the test set, or by "
        "the loss on the pairs of --val_fraction",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.temperature is None:
            self.resolve(temperature=RELEASED_TEMPERATURE[self.objective])
        # In one order, so that a run resumes whatever order they are given in.
        self.resolve(without=[name for name in AUGMENTATIONS if name in self.without])


def build_parser() -> argparse.ArgumentParser:
    """Build the command line of this script; docs/fidelity.md lists defaults that differ from the release."""
    parser = PretrainConfig.parser()
    add_released_flags(parser, IN_PRETRAINING, datasets=("shapenet", "shapenetrender"))
    return parser


class Pretraining(Task):
    """Pretraining of CrossNet on pairs of a cloud and renderings."""

    kind = "crossnet-pretraining"
    loss_names = ("loss", "loss_intra", "loss_cross")
    free_on_resume = FREE_ON_RESUME | PROBE_SETTINGS
    added_settings = MappingProxyType({"val_fraction": 0.0, "without": [], "intra_weight": 1.0})
    collate = staticmethod(collate_pairs)

    def __init__(self, config: PretrainConfig) -> None:
        super().__init__(config, resolve_device(config.device))
        seed_everything(config.seed)
        self.dataset = ShapeNetRender(
            config.data_root,
            seed=config.seed,
            transform=RenderPixels(config.image_size, background=config.background),
            only=read_shape_list(config.list) if config.list else None,
            strict=config.strict_data,
            num_points=config.num_points,
        )
        self.held_out = held_out_shapes(self.dataset.ids, config.val_fraction, seed=config.seed)
        if self.held_out:
            pairs = self.dataset.subset(self.held_out)
            self.dataset = self.dataset.subset(set(self.dataset.ids) - set(self.held_out))
        encoder = self.build_point_encoder()
        self.check_sizes()
        self.sampler = self.sampler_of(len(self.dataset), config.batch_size, parts=config.accumulate)
        augmentation: Callable[..., PairAugmentation] = functools.partial(
            PairAugmentation,
            num_points=config.num_points,
            image_size=config.image_size,
            modality=config.image_modality,
            channels_last=config.channels_last,
            seed=config.seed,
        )
        self.augmentation, self.whole_augmentation = augmentation(without=config.without), augmentation()
        self.model = CrossNet(
            encoder,
            image_model=config.image_model,
            image_modality=config.image_modality,
            objective=config.objective,
            alpha=config.alpha,
            intra_weight=config.intra_weight,
            temperature=config.temperature,
            mask_same_object=config.mask_same_object,
        ).to(self.device)
        if config.channels_last:
            self.model.image_encoders.to(memory_format=torch.channels_last)
        if config.compile:
            for part in (*self.model.image_encoders.values(), *self.model.image_heads.values(), self.model.point_head):
                part.compile()
        self.network = self.wrap_distributed(self.model)
        self.probes = self.build_probes()
        self.pair_validation: PairValidation | None = None
        if self.held_out:
            self.pair_validation = PairValidation(pairs, batch_size=config.test_batch_size, workers=config.workers)

    def check_sizes(self) -> None:
        """Fail early if the settings do not fit the data.

        Raises:
            UserError: naming the flag and a value that fits.
        """
        config, size, processes = self.config, len(self.dataset), world_size()
        if size < config.batch_size * processes * config.accumulate:
            times = f" x --accumulate {config.accumulate}" if config.accumulate > 1 else ""
            times += f" in each of {processes} processes" if processes > 1 else ""
            besides = f" besides the {len(self.held_out)} of --val_fraction" if self.held_out else ""
            raise UserError(
                f"--batch_size {config.batch_size}{times} is larger than the data set: {config.data_root} has {size} "
                f"pairs{besides}; use --batch_size {size // (processes * config.accumulate)} or less"
            )
        if not config.alpha and not config.intra_weight:
            raise UserError("--alpha 0 and --intra_weight 0 leave nothing to train on; at most one of them may be 0")
        if config.select_on == "pairs" and not config.val_fraction:
            raise UserError("--select_on pairs needs held-out pairs; add, for example, --val_fraction 0.05")
        if config.batch_size * (1 if config.no_sync_bn else processes) < 2:
            raise UserError(
                "--batch_size 1 leaves no negatives for the loss and no statistics for batch norm; use 2 or more"
            )
        if config.chunk_size == 1:
            raise UserError("--chunk_size 1 leaves no statistics for batch norm; use 2 or more")
        if config.num_points:
            self.dataset.check_points(config.num_points, flag="--num_points")
        points = config.num_points or self.dataset.cloud_size
        if config.k is not None and config.k > points:
            raise UserError(f"--k {config.k} neighbors in clouds of {points} points; use --k {points} or less")

    def build_point_encoder(self) -> nn.Module:
        """Build the encoder, with random weights or those of ``--model_path``."""
        config = self.config
        wanted = {"k": config.k, "emb_dims": config.emb_dims}
        if config.model_path:
            encoder = encoder_from_checkpoint(config.model_path, model=config.model, in_channels=3, **wanted)
            logger.info(
                "the point encoder starts from all %d tensors of %s", len(encoder.state_dict()), config.model_path
            )
        else:
            encoder = encoder_from_flags(config.model, **wanted)
        # Checkpoints record the values in use, not None.
        config.resolve(k=getattr(encoder, "k", None), emb_dims=encoder.emb_dims)
        return encoder

    def build_probes(self) -> list[LinearProbe]:
        """Build the probes of ``--eval_dataset``; an empty list if no data set is found."""
        config = self.config
        if config.eval_every == 0:
            return []
        root = config.eval_root or config.data_root
        names = find_datasets(root) if "auto" in config.eval_dataset else config.eval_dataset
        if not names:
            rest = "" if config.select_on == "pairs" else " and no best.pth (--select_on pairs needs no labels)"
            logger.info("no classification set in %s: the run has no linear-SVM probe%s", root, rest)
            if (own := Path(root) / LABELED_FOLDER).is_dir():
                logger.info("a probe on its own categories: --eval_dataset folder --eval_root %s", own)
        else:
            config.resolve(eval_dataset=names)
        return [
            LinearProbe(name, root, num_points=config.eval_points, c=config.svm_c, batch_size=config.test_batch_size)
            for name in names
        ]

    def selection(self, flags: Mapping[str, Any]) -> Any:
        """Return the flags that define the score behind ``best.pth``."""
        if flags["select_on"] == "pairs" or not self.probes:
            return flags["select_on"]
        first, *_ = flags["eval_dataset"]
        if "auto" in flags["eval_dataset"]:  # in a checkpoint of 0.1.0, which does not say what was found
            first = self.probes[0].dataset
        return first, *(flags[name] for name in ("select_on", "eval_points", "svm_c"))

    def fingerprint(self) -> str:
        """Return a hash of the training shapes, in order, and the held-out ones."""
        names = [*self.dataset.ids, *(f"held out: {name}" for name in self.held_out)]
        return hashlib.sha256("\n".join(names).encode()).hexdigest()

    def fresh_start(self, path: Path) -> str:
        """Return advice for training on from the weights in a checkpoint, for a message."""
        return (
            f"--model_path {path} with another --exp_name starts a new run of any --epochs from its point encoder "
            "(projection heads, image encoders, optimizer and learning rate start afresh)"
        )

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of a step, counted from 0."""
        config = self.config
        return learning_rate(
            step, schedule=config.lr_schedule, total=self.total_steps, epochs=config.epochs, base=base_rate(config)
        )

    def parts(self, batch: dict[str, Any]) -> Iterator[tuple[dict[str, Any], bool]]:
        """Yield the ``accumulate`` batches of a step, each with whether it is the last."""
        tensors = {name: value for name, value in batch.items() if name != "bad"}
        number = self.config.accumulate
        split = zip(*(value.tensor_split(number) for value in tensors.values()), strict=True)
        for i, part in enumerate(split, 1):
            yield dict(zip(tensors, part, strict=True)), i == number

    def forward_backward(
        self, part: dict[str, Any], progress: Progress, *, scale: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """Accumulate the gradients of a part; return total, intra- and cross-modal loss (3,)."""
        config, inputs = self.config, self.inputs_of(part, epoch=progress.epoch)

        def scaled(loss: Tensor) -> Tensor:
            return scale(loss / config.accumulate)

        def precision() -> contextlib.AbstractContextManager:
            return autocast(self.device, config.amp)

        if config.chunk_size:
            losses = backward_in_chunks(
                self.network, inputs, chunk_size=config.chunk_size, precision=precision, scale=scaled
            )
        else:
            with precision():
                losses = self.network(**inputs)
            scaled(losses.total).backward()
        return torch.stack([losses.total, losses.intra, losses.cross]).detach().float()

    def inputs_of(self, batch: dict[str, Tensor], *, epoch: int) -> dict[str, Tensor]:
        """Move a batch to the device and augment it; return the model's inputs: two views of clouds, and images."""
        return self.augmentation(batch, epoch=epoch, device=self.device)

    def count_bad_samples(self, batch: dict[str, Any], progress: Progress) -> None:
        """Log unreadable samples, which the data set replaces by others.

        Raises:
            UserError: more than 1 % of the samples read are unreadable.
        """
        progress.read += len(batch["index"]) * world_size()
        messages = all_gather_strings(batch["bad"])
        for message in messages:
            progress.bad += 1
            logger.warning("skipped: %s", message)
        # During the first epoch: more than 1 % of the data set.
        if progress.bad > 0.01 * max(progress.read, len(self.dataset)):
            raise UserError(
                f"{progress.bad} of {progress.read} samples could not be read, more than 1 %; the last one: {message}"
                if messages
                else f"{progress.bad} of {progress.read} samples could not be read, more than 1 %"
            )

    def validate(self) -> tuple[dict[str, float], float | None]:
        """Score the model on the held-out pairs; with ``--select_on pairs`` the lowest loss selects ``best.pth``."""
        if self.pair_validation is None:
            return {}, None
        scores = self.pair_validation(
            self.model,
            inputs_of=lambda batch: self.whole_augmentation(batch, epoch=0, device=self.device),
            precision=lambda: autocast(self.device, self.config.amp),
        )
        return scores, -scores["val_loss"] if self.config.select_on == "pairs" else None

    def evaluate(self) -> tuple[dict[str, float], float | None]:
        """Score the encoder with the probes; the first one selects ``best.pth``, unless held-out pairs do."""
        scores: dict[str, float] = {}
        for probe in self.probes:
            scores |= probe(self.model.point_encoder, device=self.device)
        if not self.probes or self.config.select_on == "pairs":
            return scores, None
        return scores, scores[f"{self.probes[0].dataset}_{self.config.select_on}_accuracy"]

    def weights(self) -> dict[str, Any]:
        """Return checkpoint entries: the point encoder, which also loads alone, and the rest."""
        rest = {key: value for key, value in self.model.state_dict().items() if not key.startswith("point_encoder.")}
        return {**self.encoder_weights(), "heads_and_image_encoders": rest}

    def kept_weights(self) -> dict[str, Any]:
        """Return point encoder and point head for ``step_<n>.pth``.

        The image encoders are left out: they are most of a checkpoint, and few evaluations need them.
        """
        return {**self.encoder_weights(), "point_head": self.model.point_head.state_dict()}

    def encoder_weights(self) -> dict[str, Any]:
        """Return the checkpoint entries of the point encoder, and the names of the held-out shapes."""
        return {
            "encoder": describe_encoder(self.model.point_encoder),
            "point_encoder": self.model.point_encoder.state_dict(),
            **({"held_out": self.held_out} if self.held_out else {}),
        }

    def load_weights(self, payload: Mapping[str, Any], path: Path) -> None:
        """Load the entries that ``weights`` returned.

        Raises:
            CheckpointError: tensors are missing or do not fit.
        """
        hidden = payload["heads_and_image_encoders"].get("point_head.0.bias")
        if hidden is not None and len(hidden) != self.model.point_head[0].out_features:
            raise CheckpointError(
                f"{path} was written when the point head's hidden layer had {len(hidden)} units at every --emb_dims; "
                f"now it has as many as --emb_dims, as released. Resume with the code of commit "
                f"{payload.get('git_commit')}, or start a new run from this encoder with --model_path {path}"
            )
        encoder = payload["point_encoder"]
        load_strictly(self.model.point_encoder, encoder, path=path, what=f"--model {self.config.model}")
        state = {f"point_encoder.{key}": value for key, value in encoder.items()}
        load_strictly(self.model, {**state, **payload["heads_and_image_encoders"]}, path=path, what="these settings")

    def log_start(self) -> None:
        """Log the data set, the length of the run and the device."""
        dataset = self.dataset
        points = self.config.num_points or dataset.cloud_size
        logger.info(
            "%d pairs, %d shapes without rendering left out; %d of %d points per view; "
            "%d steps of %d objects in %d process(es) on %s",
            *(len(dataset), len(dataset.skipped), points, dataset.cloud_size, self.total_steps),
            *(self.sampler.global_batch, world_size(), self.device),
        )
        if self.held_out:
            logger.info("%d pairs are held out; R@1 by chance is %.2g %%", len(self.held_out), 100 / len(self.held_out))
        if self.config.keep_every > self.total_steps:
            logger.warning("--keep_every %d keeps nothing: the run has fewer steps", self.config.keep_every)
        if short := dataset.smaller_than(points):
            logger.warning(
                "clouds of %d to %d points: %d of %d have fewer than %d, and their points repeat",
                *(min(dataset.sizes), max(dataset.sizes), short, len(dataset.sizes) - 1, points),
            )


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Pretrain; return the record of the last epoch."""
    config = PretrainConfig.from_flags(build_parser().parse_args(argv))
    folder = RunFolder(Path(config.output_dir) / config.exp_name, overwrite=config.overwrite, resume=config.resume)
    if config.json and is_main():
        check_writable(Path(config.json).absolute().parent)
    folder.start_log()
    task = Pretraining(config)
    run = Run(task, folder)
    resume(run)
    folder.write_config(config.provenance())
    task.log_start()
    record = train(run)
    if is_main():
        write_json(config.json, record)
    return record


if __name__ == "__main__":
    launch(main)
