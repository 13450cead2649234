"""Which form of the encoder's inner loops runs: PyTorch's operations, or Triton kernels on a GPU.

``CROSSNET_KERNELS`` in the environment decides:

- ``auto`` (default): the kernels, on a GPU on which they compile and agree with plain formulas in a check at first use;
  else PyTorch's operations, with a warning that says why.
- ``triton``: the kernels; where they cannot run, that is an error. With TRITON_INTERPRET=1 also on a CPU, slowly.
- ``torch``: PyTorch's operations everywhere.

Both forms find the same neighbours, but for ties, and agree up to rounding; neither is an approximation.
"""

from __future__ import annotations

import functools
import importlib
import logging
import os
from types import ModuleType

import torch
from torch import Tensor

from models.blocks import runs_eagerly
from utils.errors import UserError

VARIABLE = "CROSSNET_KERNELS"
CHOICES = ("auto", "triton", "torch")
logger = logging.getLogger("crossnet.kernels")


def wanted() -> str:
    """The choice in the environment.

    Raises:
        UserError: it is none of ``CHOICES``.
    """
    choice = os.environ.get(VARIABLE, CHOICES[0])
    if choice not in CHOICES:
        raise UserError(f"{VARIABLE}={choice} in the environment: expected one of {', '.join(CHOICES)}")
    return choice


def kernels_for(x: Tensor) -> ModuleType | None:
    """``models.triton_kernels`` where it computes what is made of ``x``, None where PyTorch's operations do.

    The kernels take float32 only, and are not recorded by torch.compile and torch.export.

    Raises:
        UserError: CROSSNET_KERNELS is no choice, or asks for kernels that cannot run here.
    """
    if x.dtype != torch.float32 or not runs_eagerly():
        return None
    choice = wanted()
    interpreted = choice == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
    if choice == "triton" and not (x.is_cuda or interpreted):
        raise UserError(f"{VARIABLE}=triton in the environment: they need a GPU and the encoder runs on {x.device}")
    if choice == "torch" or not (x.is_cuda or interpreted):
        return None
    kernels, reason = _checked(x.device)
    if kernels is None and choice == "triton":
        raise UserError(f"{VARIABLE}=triton, but the kernels cannot run on {x.device}: {reason}")
    return kernels


@functools.cache
def _checked(device: torch.device) -> tuple[ModuleType | None, str]:
    """The kernels if they work on a device, or None and the reason; found out once."""
    try:
        kernels = importlib.import_module("models.triton_kernels")
        with torch.inference_mode(False), torch.enable_grad():  # gradients are compared, whatever the caller needs
            check(kernels, device)
    except Exception as error:  # whatever a compiler, a driver or a device may raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        logger.warning("Triton kernels are not used on %s, PyTorch's operations are: %s", device, reason)
        return None, reason
    logger.info("Triton kernels are used on %s (%s=torch turns them off)", device, VARIABLE)
    return kernels, ""


def check(kernels: ModuleType, device: torch.device) -> None:
    """Compare every kernel with the plain formula, in float64, on a small cloud.

    Raises:
        RuntimeError: one differs by more than rounding.
    """
    clouds, points, k, width = 2, 12, 4, 20
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float32).to(device)

    def compare(what: str, found: Tensor, expected: Tensor) -> None:
        error = ((found.double() - expected).abs().max() / expected.abs().max()).item()
        if not error < 1e-5:
            raise RuntimeError(f"{what} on {device} differ from the plain formula by {error:.1e} of the largest")

    cloud = random(clouds, points, 3)
    distances = (cloud[:, :, None] - cloud[:, None]).double().square().sum(-1)
    smallest = distances.sort(-1).values[..., :k]
    inside = kernels.nearest(cloud, k)
    compare("nearest points", distances.gather(-1, inside).sort(-1).values, smallest)
    selected = kernels.largest(-distances.float().flatten(0, 1), k).unflatten(0, (clouds, points))
    compare("largest values", distances.gather(-1, selected).sort(-1).values, smallest)

    near = (inside + points * torch.arange(clouds, device=device)[:, None, None]).flatten(0, 1)
    a, c, peaks = (random(clouds * points, width) for _ in range(3))
    slope, constant, about = (random(width) for _ in range(3))
    sign = torch.where(slope < 0, -1.0, 1.0)
    exact_a, exact_c = (x.double().requires_grad_() for x in (a, c))
    h = exact_a[near] + exact_c[:, None]
    signed, place = (h * sign).max(1)
    energy = (slope * h.square() / 2 + constant * h).sum() + (peaks * sign * signed).sum()
    expected = torch.autograd.grad(energy, (exact_a, exact_c))
    extremes, places, total, squares = kernels.edge_extremes(a, c, near, sign, about=about)
    compare("extremes", extremes, (signed * sign).detach())
    compare("places of extremes", places, near.gather(1, place))
    compare("sums of edges", total, (h - about).sum((0, 1)).detach())
    compare("sums of squares", squares, (h - about).square().sum((0, 1)).detach())
    for what, found, exact in zip(
        ("gradients of neighbours", "gradients of centres"),
        kernels.edge_gradients(a, c, near, slope, constant, peaks, places),
        expected,
        strict=True,
    ):
        compare(what, found, exact)
