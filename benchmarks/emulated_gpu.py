"""A GPU that is played by the CPU: real scripts run on it, on a machine without one, and mistakes of devices show.

A tensor on it says that it is on ``cuda:0``, so that scripts, PyTorch's autocast and its random states take the ways
that they take on a GPU; its values lie in a tensor on the CPU, with which its operations compute. Triton kernels are
not run: a launch checks its tensors, and writes zeros.

It notices what would be wrong or slow on a real one (``EmulatedGpu.problems``):

- tensors of two devices in one operation, also in the backward pass: an error, as on a GPU;
- a wait of the host for the GPU, or a copy that blocks, inside a step of training;
- a parameter that has no gradient when the optimizer steps, or one of another device, shape or dtype;
- a Triton kernel that is launched with a tensor on the CPU or one that is not contiguous.

What it cannot show: rounding, memory, speed, what a compiler or a driver does. ``benchmarks.gpu_check`` does, on a GPU.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.cuda.amp.common
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.fake_gpu import SHAPES, load_kernels, python_autograd, set_device_guard
from engine import loop, resume
from models.ops import backend, compiled, native_batch_norm
from utils import collectives

ROOT = Path(__file__).resolve().parents[1]
aten = torch.ops.aten
# Inside this part of the training loop nothing may wait for the GPU ...
STEPS = {loop.train_epoch.__name__}
# ... except where losses are fetched, every --log_every steps, and where a checkpoint is written. Without a fused
# optimizer PyTorch's GradScaler reads in every step whether a gradient was infinite (fp16 with SGD).
MAY_WAIT = {loop.Meter.flush.__name__, resume.save.__name__, "_maybe_opt_step"}


class GpuTensor(Tensor):
    """A tensor on the emulated GPU; ``values`` is the one on the CPU that has its values."""

    values: Tensor

    @staticmethod
    def __new__(cls, values: Tensor) -> GpuTensor:
        """Say that ``values`` are on the GPU."""
        self = Tensor._make_wrapper_subclass(
            cls, values.shape, values.stride(), values.storage_offset(), dtype=values.dtype, device="cuda:0"
        )
        self.values = values
        return self

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Refuse an operation outside of ``emulated_gpu``."""
        if func is aten._has_compatible_shallow_copy_type.default:  # of ``x.data = y``
            return True
        raise RuntimeError(f"{func} of a tensor of an emulated GPU that has been closed")

    def __repr__(self) -> str:
        """Shape and dtype."""
        return f"GpuTensor({tuple(self.shape)}, {self.dtype})"


def on_gpu(x: Any) -> bool:
    """Whether ``x`` is a tensor on the emulated GPU."""
    return isinstance(x, GpuTensor)


def values_of(x: Any) -> Any:
    """Return the values of a tensor on the emulated GPU; return anything else as it is."""
    return x.values if isinstance(x, GpuTensor) else x


def to_host(x: Any) -> Any:
    """Copy a tensor on the emulated GPU to the CPU; anything else stays."""
    return x.values.clone() if isinstance(x, GpuTensor) else x


def _map_tree(function: Callable[[Any], Any], tree: Any) -> Any:
    """Apply ``function`` to everything in nested tuples, lists and dicts, much faster than PyTorch's pytree."""
    if isinstance(tree, (tuple, list)):
        return type(tree)([_map_tree(function, x) for x in tree])
    if isinstance(tree, dict):
        return type(tree)((key, _map_tree(function, x)) for key, x in tree.items())
    return function(tree)


def _tensors_in(*trees: Any) -> list[Tensor]:
    """All tensors of nested tuples, lists and dicts."""
    found: list[Tensor] = []
    for x in trees:
        if isinstance(x, Tensor):
            found.append(x)
        elif isinstance(x, (tuple, list)):
            found += _tensors_in(*x)
        elif isinstance(x, dict):
            found += _tensors_in(*x.values())
    return found


def _frames() -> Iterator[FrameType]:
    frame: FrameType | None = sys._getframe(2)
    while frame:
        yield frame
        frame = frame.f_back


def _running_line() -> str:
    """File and line of the project's code that is running."""
    for frame in _frames():
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(ROOT) and path != Path(__file__) and "site-packages" not in path.parts:
            return f"{path.relative_to(ROOT)}:{frame.f_lineno}"
    return "PyTorch"


