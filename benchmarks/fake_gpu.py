"""A GPU that computes nothing: a training step on fake ``cuda:0`` tensors, which have shapes, strides and no numbers.

Needs neither a driver nor memory. Three things are replaced, because they would need a driver: PyTorch's autograd
engine by a walk in Python, launches of Triton kernels by a record of them, and collectives by a record of their bytes.
"""

from __future__ import annotations

import contextlib
import importlib
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import Node, get_gradient_edge
from torch.testing._internal.distributed.fake_pg import FakeStore

from models.ops import backend, compiled, native_batch_norm
from utils.errors import UserError

DEVICE = torch.device("cuda:0")
KERNELS = ("_select", "_edge_forward", "_gradient_of_centers", "_gradient_of_neighbors")


def fakes_gpus() -> bool:
    """Return whether tensors can say here that they are on a GPU: there is a driver, or PyTorch does without (2.10)."""
    return hasattr(torch._C, "_ensureCUDADeviceGuardSet") or torch.cuda.is_available()


def set_device_guard() -> None:
    """Set the guard of CUDA devices that autograd and fake tensors ask for; without a driver, one that does nothing.

    Raises:
        UserError: PyTorch is older than 2.10 and the machine has no driver.
    """
    if not fakes_gpus():
        raise UserError(
            f"a GPU can be emulated without a driver from PyTorch 2.10 on; this is {torch.__version__}: "
            "pip install -U torch torchvision"
        )
    if hasattr(torch._C, "_ensureCUDADeviceGuardSet"):
        torch._C._ensureCUDADeviceGuardSet()


def load_kernels() -> ModuleType:
    """Return ``models.ops.triton_kernels``. This module must import without Triton, which PyTorch for CPUs lacks.

    Raises:
        UserError: Triton is missing.
    """
    try:
        return importlib.import_module("models.ops.triton_kernels")
    except ImportError as error:
        raise UserError(f"the Triton kernels cannot be imported ({error}): pip install triton, on Linux") from error


class Launch(NamedTuple):
    """One launch of a Triton kernel."""

    kernel: str
    programs: int
    arguments: Mapping[str, Any]  # by name: tensors and numbers


class Recorder:
    """Override what a caller wants to know; by default nothing is noted."""

    def entering(self, node: Node) -> None:
        """Handle a node of the backward pass before it runs."""

    def launched(self, launch: Launch) -> None:
        """Handle a launch of a Triton kernel."""

    def fused(self, function: Callable) -> Callable:
        """Return what runs for a function that ``torch.compile`` would fuse."""
        return function

    def reduced(self, x: Tensor) -> None:
        """Handle an all-reduce or all-gather of ``x``."""


def _channel_statistics(x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return tuple(x.new_empty(x.shape[1], dtype=torch.promote_types(x.dtype, torch.float32)) for _ in range(2))


# Shapes of what PyTorch computes on real GPUs only.
SHAPES: dict[str, Callable] = {
    "batch_norm_update_stats": _channel_statistics,
    "batch_norm_stats": _channel_statistics,
    "batch_norm_gather_stats_with_counts": _channel_statistics,
    "batch_norm_elemt": lambda x, *_: torch.empty_like(x),
    "batch_norm_backward_reduce": lambda grad, x, *_: (*_channel_statistics(x), *_channel_statistics(x)),
    "batch_norm_backward_elemt": lambda grad, x, *_: torch.empty_like(x),
}


@contextlib.contextmanager
def fake_gpu(recorder: Recorder, *, ranks: int = 1) -> Iterator[None]:
    """Inside, tensors are fake and a backward pass runs; put ``cuda:0`` wherever a device is asked for.

    Args:
        recorder: told of nodes, launches and collectives.
        ranks: processes of which this one pretends to be the first.

    Raises:
        UserError: PyTorch is older than 2.10 and the machine has no driver, or Triton is missing.
    """
    library = torch.library.Library("aten", "IMPL")
    for name, shape in SHAPES.items():
        library.impl(name, shape, "Meta")
    set_device_guard()
    triton_kernels = load_kernels()
    stubs = {name: _Stub(getattr(triton_kernels, name), recorder.launched) for name in KERNELS}
    with contextlib.ExitStack() as stack:
        for patch in (
            mock.patch.multiple(triton_kernels, **stubs),
            mock.patch.object(backend, "_working_kernels", lambda device: (triton_kernels, "")),
            mock.patch.object(compiled, "_fused", recorder.fused),
            mock.patch.object(native_batch_norm, "_all_agree", lambda device: True),
            mock.patch.dict("os.environ", {backend.VARIABLE: "auto"}),
            mock.patch.object(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False),
            mock.patch.object(torch.cuda, "is_bf16_supported", lambda *_, **__: True),
            mock.patch.object(torch.cuda, "device_of", lambda tensor: contextlib.nullcontext()),
            python_autograd(recorder.entering),
            _pretended_ranks(ranks, recorder.reduced),
            FakeTensorMode(allow_non_fake_inputs=True),
        ):
            stack.enter_context(patch)
        stack.callback(library._destroy)
        yield


@contextlib.contextmanager
def python_autograd(entering: Callable[[Node], None]) -> Iterator[None]:
    """Inside, backward passes run node by node in Python: the threads of PyTorch's engine for GPUs need a driver.

    Args:
        entering: called before a node runs.
    """
    takes_tensors: dict[Node, list[bool]] = {}
    apply = torch.autograd.Function.__dict__["apply"]

    def recorded_apply(cls: type, *inputs: Any, **named: Any) -> Any:
        out = apply.__get__(None, cls)(*inputs, **named)
        first = next((part for part in (out if isinstance(out, tuple) else (out,)) if torch.is_tensor(part)), None)
        if first is not None and first.grad_fn is not None:
            takes_tensors[first.grad_fn] = [torch.is_tensor(x) for x in inputs]
        return out

    def backward(roots: Sequence[Tensor], gradients: Sequence[Tensor | None], **_: Any) -> None:
        _walk(roots, gradients, takes_tensors, entering)

    def backward_of_one(root: Tensor, gradient: Tensor | None = None, **_: Any) -> None:
        backward([root], [gradient])

    with (
        mock.patch.object(torch.autograd.Function, "apply", classmethod(recorded_apply)),
        mock.patch.object(torch.autograd, "backward", backward),
        mock.patch.object(torch.Tensor, "backward", backward_of_one),
    ):
        yield


class _Stub:
    """Stands for a Triton kernel: a launch is recorded, not run."""

    def __init__(self, kernel: Any, launched: Callable[[Launch], None]) -> None:
        self.names, self.name, self.launched = kernel.arg_names, kernel.__name__, launched

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*positional: Any, **named: Any) -> None:
            arguments = dict(zip(self.names, positional, strict=False)) | named
            for name, value in arguments.items():
                if torch.is_tensor(value) and value.device != DEVICE:
                    raise RuntimeError(f"{self.name} got {name} on {value.device}")
            self.launched(Launch(self.name, math.prod(grid), arguments))

        return launch


