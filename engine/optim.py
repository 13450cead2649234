"""Optimizers, learning rates and mixed precision."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from engine.config import RunConfig

AMP_DTYPES = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}
LR_SCHEDULES = ("cosine", "released")


def cosine_lr(step: int, *, total: int, base: float, floor: float = 0.0) -> float:
    """Return the cosine-decayed rate (arXiv:1608.03983): from ``base`` at step 0 to ``floor`` at step ``total``."""
    return floor + (base - floor) * (1 + math.cos(math.pi * step / total)) / 2


def learning_rate(step: int, *, schedule: str, total: int, epochs: int, base: float) -> float:
    """Return the learning rate of a pretraining step.

    Args:
        step: optimizer steps done, from 0.
        schedule: ``cosine`` decays once over the whole run; ``released`` (the released code) steps a cosine of period
            2 x epochs at every batch, so the rate keeps oscillating between ``base`` and 0.
        total: steps of the run.
        epochs: epochs of the run.
        base: highest rate.
    """
    return cosine_lr(step, total=total if schedule == "cosine" else epochs, base=base)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def autocast(device: torch.device, amp: str) -> contextlib.AbstractContextManager:
    """Return the autocast context for ``--amp`` ``off``, ``bf16`` or ``fp16``."""
    dtype = AMP_DTYPES[amp]
    return contextlib.nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)


def grad_scaler(device: torch.device, amp: str) -> torch.amp.GradScaler:
    """Return the loss scaler, enabled for fp16 only: bf16 has the range of float32."""
    return torch.amp.GradScaler(device.type, enabled=amp == "fp16")


SGD_FACTOR = 100  # the released scripts multiply the rate by this for SGD


def base_rate(config: RunConfig) -> float:
    """Return the highest learning rate: ``--lr``, or 100 times that with SGD, as released."""
    return config.lr * (SGD_FACTOR if config.use_sgd else 1)


def build_optimizer(model: nn.Module, config: RunConfig) -> torch.optim.Optimizer:
    """Return Adam, or SGD with momentum, over all parameters that require gradients.

    On a GPU, Adam is PyTorch's fused form: one pass over the parameters, and no host synchronization in fp16.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if config.use_sgd:
        return torch.optim.SGD(
            parameters, lr=base_rate(config), momentum=config.momentum, weight_decay=config.weight_decay
        )
    fused = all(parameter.is_cuda for parameter in parameters)
    return torch.optim.Adam(
        parameters, lr=base_rate(config), weight_decay=config.weight_decay, fused=True if fused else None
    )


def load_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Load an optimizer's state; whether its step is fused depends on this device, not on the checkpoint.

    Args:
        optimizer: one of the same kind, over the same parameters.
        state: the ``state_dict`` in the checkpoint, from a run on any device.

    Raises:
        ValueError: a tensor does not have the shape of its parameter.
    """
    own = {name: optimizer.defaults[name] for name in ("fused", "foreach") if name in optimizer.defaults}
    groups = [{**group, **own} for group in state["param_groups"]]
    optimizer.load_state_dict({**state, "param_groups": groups})
    for parameter, values in optimizer.state.items():
        for name, value in values.items():  # load_state_dict does not check shapes
            if value is not None and value.shape not in ((), parameter.shape):
                raise ValueError(f"{name} of the optimizer is {tuple(value.shape)}, not {tuple(parameter.shape)}")
        if not own.get("fused") and torch.is_tensor(values.get("step")):
            values["step"] = values["step"].cpu()  # an unfused optimizer keeps it on the CPU
