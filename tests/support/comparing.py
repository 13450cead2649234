"""Compare runs and computations."""

from __future__ import annotations

import json
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def metrics(folder: Path) -> list[dict[str, Any]]:
    """Return the records of a run, one per epoch."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def equal(a: Any, b: Any) -> bool:
    """Return whether two trees of tensors and plain values are equal bit for bit."""
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, Mapping):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def assert_close(
    actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], *, tolerance: float, without: Container[str] = ()
) -> None:
    """Check that tensors agree by name, within ``tolerance`` times the largest absolute value (times 1 at least).

    Args:
        actual: tensors by name.
        expected: what they should be.
        tolerance: relative to the scale of each tensor.
        without: names of tensors that may differ.
    """
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        if name not in without:
            atol = tolerance * max(1.0, value.abs().max().item())
            torch.testing.assert_close(actual[name], value, rtol=0, atol=atol, msg=lambda text, n=name: f"{n}: {text}")
