"""Every command of the project runs by path and as a module, from anywhere, with nothing on PYTHONPATH."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("benchmarks", "data", "datasets", "docs", "downstream", "engine", "models", "utils")

# Reads lines of "m|p script" and prints the line and the exit code of each. The libraries are loaded once; each command
# runs in a child that starts as a fresh interpreter does: with the script's folder, or the current one, on the path.
RUNNER = """
import contextlib, io, os, runpy, sys
import h5py, matplotlib.pyplot, mpl_toolkits.mplot3d, numpy, PIL.Image, plyfile, torch, torchvision, tqdm, trimesh
import scipy.spatial, sklearn.manifold, sklearn.model_selection, sklearn.svm, torch.utils.data

root = sys.argv[1]
for line in sys.stdin:
    how, script = line.split()
    if os.fork() == 0:
        code = 99
        try:
            sys.argv = [script, "--help"]
            os.chdir(root if how == "m" else "/")
            sys.path[0] = os.getcwd() if how == "m" else os.path.dirname(os.path.join(root, script))
            with contextlib.redirect_stdout(io.StringIO()) as out:
                if how == "m":
                    runpy.run_module(script, run_name="__main__", alter_sys=True)
                else:
                    runpy.run_path(os.path.join(root, script), run_name="__main__")
        except SystemExit as end:
            code = end.code or 0 if "usage:" in out.getvalue() else 98
        except BaseException as error:
            print(script, repr(error), file=sys.stderr)
        os._exit(code)
    print(how, script, os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
"""


def commands():
    """Scripts of the project, by their path below its root."""
    scripts = [ROOT / "train_crossnet_con.py"]
    scripts += [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
    mark = re.compile(r"^if __name__ == .__main__.:", re.MULTILINE)
    return [path.relative_to(ROOT) for path in scripts if mark.search(path.read_text(encoding="utf-8"))]


def documented(pattern):
    """Scripts that pages, help texts, the Makefile and messages name in a command, as ``pattern`` finds them."""
    texts = [ROOT / "Makefile", *ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("data/**/*.md")]
    texts += [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]
    found = {name for path in texts for name in re.findall(pattern, path.read_text(encoding="utf-8"))}
    return {name for name in found if name.split(".")[0].split("/")[0] in (*FOLDERS, "train_crossnet_con")}


def documented_paths():
    return {Path(name) for name in documented(r"python3? ([\w/]+\.py)\b")}


def documented_modules():
    return documented(r"python3? -m ([\w.]+\w)")


def test_every_documented_command_is_there():
    modules = {Path(*module.split(".")).with_suffix(".py") for module in documented_modules()}
    assert documented_paths() | modules <= set(commands())
    assert len(documented_paths()) > 5 and len(modules) > 10
    assert {Path("datasets/pack.py"), Path("datasets/s3dis_prepare.py"), Path("data/unpack.py")} <= set(commands())


def test_every_command_runs_by_path_and_as_a_module():
    lines = [f"p {path}" for path in commands()]
    lines += [f"m {module}" for module in sorted(documented_modules())]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", RUNNER, str(ROOT)],
        input="\n".join(lines),
        env=environment | {"MPLBACKEND": "Agg", "OMP_NUM_THREADS": "1"},
        cwd="/",
        capture_output=True,
        text=True,
    )
    results = dict(line.rsplit(" ", 1) for line in done.stdout.splitlines())
    assert {line: results.get(line) for line in lines} == dict.fromkeys(lines, "0"), done.stderr
