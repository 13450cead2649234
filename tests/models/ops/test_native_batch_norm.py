"""Batch norm over several processes with PyTorch's CUDA kernels, replaced by plain formulas on a CPU."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import ReduceOp

from models.ops import batch_norm, native_batch_norm
from models.ops.batch_norm import SyncBatchNorm

RANKS = 2


def dims(x):
    return [0, *range(2, x.ndim)]


def like(channels, x):
    return channels.reshape(1, -1, *[1] * (x.ndim - 2))


def stats(x, eps):
    variance, mean = torch.var_mean(x.float(), dims(x), correction=0)
    return mean, torch.rsqrt(variance + eps)


def gather_stats(x, means, rstds, running_mean, running_var, momentum, eps, counts):
    count, rows = counts.sum(), counts[:, None]
    mean = (means * rows).sum(0) / count
    variance = ((rstds**-2 - eps + (means - mean) ** 2) * rows).sum(0) / count
    if running_mean is not None:
        running_mean.lerp_(mean, momentum)
        running_var.lerp_(variance * count / (count - 1), momentum)
    return mean, torch.rsqrt(variance + eps)


def elemt(x, weight, bias, mean, rstd, eps):
    return ((x - like(mean, x)) * like(rstd * weight, x) + like(bias, x)).to(x.dtype)


def backward_reduce(grad, x, mean, rstd, weight, *needs):
    sum_grad, sum_grad_x = grad.sum(dims(x)), (grad * (x - like(mean, x))).sum(dims(x))
    return sum_grad, sum_grad_x, sum_grad_x * rstd, sum_grad.clone()


def backward_elemt(grad, x, mean, rstd, weight, sum_grad, sum_grad_x, counts):
    count = counts.sum()
    centered = (x - like(mean, x)) * like(sum_grad_x * rstd**2 / count, x)
    return (grad - like(sum_grad / count, x) - centered) * like(rstd * weight, x)


FORMULAS = {
    "batch_norm_stats": stats,
    "batch_norm_gather_stats_with_counts": gather_stats,
    "batch_norm_elemt": elemt,
    "batch_norm_backward_reduce": backward_reduce,
    "batch_norm_backward_elemt": backward_elemt,
}


@pytest.fixture
def formulas(monkeypatch):
    for name, formula in FORMULAS.items():
        monkeypatch.setattr(torch, name, formula)
    native_batch_norm._all_agree.cache_clear()
    yield
    native_batch_norm._all_agree.cache_clear()


@pytest.fixture
def twins(monkeypatch, formulas):
    """Two processes that hold the same rows."""
    for module in (batch_norm, native_batch_norm):
        monkeypatch.setattr(module, "world_size", lambda: RANKS)
    monkeypatch.setattr(native_batch_norm, "_group", lambda: None)
    monkeypatch.setattr(dist, "all_gather_into_tensor", lambda out, x, group: out.copy_(x.expand_as(out)))
    monkeypatch.setattr(dist, "all_reduce", lambda x, op=ReduceOp.SUM, group=None: x.mul_(RANKS))
    monkeypatch.setattr(batch_norm, "normalizes_natively", lambda x: True)


def outcome(norm, x):
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    out = norm(x)
    (out * torch.linspace(-1, 1, out.numel()).reshape(out.shape)).sum().backward()
    return {"out": out, "x": x.grad, **{n: p.grad for n, p in norm.named_parameters()}, **dict(norm.named_buffers())}


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("shape", [(6, 4), (3, 4, 5, 2)])
def test_it_is_batch_norm_of_the_rows_of_all_processes(twins, shape, momentum):
    plain = (nn.BatchNorm1d if len(shape) == 2 else nn.BatchNorm2d)(shape[1], momentum=momentum)
    nn.init.normal_(plain.weight)
    nn.init.normal_(plain.bias)
    ours = SyncBatchNorm.convert(copy.deepcopy(plain))
    x = torch.randn(shape) * 3 + 1
    if len(shape) == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    found = outcome(ours, x)
    doubled = x.clone().requires_grad_()
    out = plain(torch.cat([doubled, doubled]))  # both processes' rows; the losses of both
    loss = out[: len(x)] * torch.linspace(-1, 1, x.numel()).reshape(shape)
    (loss + out[len(x) :] * torch.linspace(-1, 1, x.numel()).reshape(shape)).sum().backward()
    torch.testing.assert_close(found["out"], out[: len(x)])
    torch.testing.assert_close(found["x"] * RANKS, doubled.grad, rtol=1e-4, atol=1e-5)
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(found[name] * RANKS, parameter.grad, rtol=1e-4, atol=1e-4)
    for name, buffer in plain.named_buffers():
        torch.testing.assert_close(found[name], buffer)


def ten_percent_more(formula):
    def wrong(*inputs):
        out = formula(*inputs)
        return out * 1.1 if torch.is_tensor(out) else tuple(part * 1.1 for part in out)

    return wrong


@pytest.mark.parametrize("name", FORMULAS)
def test_the_check_passes_and_notices_a_kernel_that_is_wrong(formulas, monkeypatch, caplog, name):
    device = torch.device("cpu")
    assert native_batch_norm._all_agree(device)
    native_batch_norm._all_agree.cache_clear()
    monkeypatch.setattr(torch, name, ten_percent_more(FORMULAS[name]))
    assert not native_batch_norm._all_agree(device)
    assert "batch norm uses plain operations on cpu" in caplog.text


def test_a_cpu_and_plain_kernels_keep_plain_operations(monkeypatch):
    assert not native_batch_norm.normalizes_natively(torch.zeros(2, 3))
    monkeypatch.setenv("CROSSNET_KERNELS", "torch")
    monkeypatch.setattr(native_batch_norm, "_all_agree", lambda device: pytest.fail("was asked"))
    on_gpu = type("OnGPU", (), {"is_cuda": True, "device": torch.device("cuda:0")})()
    assert not native_batch_norm.normalizes_natively(on_gpu)
