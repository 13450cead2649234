"""Computations that ``test_processes.py`` runs once in two processes and once in one with both halves of the data.

Every ``*_case`` takes this process's part of the data and returns named tensors; rows belong to the part, everything
else is the mean of the losses' gradients or a statistic, and equal in all processes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from models import CrossNet, build_encoder
from models.losses import crossnet_objective, nt_xent
from models.ops.batch_norm import SyncBatchNorm
from models.ops.edge_conv import edge_conv, edge_conv_two_layers
from models.ops.knn import flatten_neighbors, knn
from models.ops.layers import edge_block
from utils.collectives import all_reduce_sum, gather_with_grad, is_main, rank, world_size

PROCESSES = 2


def part_of(x: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """Return this process's rows, ``sizes[i]`` in process i; all rows in a single process."""
    return x if world_size() == 1 else x.split(sizes)[rank()]


def normal(*shape: int, seed: int) -> Tensor:
    """Return float64 numbers that are the same in every process."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def nt_xent_case(**kwargs) -> dict[str, Tensor]:
    """Compute NT-Xent of 6 pairs: mean loss and its gradient with respect to this part's rows."""
    a, b = (part_of(normal(6, 5, seed=seed), (3, 3)).requires_grad_() for seed in (1, 2))
    objects = kwargs.pop("objects", None)
    if objects is not None:
        objects = part_of(objects, (3, 3))
    loss = nt_xent(a, b, temperature=0.2, objects=objects, **kwargs)
    loss.backward()
    mean = all_reduce_sum(loss.detach()) / world_size()
    return {"loss": mean, "rows a": a.grad / world_size(), "rows b": b.grad / world_size()}


def objective_case(objective: str, *, mask: bool) -> dict[str, Tensor]:
    """Compute CrossNet's objective of 4 objects: mean losses, gradients with respect to this part's projections."""
    z = [part_of(normal(4, 5, seed=seed), (2, 2)).requires_grad_() for seed in range(4)]
    losses = crossnet_objective((z[0], z[1]), rgb=z[2], gray=z[3], objective=objective, mask_same_object=mask)
    losses.total.backward()
    result = {name: all_reduce_sum(loss.detach()) / world_size() for name, loss in losses._asdict().items()}
    return {**result, **{f"rows {i}": projection.grad / world_size() for i, projection in enumerate(z)}}


def sync_batch_norm_case(*shape: int, sizes: tuple[int, ...], train: bool = True) -> dict[str, Tensor]:
    """Normalize rows far from zero: output, gradients, buffers; the loss is a sum over the rows of all processes."""
    norm = SyncBatchNorm(shape[1]).double().train(train)
    with torch.no_grad():
        norm.weight.copy_(normal(shape[1], seed=5))
        norm.running_mean.copy_(normal(shape[1], seed=6))
    x = part_of(normal(*shape, seed=7) + 10, sizes).requires_grad_()
    for _ in range(2):
        y = norm(x)
        (y * part_of(normal(*shape, seed=8), sizes)).sum().backward()
    gradients = {f"grad of {name}": all_reduce_sum(p.grad) for name, p in norm.named_parameters()}
    return {"rows y": y.detach(), "rows x": x.grad, **gradients, **dict(norm.named_buffers())}


def edge_conv_case(layers: int, *, sizes: tuple[int, ...]) -> dict[str, Tensor]:
    """Compute EdgeConv, whose statistics must cover the clouds of all processes."""
    torch.manual_seed(3)
    blocks = SyncBatchNorm.convert(nn.ModuleList([edge_block(6, 7), edge_block(7, 5)][:layers])).double()
    with torch.no_grad():
        for block in blocks:
            block[1].weight.copy_(normal(len(block[1].weight), seed=5))
    clouds = sum(sizes)
    x = part_of(normal(clouds, 10, 3, seed=9) * torch.arange(1.0, clouds + 1)[:, None, None] + 2, sizes)
    x.requires_grad_()
    function = {1: edge_conv, 2: edge_conv_two_layers}[layers]
    y = function(x.flatten(0, 1), flatten_neighbors(knn(x, 4)), *blocks).unflatten(0, x.shape[:2])
    (y * part_of(normal(clouds, 10, y.shape[2], seed=10), sizes)).sum().backward()
    gradients = {f"grad of {name}": all_reduce_sum(p.grad) for name, p in blocks.named_parameters()}
    return {"rows y": y.detach(), "rows x": x.grad, **gradients, **dict(blocks.named_buffers())}


