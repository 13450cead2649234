"""Choose between PyTorch operations and Triton kernels for the inner loops of the encoders.

``CROSSNET_KERNELS`` in the environment decides:

- ``auto`` (default): the kernels, on a GPU where they compile and match plain formulas in a check at first use;
  otherwise PyTorch operations, with a warning that gives the reason.
- ``triton``: the kernels; an error if they cannot run. With TRITON_INTERPRET=1 they also run on a CPU, slowly.
- ``torch``: PyTorch operations everywhere.

Both are exact: they find the same neighbors, except for ties, and agree up to rounding.
"""

from __future__ import annotations

import functools
import importlib
import logging
import os
from types import ModuleType

import torch
from torch import Tensor

from models.ops.precision import exact_products
from models.ops.tiles import closeness_factors, runs_eagerly
from utils.collectives import all_gather_strings, rank, world_size
from utils.errors import UserError

VARIABLE = "CROSSNET_KERNELS"
CHOICES = ("auto", "triton", "torch")
logger = logging.getLogger("crossnet.kernels")
_without_everywhere: list[str] = []  # why no process uses the kernels; set by agree_on_kernels


def wanted() -> str:
    """Return the value of ``CROSSNET_KERNELS``.

    Raises:
        UserError: it is not one of ``CHOICES``.
    """
    choice = os.environ.get(VARIABLE, CHOICES[0])
    if choice not in CHOICES:
        raise UserError(f"{VARIABLE}={choice} in the environment: expected one of {', '.join(CHOICES)}")
    return choice


def check_choice(device: torch.device) -> None:
    """Fail early if ``CROSSNET_KERNELS`` asks for kernels that a device cannot run.

    Raises:
        UserError: its value is unknown, or the kernels cannot run on this device.
    """
    if wanted() != "triton":
        return
    if device.type != "cuda" and not _interpreted():
        raise UserError(f"{VARIABLE}=triton in the environment: the kernels need a GPU, the encoder runs on {device}")
    kernels, reason = _working_kernels(_indexed(device))
    if kernels is None:
        raise UserError(f"{VARIABLE}=triton in the environment, but the kernels cannot run on {device}: {reason}")


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def backend_for(x: Tensor) -> ModuleType | None:
    """Return ``models.ops.triton_kernels`` if it supports ``x``; None means: use PyTorch operations.

    The kernels support float32 only, and neither torch.compile nor torch.export can trace them.

    Raises:
        UserError: ``CROSSNET_KERNELS`` has an unknown value, or asks for kernels that cannot run on this device.
    """
    if x.dtype != torch.float32 or not runs_eagerly():
        return None
    choice = wanted()
    if choice == "torch" or (choice == "auto" and (_interpreted() or not x.is_cuda)):
        return None
    check_choice(x.device)
    return None if _without_everywhere else _working_kernels(_indexed(x.device))[0]


def agree_on_kernels(device: torch.device) -> None:
    """Turn the kernels off in all processes if they fail in one of them; every process must call this.

    Otherwise the processes would break ties differently, and every step would wait for the slowest of them.
    """
    if world_size() == 1 or device.type != "cuda" or wanted() == "torch":
        return
    _, reason = _working_kernels(_indexed(device))
    _without_everywhere[:] = all_gather_strings([f"process {rank()} on {device}: {reason}"] if reason else [])
    if _without_everywhere:
        logger.warning("all processes use PyTorch operations: %s", "; ".join(_without_everywhere))


def _indexed(device: torch.device) -> torch.device:
    """Add the index of the current GPU to ``cuda``, so that each GPU is checked only once."""
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


@functools.cache
def _working_kernels(device: torch.device) -> tuple[ModuleType | None, str]:
    """Return the kernels if they work on a device with an index, or None and the reason.

    Raises:
        UserError: the check left the device unusable.
    """
    try:
        kernels = importlib.import_module("models.ops.triton_kernels")
        with torch.inference_mode(False), torch.enable_grad():  # the check needs gradients
            check(kernels, device)
    except torch.cuda.OutOfMemoryError:
        raise  # not the fault of the kernels
    except Exception as error:  # compilers, drivers and devices raise many kinds
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        try:
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        except Exception as broken:
            raise UserError(
                f"checking the Triton kernels left {device} unusable ({reason}); start again with {VARIABLE}=torch"
            ) from broken
        logger.warning("using PyTorch operations on %s, since the Triton kernels do not work there: %s", device, reason)
        return None, reason
    logger.info("using Triton kernels on %s (%s=torch turns them off)", device, VARIABLE)
    return kernels, ""


