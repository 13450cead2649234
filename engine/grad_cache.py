"""Loss of a large batch in the memory of a chunk (the gradient cache of Gao et al., arXiv:2101.06983).

NT-Xent needs all projections of a batch at once, but not all activations. The projections are first computed chunk by
chunk without autograd; the loss of the whole batch gives the gradient with respect to the projections; then each chunk
is recomputed with autograd enabled, and its slice of that gradient is backpropagated. This costs one additional forward
pass. Batch statistics are those of a chunk; apart from that the gradients equal those of a single pass.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from models.crossnet import CrossNet, Projections
from models.losses import Losses
from utils.collectives import sync_gradients_if
from utils.reproducible import random_states, restore_random_states


def chunk_count(objects: int, chunk_size: int) -> int:
    """Return the number of chunks of a batch, each of two objects or more."""
    return max(1, min(-(-objects // chunk_size), objects // 2))


def backward_in_chunks(
    network: nn.Module,
    inputs: Mapping[str, Tensor],
    *,
    chunk_size: int,
    precision: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
    scale: Callable[[Tensor], Tensor] = lambda loss: loss,
) -> Losses:
    """Run the forward and backward pass of a batch; gradients accumulate in the parameters.

    Random operations such as dropout draw the same numbers in both passes over a chunk; only the first pass updates
    running statistics.

    Args:
        network: a ``CrossNet``, possibly wrapped in DistributedDataParallel.
        inputs: what ``CrossNet.forward`` takes, each (B, ...).
        chunk_size: largest number of objects in a chunk; chunk sizes differ by at most one.
        precision: returns the context of the forward passes, such as autocast.
        scale: applied to the total loss before its backward pass.

    Returns:
        The batch's losses, detached.

    Raises:
        ValueError: the chunk size is below 2, too few for batch statistics.
    """
    if chunk_size < 2:
        raise ValueError(f"chunk_size = {chunk_size}: batch norm needs at least 2 objects")
    model: CrossNet = getattr(network, "module", network)
    count = len(next(iter(inputs.values())))
    number = chunk_count(count, chunk_size)
    chunks = [
        dict(zip(inputs, parts, strict=True))
        for parts in zip(*(value.tensor_split(number) for value in inputs.values()), strict=True)
    ]
    states, cached = [], []
    with torch.no_grad():
        for chunk in chunks:
            states.append(random_states())
            with precision():
                cached.append(model.project(**chunk))
    after = random_states()
    leaves = [None if parts[0] is None else torch.cat(parts).requires_grad_() for parts in zip(*cached, strict=True)]
    with precision():
        losses = model.losses(Projections(*leaves))
    scale(losses.total).backward()
    gradients = [[None] * number if leaf is None else leaf.grad.tensor_split(number) for leaf in leaves]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    for i, (chunk, state) in enumerate(zip(chunks, states, strict=True)):
        restore_random_states(state)
        with sync_gradients_if(network, i == number - 1):
            with precision():
                projections = network(**chunk, only_project=True)
            pairs = [(p, parts[i]) for p, parts in zip(projections, gradients, strict=True) if p is not None]
            torch.autograd.backward([p for p, _ in pairs], [gradient for _, gradient in pairs])
    with torch.no_grad():
        for buffer, before in buffers:
            buffer.copy_(before)
    restore_random_states(after)
    return Losses(*(loss.detach() for loss in losses))
