"""Run the project's commands in forks of the test process, so that none has to import the libraries.

All else is as in a fresh interpreter: the project's modules are imported again, from where Python finds them.
"""

from __future__ import annotations

import io
import logging
import os
import runpy
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping
from pathlib import Path

from tests.support.paths import ROOT

FOLDERS = ("benchmarks", "data", "datasets", "docs", "downstream", "engine", "models", "utils")
PROJECT = (*FOLDERS, "train_crossnet_con", "tests")


def command(
    *words: object, cwd: Path | str = ROOT, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run ``python <words>`` and return its exit code and output.

    Args:
        words: a script, or ``-m`` and a module, and their arguments.
        cwd: current folder.
        env: variables to set.
    """
    argv = [str(word) for word in words]
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        sys.stdout.flush()
        sys.stderr.flush()
        child = os.fork()
        if not child:
            os.dup2(out.fileno(), 1)
            os.dup2(err.fileno(), 2)
            os._exit(_run(argv, cwd, env or {}))
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode())
    return subprocess.CompletedProcess(argv, code, *texts)


def _run(argv: list[str], cwd: Path | str, env: Mapping[str, str]) -> int:
    """Run a command in the child; return its exit code."""
    sys.stdout, sys.stderr = (io.TextIOWrapper(open(fd, "wb", 0, closefd=False), write_through=True) for fd in (1, 2))
    try:
        _forget_the_project()
        os.environ.update(env)
        os.chdir(cwd)
        if argv[0] == "-m":
            sys.path.insert(0, os.getcwd())
            sys.argv = argv[1:]
            runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
        else:
            sys.path.insert(0, str(Path(argv[0]).resolve().parent))
            sys.argv = argv
            runpy.run_path(argv[0], run_name="__main__")
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def _forget_the_project() -> None:
    """Undo what the tests imported, logged and put on the path."""
    for name in [name for name in sys.modules if name.partition(".")[0] in PROJECT]:
        del sys.modules[name]
    sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != ROOT]
    sys.path_importer_cache.clear()
    for logger in (logging.getLogger(), logging.getLogger("crossnet")):
        logger.handlers.clear()
