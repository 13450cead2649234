"""Checkpoints: plain types only, written in one step, loaded with ``weights_only=True``, rebuilt with no other flag."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models import ENCODERS, build_encoder, encoder_arguments, resolve_encoder_name
from models.fine_tuned import TASKS, FineTuned
from utils.errors import CheckpointError, DamagedCheckpointError, UserError

FORMAT = 1
OURS = {"format", "kind", "point_encoder"}  # entries of our checkpoints, none of which published files have
logger = logging.getLogger("crossnet")

# What published files hold besides the encoder: batch norms registered a second time under the block that owns them,
# projection heads, classifiers and segmentation heads.
_ALIASES = {
    "dgcnn": re.compile(r"^(bn\d+|transform_net\.bn[12]|transform_net\.conv3\.1)\."),
    "pointnet": re.compile(r"^$"),
}
_HEADS = {
    "dgcnn_cls": re.compile(r"^(inv_head|linear\d|bn[67])\b"),
    "dgcnn_partseg": re.compile(r"^(inv_head|conv([7-9]|1[01])|linear\d)\b"),
    "dgcnn_semseg": re.compile(r"^(inv_head|conv[7-9]|linear\d)\b"),
    "pointnet_cls": re.compile(r"^(inv_head|linear\d|bn6)\b"),
    "pointnet_partseg": re.compile(r"^(inv_head|convs\d|bns\d)\b"),
}
# The tensor whose first dimension is the width of the embedding.
_EMBEDDING = {
    "dgcnn_cls": "conv5.0.weight",
    "dgcnn_partseg": "conv6.0.weight",
    "dgcnn_semseg": "conv6.0.weight",
    "pointnet_cls": "conv5.weight",
    "pointnet_partseg": "conv5.weight",
}


def save_checkpoint(path: str | os.PathLike[str], payload: Mapping[str, Any], *, keep: Path | None = None) -> None:
    """Write a checkpoint; whoever looks sees the old file or the whole new one.

    Args:
        path: the file.
        payload: plain types and tensors.
        keep: where the old file stays, in the place of what is there.

    Raises:
        UserError: the file cannot be written; the old one is still there.
    """
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    moved = False
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            torch.save({"format": FORMAT, **payload}, file)
            file.flush()
            os.fsync(file.fileno())
        if keep is not None and path.exists():
            moved = _keep(path, keep)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if moved:
            with contextlib.suppress(OSError):
                os.replace(keep, path)
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise UserError(f"cannot write the checkpoint {path} ({reason}); an earlier one is unchanged") from error


def _keep(path: Path, keep: Path) -> bool:
    """Give a file a second name, so that it is never without one; where files cannot have two, its other name.

    Returns:
        Whether the file has lost its first name.
    """
    second = keep.with_name(keep.name + ".tmp")
    second.unlink(missing_ok=True)
    try:
        os.link(path, second)
    except OSError:
        os.replace(path, keep)
        return True
    os.replace(second, keep)
    second.unlink(missing_ok=True)  # replacing a file by itself leaves both names
    return False


def load_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a checkpoint or a published state dict to the CPU, without running any code it may contain.

    Raises:
        DamagedCheckpointError: damaged, or no checkpoint.
        CheckpointError: missing, of another format number, or it holds objects other than tensors and plain types.
    """
    path = Path(path)
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder; give the checkpoint in it, such as {path / 'last.pth'}")
    if not os.path.isfile(path):
        raise CheckpointError(f"{path} does not exist; a pretraining run writes checkpoints/<exp_name>/last.pth")
    try:
        _check_zip_sizes(path)
        payload = _load(path)
        # torch does not look at the checksums that it writes; a published file may be written without any.
        damaged = _wrong_checksum(path) if isinstance(payload, dict) and not OURS.isdisjoint(payload) else None
        _check_tensors(payload)
    except Exception as error:  # torch raises many kinds on damaged files
        if "GLOBAL" in str(error) and not _wrong_checksum(path):  # pickle's word for a name to import and call
            raise CheckpointError(
                f"{path} is refused: it holds objects other than tensors and plain types, which could run code"
            ) from error
        known = isinstance(error, (RuntimeError, EOFError, ValueError)) and str(error)
        reason = str(error).split(". ")[0].splitlines()[0] if known else "not what torch.save writes"
        again = "train or copy it again"
        raise DamagedCheckpointError(f"{path} is damaged or no checkpoint ({reason}); {again}") from error
    if damaged:
        raise DamagedCheckpointError(f"{path} is damaged (wrong checksum of {damaged}); train or copy it again")
    if not isinstance(payload, dict):
        raise CheckpointError(f"{path} holds a {type(payload).__name__}, not a checkpoint or a state dict")
    if "point_encoder" in payload and payload.get("format") != FORMAT:
        raise CheckpointError(f"{path} has checkpoint format {payload.get('format')}; this version reads {FORMAT}")
    return payload


