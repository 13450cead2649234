"""The order of the packages, read from their imports: what lies above may import what lies below, never the reverse."""

import ast
from pathlib import Path

from tests.support.paths import ROOT

# From the ground up. The last are commands that call the others' commands: nothing but tests may import them.
ORDER = ("utils", "models", "datasets", "engine", "downstream", "data", "commands")
COMMANDS = (
    "train_crossnet_con",
    "benchmarks",
    "docs",
    "downstream.demo",
    "downstream.demo_report",
    "downstream.predict",
    "downstream.search",
    "data.demo_makers",
)


def below(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def level(module: str) -> int | None:
    """Return the number of the module's package in ``ORDER``; None for a module of another project."""
    if any(below(module, command) for command in COMMANDS):
        return ORDER.index("commands")
    package = module.partition(".")[0]
    return ORDER.index(package) if package in ORDER else None


def modules() -> dict[str, Path]:
    """Every module of the repository outside tests, by name."""
    folders = (*ORDER[:-1], "benchmarks", "docs")
    files = [ROOT / "train_crossnet_con.py", *(path for folder in folders for path in (ROOT / folder).rglob("*.py"))]
    return {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in files}


def imports(path: Path, known: dict[str, Path]) -> set[str]:
    """Modules that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in known else node.module for name in names}
    return found


def test_no_import_runs_up():
    known = modules()
    assert len(known) > 80  # the files are found
    up = [
        f"{module} imports {name}"
        for module, path in known.items()
        for name in imports(path, known)
        if level(name) is not None and level(name) > level(module)
    ]
    assert not up


def test_no_module_imports_tests():
    known = modules()
    assert not [m for m, path in known.items() if any(below(name, "tests") for name in imports(path, known))]


def test_no_modules_import_each_other_in_a_circle():
    known = modules()
    left = {module: imports(path, known) & known.keys() for module, path in known.items()}
    # A package's own __init__ gathers its modules; they import one another directly.
    left = {module: {n for n in names if not below(module, n)} for module, names in left.items()}
    while ready := [module for module, names in left.items() if not names & left.keys()]:
        for module in ready:
            del left[module]
    assert not left
