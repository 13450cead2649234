"""Flags of the released CrossNet scripts: accepted with their old meaning, or rejected naming the replacement.

``docs/fidelity.md`` lists the effect of each old command line; ``tests/test_released_command_lines.py`` runs them.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from utils.errors import UserError

logger = logging.getLogger("crossnet")

WORDS = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False, "": False}
# Released encoder names -> ours; a script uses the first that it supports.
MODELS = {
    "dgcnn": ("dgcnn_cls", "dgcnn_partseg", "dgcnn_semseg"),
    "dgcnn_part": ("dgcnn_partseg",),
    "dgcnn_sem": ("dgcnn_semseg",),
    "dgcnn_seg": ("dgcnn_partseg", "dgcnn_semseg"),
    "pointnet": ("pointnet_cls", "pointnet_partseg"),
    "pointnet_part": ("pointnet_partseg",),
    "pointnet_seg": ("pointnet_partseg",),
}
# Training flags of the released classification script; they distinguish its command lines from those of our main.py.
FINE_TUNING = (
    *("--pretrain_path", "--epochs", "--start_epoch", "--percent_train", "--use_sgd", "--lr", "--momentum"),
    *("--weight_decay", "--scheduler", "--exp_name", "--eval"),
)


def to_bool(text: str) -> bool:
    """Parse ``True`` or ``False``, as a word or a digit (argparse type)."""
    if text.lower() not in WORDS:
        raise argparse.ArgumentTypeError(f"{text!r}: expected True or False")
    return WORDS[text.lower()]


def model_name(names: Collection[str]) -> Callable[[str], str]:
    """Return an argparse type that maps released encoder names to ours; ``choices`` checks the result.

    Args:
        names: encoders and aliases that the script supports.
    """

    def convert(text: str) -> str:
        if text in names:
            return text
        return next((name for name in MODELS.get(text, ()) if name in names), text)

    return convert


def scheduler_name(text: str) -> str:
    """Map the released ``cos`` to the schedule ``released`` (argparse type)."""
    return "released" if text == "cos" else text


class Switch(argparse.Action):
    """A boolean flag: ``--flag``, ``--no-flag``, or ``--flag True|False`` as in the released scripts.

    Their ``type=bool`` reads any word as true, even False; here False is false, with a warning.
    """

    def __init__(
        self, option_strings: Sequence[str], dest: str, default: bool = False, help: str | None = None
    ) -> None:
        names = [*option_strings, *(f"--no-{name.removeprefix('--')}" for name in option_strings)]
        super().__init__(names, dest, nargs="?", type=to_bool, default=default, help=help, metavar="True|False")

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option_string: str = ""
    ) -> None:
        """Set the destination to True or False (called by argparse)."""
        if option_string.startswith("--no-"):
            if values is not None:
                parser.error(f"{option_string} takes no value")
            values = False
        elif values is False:
            logger.warning("%s False means off here; the released scripts read any word as on", option_string)
        setattr(namespace, self.dest, values is not False)


class _Quiet(argparse.Action):
    """A flag that adds no entry to the parsed settings or the help."""

    def __init__(self, option_strings: Sequence[str], dest: str, **kwargs: Any) -> None:
        kwargs = {"nargs": None, "help": argparse.SUPPRESS, **kwargs}
        super().__init__(option_strings, argparse.SUPPRESS, default=argparse.SUPPRESS, **kwargs)


class _Gpu(_Quiet):
    """``--gpu N``: use GPU N, or the CPU if there is no GPU."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option_string: str = ""
    ) -> None:
        """Set ``--device``."""
        import torch  # takes seconds; most command lines do not need it

        if not str(values).isdecimal():
            raise UserError(
                f"{option_string} {values}: expected one number, such as 0; for several GPUs start the script with "
                "torchrun --nproc_per_node=N (docs/distributed.md)"
            )
        namespace.device = f"cuda:{int(values)}" if torch.cuda.is_available() else "auto"


class _NoCuda(_Quiet):
    """``--no_cuda``: use the CPU."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option_string: str = ""
    ) -> None:
        if values is not False:
            namespace.device = "cpu"


class _Refused(_Quiet):
    """A flag that is rejected with a message naming its replacement.

    Args:
        instead: what to type, for the message.
        harmless: lower-case values that ask for the default behavior and are accepted.
    """

    def __init__(
        self, option_strings: Sequence[str], dest: str, *, instead: str, harmless: Collection[str] = (), **kwargs: Any
    ) -> None:
        super().__init__(option_strings, dest, nargs="?", **kwargs)
        self.instead, self.harmless = instead, harmless

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option_string: str = ""
    ) -> None:
        if str(values).lower() in self.harmless:
            return
        shown = option_string if values is None else f"{option_string} {values}"
        raise UserError(f"{shown}: {self.instead}")


FALSE = tuple(word for word, value in WORDS.items() if not value)


def add_released_flags(
    parser: argparse.ArgumentParser, refused: Mapping[str, str], *, datasets: Collection[str] = ()
) -> None:
    """Add the released flags that the script itself lacks.

    Args:
        parser: of a script that has ``--device``.
        refused: flag -> what to type instead; ``--eval False``, ``--start_epoch 0`` and ``--n_imgs 1`` are accepted
            because they ask for the default behavior.
        datasets: for a script without ``--dataset``: names that are accepted there, in lower case.
    """
    parser.add_argument("--gpu", action=_Gpu)
    parser.add_argument("--no_cuda", action=_NoCuda, nargs="?", type=to_bool)
    parser.add_argument(
        "--normalize_input",
        action=_Refused,
        harmless=FALSE,
        instead="clouds are used as stored in the files (those of ModelNet40 lie in the unit sphere); store them "
        "centered and scaled, and leave the flag out",
    )
    if datasets:
        parser.add_argument(
            "--dataset",
            action=_Refused,
            harmless=tuple(datasets),
            instead=f"this script has one data set ({next(iter(datasets))}), found in --data_root; ModelNet40, "
            "ModelNet10 and ScanObjectNN are --dataset of downstream/classification/finetune.py and main.py, and "
            "--eval_dataset of train_crossnet_con.py",
        )
    harmless = {"--eval": FALSE, "--start_epoch": ("0",), "--n_imgs": ("1",)}
    for flag, instead in refused.items():
        parser.add_argument(flag, action=_Refused, instead=instead, harmless=harmless.get(flag, ()))


def add_percent_train(parser: argparse.ArgumentParser) -> None:
    """Add ``--percent_train F``, the released name of ``--label_fraction`` with one value in (0, 1]."""
    parser.add_argument(
        "--percent_train", dest="label_fraction", type=float, nargs=1, default=argparse.SUPPRESS, help=argparse.SUPPRESS
    )


NO_START_EPOCH = "a resumed run knows its epoch: --resume continues from the run folder's newest checkpoint"
IN_PRETRAINING = {
    "--eval": "to score a pretrained encoder: python downstream/classification/main.py --model_path FILE",
    "--start_epoch": NO_START_EPOCH,
    "--n_imgs": "a step uses one random rendering of each object, like the released con script for any --n_imgs; "
    "leave the flag out",
}
IN_FINE_TUNING = {"--start_epoch": NO_START_EPOCH}
IN_LINEAR_SVM = dict.fromkeys(
    FINE_TUNING,
    "this script scores frozen features with a linear SVM. To fine-tune a classifier like the released main.py, run "
    "python downstream/classification/finetune.py with the same flags",
)