class EmulatedGpu(TorchDispatchMode):
    """Computes the operations of tensors on the emulated GPU, and notes what a GPU would not like.

    Attributes:
        problems: what would be wrong or slow on a GPU, with the line of code.
        launches: names of the Triton kernels that were launched.
        steps: of optimizers so far.
        reduced: bytes of each all-reduce of tensors on the GPU.
    """

    def __init__(self) -> None:
        super().__init__()
        self.problems: list[str] = []
        self.launches: list[str] = []
        self.reduced: list[int] = []
        self.steps = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Check an operation's devices, then compute it."""
        kwargs = kwargs or {}
        tensors = _tensors_in(args, kwargs)
        target = torch.device(kwargs.get("device") or "cpu")
        if not any(map(on_gpu, tensors)) and target.type != "cuda":
            return func(*args, **kwargs)
        if func in (aten._to_copy.default, aten.copy_.default):
            self.check_copy(func, args, kwargs)
        else:
            self.check_devices(func, tensors)
        name = func.overloadpacket.__name__
        by_rows = name == "index" and all(x.dtype != torch.bool for x in tensors[1:])
        if not by_rows and {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(func.tags):
            self.wait(f"{func} needs values")
        if name in SHAPES and not torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CPU"):
            return _map_tree(lambda x: GpuTensor(x.zero_()), SHAPES[name](*_map_tree(values_of, args)))
        return self.compute(func, args, kwargs)

    def check_copy(self, func: Any, args: Any, kwargs: Any) -> None:
        """Note a copy between the devices that blocks."""
        inside = func is aten.copy_.default
        source = args[1] if inside else args[0]
        target = args[0].device if inside else torch.device(kwargs.get("device") or source.device)
        blocks = not (kwargs.get("non_blocking") or (inside and len(args) > 2 and args[2]))
        if source.device.type != target.type and blocks and source.numel():
            if target.type == "cpu":
                self.wait("a tensor is copied from the GPU")
            elif self.steps:  # constants may be copied there once
                self.wait("a tensor is copied to the GPU, not with non_blocking=True")

    def compute(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Compute with the values; the result is on the GPU, unless the CPU is asked for or written to."""
        wrappers: dict[int, GpuTensor] = {}

        def values(x: Any) -> Any:
            if isinstance(x, GpuTensor):
                wrappers[id(x.values)] = x
            return values_of(x)

        def wrapped(x: Any) -> Any:
            if not isinstance(x, Tensor):
                return x
            return wrappers[id(x)] if id(x) in wrappers else GpuTensor(x)

        stays = func is aten.copy_.default and not on_gpu(args[0])
        if kwargs.get("device") is not None:
            stays = stays or torch.device(kwargs["device"]).type == "cpu"
            kwargs = {**kwargs, "device": torch.device("cpu")}
        out = func(*_map_tree(values, args), **_map_tree(values, kwargs))
        if torch.Tag.inplace_view in func.tags and on_gpu(args[0]):
            args[0].data = GpuTensor(args[0].values)  # its shape has changed
        return out if stays else _map_tree(wrapped, out)

    def check_devices(self, func: Any, tensors: Sequence[Tensor]) -> None:
        """Refuse tensors in host memory, but for numbers; note an index there: PyTorch would copy it and wait.

        Raises:
            RuntimeError: there is one.
        """
        if not any(x.ndim for x in tensors if x.device.type == "cpu"):
            return
        if func.overloadpacket not in (aten.index, aten.index_put, aten.index_put_):
            raise RuntimeError(f"{func}: expected all tensors to be on the same device, found cuda:0 and cpu")
        self.wait("a tensor on the GPU is indexed by one on the CPU")

    def wait(self, what: str) -> None:
        """Note a wait for the GPU, if it is within the steps of training."""
        names = {frame.f_code.co_name for frame in _frames()}
        if names & STEPS and not names & MAY_WAIT:
            self.problems.append(f"{what} in step {self.steps + 1}, at {_running_line()}")

    def before_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """Check the gradients that an optimizer is about to use."""
        for group in optimizer.param_groups:
            for number, parameter in enumerate(group["params"]):
                what = f"parameter {number} {tuple(parameter.shape)} of step {self.steps + 1}"
                if parameter.device.type != "cuda":
                    self.problems.append(f"{what} is on {parameter.device}")
                elif parameter.grad is None:
                    self.problems.append(f"{what} has no gradient")
                elif _meta(parameter.grad) != _meta(parameter):
                    self.problems.append(f"{what} has a gradient of {_meta(parameter.grad)}, not {_meta(parameter)}")

    def after_step(self, *_: Any) -> None:
        """Count."""
        self.steps += 1

    def launcher(self, kernel: Any) -> Any:
        """Replace a Triton kernel by one whose launch only checks its tensors."""

        def launch(*values: Any, **named: Any) -> None:
            given = dict(zip(kernel.arg_names, values, strict=False)) | named
            missing = [name for name in kernel.arg_names if name not in given]
            if missing:
                raise TypeError(f"{kernel.__name__} is launched without {', '.join(missing)}")
            for name, value in given.items():
                if isinstance(value, Tensor) and not (on_gpu(value) and value.is_contiguous()):
                    what = "is not contiguous" if on_gpu(value) else f"is on {value.device}"
                    raise RuntimeError(f"{kernel.__name__} is launched with {name} {tuple(value.shape)}, which {what}")
            for value in given.values():
                if isinstance(value, GpuTensor):
                    value.values.zero_()  # what it would write is not known, but 0 is a place
            self.launches.append(kernel.__name__)

        return mock.MagicMock(__getitem__=lambda self, grid: launch)


def _meta(x: Tensor) -> tuple[Any, ...]:
    return x.device, tuple(x.shape), x.dtype


# --- what stands for torch.cuda, torch.distributed and Triton ---


class HostGenerator(torch.Generator):
    """A generator of the emulated GPU: one of the CPU, since nothing is drawn."""

    def __new__(cls, device: Any = "cpu") -> HostGenerator:
        """Take any device."""
        return super().__new__(cls, "cpu")


class Replicated(nn.Module):
    """Stands for ``DistributedDataParallel``, whose C++ part needs memory on the GPU."""

    def __init__(self, module: nn.Module, **_: Any) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module."""
        return self.module(*args, **kwargs)

    def no_sync(self) -> contextlib.AbstractContextManager:
        """Nothing to keep apart."""
        return contextlib.nullcontext()


def _module_to(real: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """``nn.Module.to`` that replaces parameters: PyTorch's own swaps their memory, which these do not have."""

    def to(self: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        device, dtype, _, memory_format = torch._C._nn._parse_to(*args, **kwargs)
        to_gpu = device is not None and device.type == "cuda"
        if not to_gpu and not any(map(on_gpu, (*self.parameters(), *self.buffers()))):
            return real(self, *args, **kwargs)
        for module in self.modules():
            for group in (module._parameters, module._buffers):
                for name, x in group.items():
                    if x is None:
                        continue
                    layout = {"memory_format": memory_format} if memory_format is not None and x.ndim == 4 else {}
                    moved = x.to(device or x.device, (dtype if x.is_floating_point() else None) or x.dtype, **layout)
                    if moved is not x:
                        group[name] = nn.Parameter(moved.detach()) if isinstance(x, nn.Parameter) else moved
        return self

    return to


def _cuda(gpu: EmulatedGpu, count: int, stack: contextlib.ExitStack) -> None:
    """Replace what asks the driver."""
    host_state = torch.get_rng_state
    answers: dict[str, Callable[..., Any]] = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: count,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "device_of": lambda tensor: contextlib.nullcontext(),
        "is_bf16_supported": lambda *_, **__: True,
        "get_device_name": lambda *_: "an emulated GPU",
        "get_device_properties": lambda *_: SimpleNamespace(name="emulated", total_memory=1 << 30, major=9, minor=0),
        "memory_allocated": lambda *_: 1 << 20,
        "max_memory_allocated": lambda *_: 2 << 20,
        "max_memory_reserved": lambda *_: 2 << 20,
        "reset_peak_memory_stats": lambda *_: None,
        "set_sync_debug_mode": lambda mode: None,
        "get_rng_state": lambda *_: host_state(),
        "get_rng_state_all": lambda: [host_state()] * count,
        "set_rng_state": lambda *_: None,
        "synchronize": lambda *_: gpu.wait("torch.cuda.synchronize is called"),
    }
    for name, answer in answers.items():
        stack.enter_context(mock.patch.object(torch.cuda, name, answer))
    stack.enter_context(mock.patch.object(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False))
    stack.enter_context(mock.patch.object(torch, "Generator", HostGenerator))
    stack.enter_context(mock.patch.object(nn.Module, "to", _module_to(nn.Module.to)))
    stack.enter_context(torch.backends.cudnn.flags(enabled=False))  # the CPU has no form of its operations
    stack.enter_context(mock.patch("torch.utils.data._utils.pin_memory.pin_memory", lambda data, device=None: data))
    host = [torch.profiler.ProfilerActivity.CPU]  # that of GPUs wants a driver, and says so at every operation
    profile = torch.profiler.profile
    stack.enter_context(mock.patch.object(torch.profiler, "profile", lambda activities: profile(activities=host)))
    real_save = torch.save
    stack.enter_context(
        mock.patch.object(torch, "save", lambda obj, *a, **k: real_save(_map_tree(to_host, obj), *a, **k))
    )


def _processes(gpu: EmulatedGpu, count: int, stack: contextlib.ExitStack) -> None:
    """Be process 0 of several that hold the same tensors."""

    def all_reduce(x: Tensor, op: Any = dist.ReduceOp.SUM, **_: Any) -> None:
        if on_gpu(x):
            if not x.is_contiguous():
                raise RuntimeError(f"all_reduce of {tuple(x.shape)}, which is not contiguous")
            gpu.reduced.append(x.numel() * x.element_size())
        elif op == dist.ReduceOp.SUM:
            x.mul_(count)

    def all_gather(slots: list[Tensor], x: Tensor, **_: Any) -> None:
        for slot in slots:
            slot.copy_(x)

    def all_gather_object(slots: list[Any], x: Any, **_: Any) -> None:
        slots[:] = [x] * count

    answers: dict[str, Callable[..., Any]] = {
        "is_initialized": lambda: True,
        "get_rank": lambda *_: 0,
        "get_world_size": lambda *_: count,
        "all_reduce": all_reduce,
        "all_gather": all_gather,
        "all_gather_into_tensor": lambda out, x, **_: all_reduce(out.copy_(x.repeat(count, *[1] * (x.ndim - 1)))),
        "all_gather_object": all_gather_object,
        "gather_object": lambda x, slots=None, **_: all_gather_object(slots, x),
        "broadcast": lambda *_, **__: None,
        "broadcast_object_list": lambda *_, **__: None,
    }
    for name, answer in answers.items():
        stack.enter_context(mock.patch.object(dist, name, answer))
    stack.enter_context(mock.patch.object(collectives, "DistributedDataParallel", Replicated))
    stack.enter_context(mock.patch.object(native_batch_norm, "_group", lambda: None))
    launcher = {"RANK": 0, "WORLD_SIZE": count, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": count}
    stack.enter_context(mock.patch.dict(os.environ, {name: str(value) for name, value in launcher.items()}))


def _triton(gpu: EmulatedGpu, stack: contextlib.ExitStack) -> None:
    """Check launches in the place of running kernels."""
    triton_kernels = load_kernels()
    for name, value in list(vars(triton_kernels).items()):
        if hasattr(value, "arg_names") and hasattr(value, "__getitem__"):
            stack.enter_context(mock.patch.object(triton_kernels, name, gpu.launcher(value)))
    stack.enter_context(mock.patch.object(backend, "check", lambda *_: None))


def _forget_what_is_cached() -> None:
    """Clear the caches of the project's functions: tensors of one emulated GPU are of no use to any other."""
    for module in list(sys.modules.values()):
        path = getattr(module, "__file__", None) or ""
        if path.startswith(f"{ROOT}{os.sep}") and "site-packages" not in path:
            for value in list(vars(module).values()):
                if hasattr(value, "cache_clear"):
                    value.cache_clear()


@contextlib.contextmanager
def emulated_gpu(*, form: str = "torch", processes: int = 1) -> Iterator[EmulatedGpu]:
    """Inside, the machine has GPUs that compute nothing.

    Args:
        form: of the encoder's inner loops: ``torch`` or ``triton`` (see ``models.ops.backend``).
        processes: above 1, this process is the first of as many that hold the same tensors, with a GPU each.
    """
    # The first backward pass of a process starts a thread for each device, after which autograd fails in forked
    # children. Let it find no device: the guard set below counts as one.
    torch.ones((), requires_grad=True).backward()
    gpu = EmulatedGpu()
    with contextlib.ExitStack() as stack:
        stack.callback(_forget_what_is_cached)
        _forget_what_is_cached()
        stack.enter_context(mock.patch.dict(os.environ, {backend.VARIABLE: form}))
        _cuda(gpu, processes, stack)
        if form == "triton":
            _triton(gpu, stack)
        # What is checked at first use: PyTorch's kernels of several processes have no values here, compilers no target.
        stack.enter_context(mock.patch.object(compiled, "_fused", lambda function: function))
        stack.enter_context(mock.patch.object(native_batch_norm, "_all_agree", lambda device: True))
        if processes > 1:
            _processes(gpu, processes, stack)
        stack.enter_context(python_autograd(lambda node: None))
        for register, hook in (
            (register_optimizer_step_pre_hook, gpu.before_step),
            (register_optimizer_step_post_hook, gpu.after_step),
        ):
            stack.callback(register(hook).remove)
        set_device_guard()
        # torch.tensor(..., device="cuda") then makes a tensor on the CPU and moves it, which a mode can see.
        stack.callback(torch._C._set_only_lift_cpu_tensors, torch._C._only_lift_cpu_tensors())
        torch._C._set_only_lift_cpu_tensors(True)
        stack.enter_context(gpu)
        yield gpu
