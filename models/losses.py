"""NT-Xent (Chen et al., SimCLR, arXiv:2002.05709, Algorithm 1) and CrossNet's two objectives built from it."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from models.ops.precision import at_least_float32, without_autocast
from utils.collectives import gather_with_grad, rank

OBJECTIVES = ("con", "ave")
RELEASED_TEMPERATURE = {"con": 0.2, "ave": 0.1}


def nt_xent(a: Tensor, b: Tensor, *, temperature: float, objects: Tensor | None = None) -> Tensor:
    """Compute the normalized temperature-scaled cross entropy of pairs (a_i, b_i), in at least float32.

    Each of the 2B vectors has to identify its partner among the 2B - 1 others by cosine similarity. With several
    processes, the others are gathered from all of them, with gradient.

    Args:
        a: (B, C), not normalized.
        b: (B, C), not normalized; row i is the partner of row i of ``a``.
        temperature: divisor of the similarities.
        objects: (B,) number of the object of row i in ``a`` and ``b``, unique across processes; if given, other rows of
            the same object are not negatives.

    Returns:
        () mean over the 2B rows of this process.

    Raises:
        ValueError: the shapes differ, or the temperature is not positive.
    """
    if a.shape != b.shape or a.ndim != 2:
        raise ValueError(f"expected two (B, C) tensors of the same shape, got {tuple(a.shape)} and {tuple(b.shape)}")
    if not temperature > 0:
        raise ValueError(f"temperature = {temperature}: expected a number above 0")
    with without_autocast(a.device):
        a = F.normalize(at_least_float32(a), dim=1)  # (B, C)
        b = F.normalize(at_least_float32(b), dim=1)  # (B, C)
        all_a, all_b = gather_with_grad(a), gather_with_grad(b)  # (A, C) each; A = B times the number of processes
        everything = len(all_a)
        own = torch.arange(len(a), device=a.device) + rank() * len(a)  # (B,) rows of this process in all_a
        itself, partner = torch.cat([own, own + everything]), torch.cat([own + everything, own])  # (2B,) each
        logits = torch.cat([a, b]) @ torch.cat([all_a, all_b]).T / temperature  # (2B, 2A)
        logits = logits.scatter(1, itself[:, None], float("-inf"))
        if objects is not None:
            objects_of_all = gather_with_grad(objects).repeat(2)  # (2A,)
            same = objects.repeat(2)[:, None] == objects_of_all[None, :]  # (2B, 2A)
            logits = logits.masked_fill(same.scatter(1, partner[:, None], False), float("-inf"))
        return F.cross_entropy(logits, partner)


class Losses(NamedTuple):
    """The objective and its parts."""

    total: Tensor
    intra: Tensor  # between the two views of a cloud, not yet weighted
    cross: Tensor  # between clouds and images, not yet weighted by alpha


def crossnet_objective(
    views: tuple[Tensor, Tensor],
    *,
    rgb: Tensor | None,
    gray: Tensor | None,
    objective: str = "con",
    alpha: float = 1.0,
    intra_weight: float = 1.0,
    temperature: float = 0.2,
    mask_same_object: bool = False,
) -> Losses:
    """Compute CrossNet's loss between the views of a cloud (intra), and between views and renders (cross).

    - ``con`` (the paper's figure): NTX(t1, t2) + alpha NTX([t1; t2], [rgb; gray]).
    - ``ave``: NTX(t1, t2) + alpha (NTX(mean(t1, t2), rgb) + NTX(mean(t1, t2), gray)).
    With a single modality, both are NTX(t1, t2) + alpha NTX(mean(t1, t2), image). Projections are averaged before they
    are normalized.

    Args:
        views: projections of the two views, each (B, C).
        rgb: projections of the color renders (B, C), or None.
        gray: projections of the gray renders (B, C), or None.
        objective: ``con`` or ``ave``.
        alpha: weight of the cross term.
        intra_weight: weight of the intra term; 0 leaves the cross term alone (ablation).
        temperature: temperature of every NT-Xent.
        mask_same_object: in ``con`` with both modalities, exclude the object's other view and other image from the
            negatives (ablation; the released objective includes them).

    Raises:
        ValueError: the objective is unknown, or neither modality is given.
    """
    if objective not in OBJECTIVES:
        raise ValueError(f"unknown objective {objective!r}: expected one of {', '.join(OBJECTIVES)}")
    images = [image for image in (rgb, gray) if image is not None]
    if not images:
        raise ValueError("expected projections of the color renders, the gray renders or both")
    intra = nt_xent(*views, temperature=temperature)

    if objective == "con" and len(images) == 2:
        batch = len(views[0])
        objects = (torch.arange(batch, device=views[0].device) + rank() * batch).repeat(2) if mask_same_object else None
        cross = nt_xent(torch.cat(views), torch.cat(images), temperature=temperature, objects=objects)
    else:
        mean = (at_least_float32(views[0]) + at_least_float32(views[1])) / 2  # (B, C)
        cross = functools.reduce(torch.add, (nt_xent(mean, image, temperature=temperature) for image in images))
    return Losses(intra_weight * intra + alpha * cross, intra, cross)
