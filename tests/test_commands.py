"""Every command of the project runs by path and as a module, from anywhere, with nothing on PYTHONPATH."""

import re
from pathlib import Path

from tests.support.commands import FOLDERS, command
from tests.support.paths import ROOT


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
    # A name that is a folder alone comes from f"... benchmarks.{name}".
    return {name for name in found - {*FOLDERS} if name.split(".")[0].split("/")[0] in (*FOLDERS, "train_crossnet_con")}


def documented_paths():
    return {Path(name) for name in documented(r"python3? ([\w/]+\.py)\b")}


def documented_modules():
    return documented(r"python3? -m ([\w.]+\w)")


def test_every_documented_command_is_there():
    modules = {Path(*module.split(".")) for module in documented_modules()}
    files = {path / "__main__.py" if (ROOT / path).is_dir() else path.with_suffix(".py") for path in modules}
    assert documented_paths() | files <= set(commands())
    assert len(documented_paths()) > 5 and len(modules) > 10
    assert {Path("datasets/pack.py"), Path("datasets/s3dis_prepare.py"), Path("data/unpack.py")} <= set(commands())


def test_every_command_runs_by_path_and_as_a_module():
    calls = [((ROOT / path,), "/") for path in commands() if path.name != "__main__.py"]
    calls += [(("-m", module), ROOT) for module in sorted(documented_modules())]
    failed = {}
    for words, folder in calls:
        done = command(*words, "--help", cwd=folder)
        if done.returncode or "usage:" not in done.stdout:
            failed[words] = done.stderr
    assert not failed