class _Bounded(io.BufferedReader):
    """A file that is never asked for more than is left of it: a length that it claims would be allocated first."""

    def read(self, size: int | None = -1) -> bytes:
        """See ``io.BufferedReader.read``."""
        left = max(0, os.fstat(self.fileno()).st_size - self.tell())
        return super().read(left if size is None or size < 0 else min(size, left))


def _load(path: Path) -> Any:
    """Content of a checkpoint in PyTorch's zip form or its older one."""
    if zipfile.is_zipfile(path):
        return torch.load(path, map_location="cpu", weights_only=True)
    with _Bounded(io.FileIO(path)) as file:
        return torch.load(file, map_location="cpu", weights_only=True)


def _wrong_checksum(path: Path) -> str | None:
    """The first member of a zip file that is not what was written, or the file's name where it is cut off."""
    try:
        return zipfile.ZipFile(path).testzip() if zipfile.is_zipfile(path) else None
    except Exception:  # zipfile raises many kinds too
        return path.name


def _check_zip_sizes(path: Path) -> None:
    """See that a zip file's members are stored as they are, as torch.save does: others could unpack to any size.

    Raises:
        ValueError: they are packed, or together larger than the file.
    """
    if not zipfile.is_zipfile(path):
        return  # PyTorch's older form
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise ValueError("its members are compressed, which torch.save does not do")
    if sum(member.file_size for member in members) > path.stat().st_size:
        raise ValueError("its members are larger than itself")


def _check_tensors(payload: Any) -> None:
    """See that all tensors of a payload are ordinary ones: dense, on the CPU, each value stored.

    Raises:
        ValueError: there is another one.
    """
    left, seen = [payload], set()
    while left:  # without recursion, and each object once: a file may nest and share them without end
        item = left.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, Mapping):
            left.extend(item.values())
        elif isinstance(item, list | tuple | set):
            left.extend(item)
        elif isinstance(item, Tensor):
            if item.layout is not torch.strided or item.is_quantized or item.device.type != "cpu":
                raise ValueError("a tensor in it is sparse, quantised or on no device")
            if item.nbytes > item.untyped_storage().nbytes():
                raise ValueError(f"a tensor in it claims {item.nbytes:,} bytes that are not stored")