def crossnet_case(encoder: str) -> dict[str, Tensor]:
    """Run a training step with 4 objects; return gradients and buffers of the model in DistributedDataParallel."""
    torch.manual_seed(11)
    point_encoder = build_encoder(encoder, k=4, emb_dims=8)
    model = SyncBatchNorm.convert(CrossNet(point_encoder, image_model="resnet18", image_modality="gray")).double()
    inputs = {
        "view1": normal(4, 3, 12, seed=12),
        "view2": normal(4, 3, 12, seed=13),
        "gray": normal(4, 1, 32, 32, seed=14),
    }
    wrapped = DistributedDataParallel(model) if world_size() > 1 else model
    losses = wrapped(**{name: part_of(value, (2, 2)) for name, value in inputs.items()})
    losses.total.backward()
    gradients = {f"grad of {name}": p.grad for name, p in model.named_parameters()}
    mean = all_reduce_sum(losses.total.detach()) / world_size()
    return {"loss": mean, **gradients, **copy.deepcopy(dict(model.named_buffers()))}


def helpers_case() -> dict[str, Tensor]:
    """Gather the rows of all processes in rank order, and the gradient of a sum across processes."""
    x = part_of(torch.arange(4.0), (2, 2)).requires_grad_()
    everything = gather_with_grad(x)
    (everything * torch.arange(1.0, 5)).sum().backward()  # every process has the same loss: the gradients add up
    main = torch.tensor([float(is_main())])
    return {"gathered": everything.detach(), "rows": x.grad / world_size(), "main processes": all_reduce_sum(main)}


CASES: dict[str, Callable[[], dict[str, Tensor]]] = {
    "helpers": helpers_case,
    "NT-Xent": nt_xent_case,
    "NT-Xent, same objects": lambda: nt_xent_case(objects=torch.tensor([0, 1, 2, 2, 3, 0])),
    "con": lambda: objective_case("con", mask=False),
    "con, masked": lambda: objective_case("con", mask=True),
    "ave": lambda: objective_case("ave", mask=False),
    "batch norm of rows": lambda: sync_batch_norm_case(6, 3, sizes=(3, 3)),
    "batch norm of images": lambda: sync_batch_norm_case(4, 3, 5, 2, sizes=(2, 2)),
    "batch norm, one row against four": lambda: sync_batch_norm_case(5, 3, sizes=(1, 4)),
    "batch norm, eval": lambda: sync_batch_norm_case(6, 3, sizes=(3, 3), train=False),
    "EdgeConv, one layer": lambda: edge_conv_case(1, sizes=(2, 2)),
    "EdgeConv, two layers": lambda: edge_conv_case(2, sizes=(2, 2)),
    "EdgeConv, one layer, one cloud against two": lambda: edge_conv_case(1, sizes=(1, 2)),
    "EdgeConv, two layers, one cloud against two": lambda: edge_conv_case(2, sizes=(1, 2)),
    "CrossNet, dgcnn_cls": lambda: crossnet_case("dgcnn_cls"),
    "CrossNet, dgcnn_partseg": lambda: crossnet_case("dgcnn_partseg"),
}


def main(process: int, folder: str) -> None:
    """Run every case in one of the processes and write the results to ``folder``."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=process, world_size=PROCESSES)
    results = {name: case() for name, case in CASES.items()}
    torch.save(results, Path(folder) / f"{process}.pt")
    dist.destroy_process_group()