def check(kernels: ModuleType, device: torch.device) -> None:
    """Compare every kernel with the plain formula, computed in float64 on the CPU.

    On a GPU, also check a size that compiles as in training: several warps per row, aligned loads, several tiles.

    Raises:
        RuntimeError: a result differs by more than rounding.
    """
    _check_size(kernels, device, clouds=2, points=12, k=5, width=20)
    if device.type == "cuda":
        _check_size(kernels, device, clouds=2, points=1040, k=20, width=144)


def _check_size(kernels: ModuleType, device: torch.device, *, clouds: int, points: int, k: int, width: int) -> None:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")

    def compare(what: str, found: Tensor, expected: Tensor) -> None:
        error = ((found.cpu().double() - expected).abs().max() / expected.abs().max()).item()
        if not error < 1e-5:
            raise RuntimeError(f"{what} on {device} differ from the plain formula by {error:.1e} of the largest")

    cloud = random(clouds, points, 3)
    cloud[:, points // 2 :] = cloud[:, :1]  # duplicates, as after input dropout: more than k equal distances
    distances = (cloud[:, :, None] - cloud[:, None]).double().square().sum(-1)  # (B, N, N)
    smallest, nearest = (part[..., :k] for part in distances.sort(dim=-1, stable=True))
    selected = kernels.largest(-distances.float().flatten(0, 1).to(device), k).unflatten(0, (clouds, points))
    for what, found in (("nearest points", kernels.nearest(cloud.to(device), k)), ("largest values", selected)):
        index = found.cpu()
        if index.min() < 0 or index.max() >= points or (index.diff(dim=-1) <= 0).any():
            raise RuntimeError(f"{what} on {device} differ from the plain formula: indices repeat or are out of range")
        compare(what, distances.gather(-1, index).sort(-1).values, smallest)

    features = random(clouds, points, 64)
    distances = torch.cdist(features.double(), features.double()).square()  # (B, N, N)
    with exact_products(device):
        closeness = torch.bmm(*closeness_factors((features - features.mean(1, keepdim=True)).to(device)))
    index = kernels.largest(closeness.flatten(0, 1), k).unflatten(0, (clouds, points)).cpu()
    found = distances.gather(-1, index.clamp(0, points - 1)).sort(-1).values
    compare("neighbors by products", found, distances.topk(k, largest=False).values)

    neighbors = (nearest + points * torch.arange(clouds)[:, None, None]).flatten(0, 1)  # (P, k)
    a, c, grad_at_argmax = (random(clouds * points, width) for _ in range(3))
    grad_scale, constant, about = (random(width) for _ in range(3))
    sign = torch.where(grad_scale < 0, -1.0, 1.0)
    exact_a, exact_c = (x.double().requires_grad_() for x in (a, c))
    h = exact_a[neighbors] + exact_c[:, None]  # (P, k, C)
    inputs = [x.to(device) for x in (a, c, neighbors, sign)]
    for given in (about.to(device), None):
        extremes, argmax, total, squares = kernels.edge_extremes(*inputs, about=given)
        compare("extremes", extremes, ((h * sign).amax(1) * sign).detach())
        compare("argmax of extremes", extremes, (exact_a.gather(0, _rows(argmax, len(a))) + exact_c).detach())
        if given is not None:
            compare("sums of edges", total, (h - about).sum((0, 1)).detach())
            compare("sums of squares", squares, (h - about).square().sum((0, 1)).detach())
    energy = (grad_scale * h.square() / 2 + constant * h).sum()
    energy = energy + (grad_at_argmax * (exact_a.gather(0, _rows(argmax, len(a))) + exact_c)).sum()
    expected = torch.autograd.grad(energy, (exact_a, exact_c))
    for argmax_type in (torch.int16, torch.int32):
        of_edges = [
            *inputs[:3],
            *(x.to(device) for x in (grad_scale, constant, grad_at_argmax)),
            argmax.to(argmax_type),
        ]
        gradients = kernels.edge_gradients(*of_edges)
        for what, found, exact in zip(("neighbors", "centers"), gradients, expected, strict=True):
            compare(f"gradients of {what}", found, exact)


def _rows(argmax: Tensor, rows: int) -> Tensor:
    """Convert a kernel's argmax to an index, clamped: an index out of range fails the comparison, not the gather."""
    return argmax.cpu().long().clamp(0, rows - 1)