@contextlib.contextmanager
def content_of(path: str | os.PathLike[str]) -> Iterator[None]:
    """Inside, whatever is wrong with what a checkpoint holds is an error that names the file.

    Raises:
        CheckpointError: an entry is missing, of another type, or of a size that nothing can have.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (AttributeError, LookupError, TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0][:200]
        raise CheckpointError(
            f"{path} does not hold what this version writes ({type(error).__name__}: {reason}); train or copy it again"
        ) from error


def describe_encoder(encoder: nn.Module) -> dict[str, Any]:
    """Name and keyword arguments that rebuild an encoder of ``models.ENCODERS``."""
    name = next(name for name, kind in ENCODERS.items() if type(encoder) is kind)
    return {"name": name, "kwargs": {key: getattr(encoder, key) for key in encoder_arguments(name)}}


def load_strictly(module: nn.Module, state: Mapping[str, Tensor], *, path: str | os.PathLike[str], what: str) -> None:
    """Load a state dict that must fit exactly.

    Raises:
        CheckpointError: naming the file and the tensors that are missing, too many, of another shape or type, or not
            finite.
    """
    _check_fit(module, state, path=path, what=what)
    module.load_state_dict(state)


def _check_fit(module: nn.Module, state: Mapping[str, Tensor], *, path: str | os.PathLike[str], what: str) -> None:
    """See that a state dict fits a module, which may have no memory yet; see ``load_strictly``."""
    expected = module.state_dict()
    common = {name: (state[name], expected[name]) for name in expected if isinstance(state.get(name), Tensor)}
    problems = {
        "missing": [name for name in expected if name not in common],
        "unknown": [str(name) for name in state if name not in common],
        "of another shape": [
            f"{name} is {tuple(ours.shape)}, not {tuple(theirs.shape)}"
            for name, (ours, theirs) in common.items()
            if ours.shape != theirs.shape
        ],
        "of another type": [
            f"{name} is {ours.dtype}, not {theirs.dtype}"
            for name, (ours, theirs) in common.items()
            if ours.is_floating_point() != theirs.is_floating_point() or ours.is_complex()
        ],
        "not finite": [name for name, (ours, _) in common.items() if not ours.isfinite().all()],
    }
    if any(problems.values()):
        text = "; ".join(
            f"{len(names)} {kind}: {', '.join(names[:3])}{' ...' if len(names) > 3 else ''}"
            for kind, names in problems.items()
            if names
        )
        raise CheckpointError(f"{path} does not fit {what}: tensors {text}")


def published_state(payload: Mapping[str, Any], path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """A published file's tensors: wrappers opened, the prefix ``module.`` of DataParallel stripped.

    Raises:
        CheckpointError: no state dict inside.
    """
    for wrapper in ("state_dict", "model_state_dict"):
        if isinstance(payload.get(wrapper), Mapping):
            payload = payload[wrapper]
    state = {str(name).removeprefix("module."): tensor for name, tensor in payload.items()}
    if not state or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise CheckpointError(f"{path} holds neither one of our checkpoints nor a state dict of tensors")
    return state


def published_encoder_state(state: Mapping[str, Tensor], name: str) -> tuple[dict[str, Tensor], list[str]]:
    """Split published tensors into the encoder's and the names of aliases and heads, which are left out."""
    aliases = _ALIASES[name.split("_")[0]]
    known = build_encoder(name).state_dict().keys()
    left_out = [key for key in state if key not in known and (aliases.match(key) or _HEADS[name].match(key))]
    return {key: tensor for key, tensor in state.items() if key not in left_out}, left_out


def _published_arguments(state: Mapping[str, Tensor], name: str) -> dict[str, Any]:
    """Arguments of an encoder: those that its published tensors imply, the released values otherwise."""
    kwargs = encoder_arguments(name)
    if _EMBEDDING[name] in state:
        kwargs["emb_dims"] = len(state[_EMBEDDING[name]])
    if name == "dgcnn_semseg" and "conv1.0.weight" in state:
        kwargs["in_channels"] = state["conv1.0.weight"].shape[1] // 2
    return kwargs


def _fits(state: Mapping[str, Tensor], name: str) -> bool:
    """Whether published tensors are those of an encoder, all of them, beside heads and aliases."""
    state, _ = published_encoder_state(state, name)
    try:
        with torch.device("meta"):
            shapes = build_encoder(name, **_published_arguments(state, name)).state_dict()
    except (TypeError, ValueError, RuntimeError, IndexError):  # sizes that no encoder has
        return False
    return {key: value.shape for key, value in state.items()} == {key: value.shape for key, value in shapes.items()}


