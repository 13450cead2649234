"""Compile the Triton kernels for GPUs on a machine without one.

The interpreter runs kernels that a compiler may reject. Here every launch of the functions in
models/ops/triton_kernels.py is compiled to machine code instead of being run, for tensors like those of an
encoder. Needs Triton 3.3 or newer.

  python -m tests.compile_kernels                  # compute capabilities 7.5, 8.0 and 9.0
  python -m tests.compile_kernels --capability 90 --points 4096
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # also run by path
os.environ.pop("TRITON_INTERPRET", None)  # before Triton is imported

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import JITFunction

from models.ops import triton_kernels
from utils.cli import HelpFormatter, run
from utils.errors import UserError

TYPES = {torch.float32: "*fp32", torch.int64: "*i64", torch.int32: "*i32", torch.int16: "*i16"}
ALIGNED = [["tt.divisibility", 16]]  # as Triton finds pointers and round sizes in a real launch


class CompileOnly:
    """Replaces a kernel: a launch compiles it and runs nothing."""

    def __init__(self, kernel: JITFunction, capability: int, done: Callable[[str, str], None]) -> None:
        self.kernel, self.target, self.done = kernel, GPUTarget("cuda", capability, 32), done

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return self.launch

    def launch(self, *positional: Any, num_warps: int = 4, **named: Any) -> None:
        names = self.kernel.arg_names
        values = dict(zip(names, positional, strict=False)) | named
        signature, constants, attributes = {}, {}, {}
        for i, name in enumerate(names):
            value = values[name]
            if self.kernel.params[i].is_constexpr or (not torch.is_tensor(value) and value == 1):
                signature[name], constants[(i,)] = "constexpr", value
                continue
            signature[name] = TYPES[value.dtype] if torch.is_tensor(value) else "i32"
            if torch.is_tensor(value) or value % 16 == 0:
                attributes[(i,)] = ALIGNED
        source = ASTSource(fn=self.kernel, signature=signature, constexprs=constants, attrs=attributes)
        compiled = triton.compile(source, target=self.target, options={"num_warps": num_warps})
        self.done(self.kernel.__name__, resources(compiled.asm["cubin"]))


def resources(cubin: bytes) -> str:
    """Return the GPU resources of a compiled kernel, if Triton's tools report them: registers, spills, instructions."""
    needs = f"{len(cubin)} bytes"
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    if not all((tools / tool).is_file() for tool in ("cuobjdump", "nvdisasm")):
        return needs
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _output(tools / "cuobjdump", "--dump-resource-usage", file.name)
        code = _output(tools / "nvdisasm", "-c", file.name)
    registers, spilled = (re.search(rf"{name}:(\d+)", usage).group(1) for name in ("REG", "STACK"))
    instructions, loops = _instructions(code)
    text = ", ".join(map(str, loops)) or "none"
    return f"{needs}, {registers} registers, {spilled} bytes spilled, {instructions} instructions, of loops: {text}"


def _output(*command: str | Path) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _instructions(code: str) -> tuple[int, list[int]]:
    """Return the instructions of a disassembly, and those between each backward jump and its target."""
    starts: dict[str, int] = {}
    loops, count = [], 0
    for line in code.splitlines():
        if label := re.match(r"\s*(\.L_\w+):", line):
            starts[label.group(1)] = count
        elif instruction := re.match(r"\s*/\*[0-9a-f]+\*/\s+(.*?);", line):
            count += instruction.group(1) != "NOP"
            jump = re.search(r"BRA.*`\((\.L_\w+)\)", instruction.group(1))
            if jump and count - starts.get(jump.group(1), count) > 1:
                loops.append(count - starts[jump.group(1)])
    return count, loops


def compile_all(*, capability: int, points: int, k: int, width: int) -> list[str]:
    """Compile every kernel that the module's functions launch; return a line about each."""
    lines = []

    def done(name: str, needs: str) -> None:
        lines.append(f"{name} for compute capability {capability / 10}: {needs}")
        print(lines[-1], flush=True)

    # Kernels are launched by the module's public functions; a kernel without a launch is part of another.
    kernels = {name: x for name, x in vars(triton_kernels).items() if isinstance(x, JITFunction)}
    launched = {name for name in kernels if f"{name}[" in Path(triton_kernels.__file__).read_text(encoding="utf-8")}
    stand_ins = {name: CompileOnly(kernels[name], capability, done) for name in launched}
    cloud = torch.randn(1, points, 3)
    a, c, grad_at_argmax = torch.randn(3, points, width)
    grad_scale, constant = torch.randn(2, width)
    neighbors = torch.arange(points * k).view(points, k) % points
    with mock.patch.multiple(triton_kernels, **stand_ins):
        triton_kernels.nearest(cloud, k)
        triton_kernels.largest(cloud[..., 0].expand(2, -1), k)
        _, argmax, *_ = triton_kernels.edge_extremes(a, c, neighbors, constant.sign(), about=grad_scale)
        triton_kernels.edge_extremes(a, c, neighbors, constant.sign(), about=None)
        for argmax_type in (torch.int16, torch.int32):
            triton_kernels.edge_gradients(a, c, neighbors, grad_scale, constant, grad_at_argmax, argmax.to(argmax_type))
    missing = [name for name in launched if not any(line.startswith(f"{name} ") for line in lines)]
    if missing:
        raise RuntimeError(f"not compiled: {', '.join(missing)}")
    return lines


def main(argv: list[str] | None = None) -> list[str]:
    """Compile for each capability asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.prog = "python -m tests.compile_kernels"
    parser.add_argument("--capability", type=int, nargs="+", default=[75, 80, 90], metavar="CC", help="75 is 7.5")
    parser.add_argument("--points", type=int, default=2048, metavar="N", help="points of a cloud")
    parser.add_argument("--k", type=int, default=20, help="neighbors per point")
    parser.add_argument("--width", type=int, default=128, metavar="C", help="channels of a layer")
    args = parser.parse_args(argv)
    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 3):  # its ASTSource has other arguments before
        raise UserError(f"Triton 3.3 or newer is needed to compile without a GPU, this is {triton.__version__}")
    return [
        line
        for capability in args.capability
        for line in compile_all(capability=capability, points=args.points, k=args.k, width=args.width)
    ]


if __name__ == "__main__":
    run(main)