@contextlib.contextmanager
def _pretended_ranks(ranks: int, reduced: Callable[[Tensor], None]) -> Iterator[None]:
    if ranks == 1:
        yield
        return

    def gather(out: Tensor, x: Tensor, *_: Any, **__: Any) -> None:
        reduced(out)

    dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    try:
        with (
            mock.patch.object(dist, "all_reduce", lambda x, *_, **__: reduced(x)),
            mock.patch.object(dist, "all_gather_into_tensor", gather),
        ):
            yield
    finally:
        dist.destroy_process_group()


def _walk(
    roots: Sequence[Tensor],
    gradients: Sequence[Tensor | None],
    takes_tensors: Mapping[Node, list[bool]],
    entering: Callable[[Node], None],
) -> None:
    """Run the backward pass node by node, as PyTorch's engine does; its threads for GPUs need a driver."""
    edges = [get_gradient_edge(root) for root in roots]
    users: Counter[Node] = Counter()  # how many nodes have yet to pass a gradient on to a node
    known = {edge.node for edge in edges}
    stack = list(known)  # several roots may be outputs of one node
    while stack:
        for node, _ in stack.pop().next_functions:
            if node is not None:
                users[node] += 1
                if node not in known:
                    known.add(node)
                    stack.append(node)
    arrived: dict[Node, dict[int, Tensor]] = {}

    def pass_on(node: Node, slot: int, gradient: Tensor | None) -> None:
        if gradient is None:
            return
        expected = node._input_metadata[slot]
        if gradient.device != expected.device:
            raise RuntimeError(f"{node.name()} got a gradient on {gradient.device}, its input is on {expected.device}")
        if tuple(gradient.shape) != tuple(expected.shape):
            gradient = gradient.sum_to_size(tuple(expected.shape))
        gradient = gradient.to(expected.dtype)
        slots = arrived.setdefault(node, {})
        slots[slot] = gradient if slot not in slots else slots[slot] + gradient

    with torch.no_grad():
        for root, edge, gradient in zip(roots, edges, gradients, strict=True):
            pass_on(edge.node, edge.output_nr, torch.ones_like(root) if gradient is None else gradient)
        ready = [node for node in dict.fromkeys(edge.node for edge in edges) if not users[node]]
        while ready:
            node = ready.pop()
            outputs = _gradients_of(node, arrived.pop(node, {}), takes_tensors.get(node), entering)
            for (target, slot), gradient in zip(node.next_functions, outputs, strict=True):
                if target is not None:
                    pass_on(target, slot, gradient)
                    users[target] -= 1
                    if not users[target]:
                        ready.append(target)


def _gradients_of(
    node: Node, slots: dict[int, Tensor], takes_tensors: list[bool] | None, entering: Callable[[Node], None]
) -> Sequence[Tensor | None]:
    """Return what a node passes to each of its ``next_functions``."""
    if not slots:
        return [None] * len(node.next_functions)
    entering(node)
    inputs: list[Tensor | None] = [slots.get(i) for i in range(len(node._input_metadata))]
    if takes_tensors is None:  # one of PyTorch's own
        outputs = node(*inputs)
        outputs = outputs if isinstance(outputs, (tuple, list)) else (outputs,)
        return outputs[: len(node.next_functions)] if node.next_functions else ()
    for i, expected in enumerate(node._input_metadata):  # a Function gets zeros for what has no gradient
        if inputs[i] is None:
            inputs[i] = torch.zeros(tuple(expected.shape), dtype=expected.dtype, device=expected.device)
    outputs = node.apply(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return [gradient for gradient, is_tensor in zip(outputs, takes_tensors, strict=True) if is_tensor]