def guess_encoder(state: Mapping[str, Tensor], path: str | os.PathLike[str]) -> str:
    """Name the encoder that bare weights are of, by the names and shapes of their tensors, with a notice.

    Args:
        state: what ``published_state`` returns.
        path: of the file, for messages.

    Raises:
        CheckpointError: they are not exactly those of one encoder.
    """
    fitting = [name for name in ENCODERS if _fits(state, name)]
    if len(fitting) != 1:
        raise CheckpointError(
            f"{path} holds bare weights, and their tensors are not exactly those of one encoder: say which they are of "
            "with --model (and --k), and the tensors that do not fit are named"
        )
    logger.warning("%s does not say which encoder it is of; by its tensors it is a %s", path, fitting[0])
    return fitting[0]


def encoder_from_checkpoint(
    path: str | os.PathLike[str], *, model: str | None = None, k: int | None = None, emb_dims: int | None = None
) -> nn.Module:
    """Rebuild a point encoder and load its weights strictly.

    Our checkpoints need no other argument. Weights published by DGCNN repositories, CrossPoint or CrossNet hold neither
    the encoder's name nor k: the name follows from the shapes of the tensors, and k falls back to the released 20, both
    with a notice.

    Args:
        path: checkpoint or state dict.
        model: encoder name; must agree with the checkpoint's.
        k: neighbours; another value than the checkpoint's is used with a warning.
        emb_dims: must agree with the weights.

    Returns:
        The encoder, in train mode, on the CPU.

    Raises:
        CheckpointError: unreadable, another model, or tensors that do not fit; the message names file and tensors.
    """
    payload = load_checkpoint(path)
    with content_of(path):
        return _encoder_from_payload(payload, path, model=model, k=k, emb_dims=emb_dims)


def _encoder_from_payload(
    payload: Mapping[str, Any],
    path: str | os.PathLike[str],
    *,
    model: str | None = None,
    k: int | None = None,
    emb_dims: int | None = None,
    released_k: int | None = None,
) -> nn.Module:
    """See ``encoder_from_checkpoint``; ``released_k`` is the fallback of weights that do not say their k."""
    if "encoder" in payload and "point_encoder" in payload:
        name, kwargs = payload["encoder"]["name"], dict(payload["encoder"]["kwargs"])
        if not all(
            isinstance(value, int) and not isinstance(value, bool) and value < 1 << 31 for value in kwargs.values()
        ):
            raise CheckpointError(f"{path} describes an encoder with sizes that are no such numbers: {kwargs}")
        state = payload["point_encoder"]
        if model is not None and resolve_encoder_name(model) != name:
            raise CheckpointError(f"{path} holds a {name}, not the {resolve_encoder_name(model)} that was asked for")
    else:
        state = published_state(payload, path)
        name = guess_encoder(state, path) if model is None else resolve_encoder_name(model)
        state, left_out = published_encoder_state(state, name)
        if left_out:
            logger.info("%s: %d tensors of heads and aliases are left out", path, len(left_out))
        kwargs = _published_arguments(state, name)
        if "k" in kwargs:
            kwargs["k"] = released_k or kwargs["k"]
        if k is None and "k" in kwargs:
            logger.warning("%s does not say its number of neighbours; --k %d is used", path, kwargs["k"])
        elif "k" in kwargs:
            kwargs["k"] = k
    if emb_dims is not None and emb_dims != kwargs["emb_dims"]:
        raise CheckpointError(f"{path} has an embedding of {kwargs['emb_dims']}, not --emb_dims {emb_dims}")
    if k is not None and "k" in kwargs and k != kwargs["k"]:
        logger.warning("%s was trained with k = %d; --k %d is used instead", path, kwargs["k"], k)
        kwargs["k"] = k

    def build() -> nn.Module:
        try:
            encoder = build_encoder(name, **kwargs)
            if missing := sorted(encoder_arguments(name).keys() - kwargs.keys()):
                raise ValueError(f"it does not say its {', '.join(missing)}")
            return encoder
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"{path} describes an encoder that this version does not have ({error})") from error

    what = f"the encoder {name}"
    with torch.device("meta"):  # sizes that the weights do not have take no memory
        shapes = build()
    _check_fit(shapes, state, path=path, what=what)
    encoder = build()
    load_strictly(encoder, state, path=path, what=what)
    return encoder


def describe_fine_tuned(model: FineTuned) -> dict[str, Any]:
    """What a checkpoint of a fine-tuned model holds, so that ``fine_tuned_from_checkpoint`` can rebuild it."""
    return {
        "kind": model.kind,
        "encoder": describe_encoder(model.encoder),
        "point_encoder": model.encoder.state_dict(),
        "head_sizes": dict(model.sizes),
        "head": model.head.state_dict(),
    }


def fine_tuned_from_checkpoint(
    path: str | os.PathLike[str], task: type[FineTuned], *, model: str | None = None, k: int | None = None
) -> tuple[FineTuned, dict[str, Any]]:
    """Rebuild an encoder with its head and load both strictly.

    Published state dicts (names without or with ``module.``, batch norms registered twice) open too: encoder and sizes
    follow from their tensors, and k falls back to that of the task's released script, with a notice.

    Args:
        path: checkpoint of a fine-tuning run, or state dict.
        task: what the model must do.
        model: encoder name; must agree with the checkpoint's.
        k: neighbours; another value than the checkpoint's is used with a warning.

    Returns:
        The model, in train mode, on the CPU; and the checkpoint's content, empty for a published state dict.

    Raises:
        CheckpointError: unreadable, of another task, without head, or tensors that do not fit.
    """
    payload = load_checkpoint(path)
    with content_of(path):
        return _fine_tuned_from_payload(payload, path, task, model=model, k=k)


def _fine_tuned_from_payload(
    payload: Mapping[str, Any], path: str | os.PathLike[str], task: type[FineTuned], *, model: str | None, k: int | None
) -> tuple[FineTuned, dict[str, Any]]:
    """See ``fine_tuned_from_checkpoint``."""
    kind = payload.get("kind")
    if isinstance(kind, str) and kind != task.kind:
        holds = f"a model for {kind}" if kind in TASKS else "an encoder without a head (--pretrain_path takes that)"
        raise CheckpointError(f"{path} holds {holds}; expected a model for {task.kind}")
    encoder = _encoder_from_payload(payload, path, model=model, k=k, released_k=task.released_k)
    head_kind = task.heads.get(type(encoder))
    if head_kind is None:
        raise CheckpointError(f"{path} holds a {describe_encoder(encoder)['name']}, which has no head for {task.kind}")
    if kind is not None:
        sizes, state = dict(payload["head_sizes"]), payload["head"]
    else:
        state, payload = _published_head_state(payload, path, describe_encoder(encoder)["name"]), {}
        try:
            sizes = head_kind.sizes(state, encoder)
        except KeyError as error:
            raise CheckpointError(f"{path} holds no head for {task.kind}: the tensor {error} is missing") from error
    with torch.device("meta"):
        shapes = head_kind(encoder, **sizes)
    known = shapes.state_dict()
    if not payload:
        # Of the names that repeat a batch norm only those stay that this head really uses (bn6 of a classifier).
        aliases = _ALIASES[describe_encoder(encoder)["name"].split("_")[0]]
        state = {key: tensor for key, tensor in state.items() if key in known or not aliases.match(key)}
    what = f"the head for {task.kind}"
    _check_fit(shapes, state, path=path, what=what)
    fine_tuned = task(encoder, **sizes)
    load_strictly(fine_tuned.head, state, path=path, what=what)
    return fine_tuned, payload


def _published_head_state(payload: Mapping[str, Any], path: str | os.PathLike[str], name: str) -> dict[str, Tensor]:
    """A published file's tensors beside the encoder's, without those of the projection head."""
    state = published_state(payload, path)
    left_out = published_encoder_state(state, name)[1]
    return {key: state[key] for key in left_out if not key.startswith("inv_head.")}


def check_writable(folder: str | os.PathLike[str]) -> None:
    """Make a folder and try a file in it, so that a long run does not fail at its first checkpoint.

    Raises:
        UserError: it cannot be made or written to.
    """
    probe = Path(folder) / ".write-test"
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror or error}; choose another folder") from error
