"""The plan of docs/results.md, and the command that runs it."""

import json
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import train_crossnet_con
from benchmarks import commands, growth, reproduce
from benchmarks.plan import PLAN, Plan, Row
from benchmarks.reproduce import Runner, command_line
from benchmarks.result_pages import draw_effects, mean_and_deviation, value_at
from benchmarks.spread import Difference
from data import make_shapes
from datasets import pack
from downstream import search
from downstream.classification import few_shot, finetune
from downstream.classification import main as classification
from downstream.segmentation import main_partseg, main_semseg
from tests.support.commands import command
from tests.support.paths import ROOT
from tests.support.small_run import arguments
from utils.errors import UserError

PARSERS = {
    "train_crossnet_con.py": train_crossnet_con.build_parser,
    "data/make_shapes.py": make_shapes.build_parser,
    "datasets/pack.py": pack.build_parser,
    "downstream/classification/main.py": classification.build_parser,
    "downstream/classification/few_shot.py": few_shot.FewShotConfig.parser,
    "downstream/classification/finetune.py": finetune.build_parser,
    "downstream/segmentation/main_partseg.py": main_partseg.build_parser,
    "downstream/segmentation/main_semseg.py": main_semseg.build_parser,
    "benchmarks/growth.py": growth.BENCHMARK.parser,
    "downstream/search.py": search.SearchConfig.parser,
}
# A script that scores: writes a number that depends on the seed, and counts its calls.
SCRIPT = """
import argparse, json, pathlib
p = argparse.ArgumentParser()
p.add_argument("--seed", type=int); p.add_argument("--json"); p.add_argument("--base", type=float)
p.add_argument("--fail", action="store_true"); p.add_argument("--noise")
a = p.parse_args()
calls = pathlib.Path(__file__).with_name("calls")
calls.write_text(calls.read_text() + "x" if calls.exists() else "x")
assert not a.fail, "asked to fail"
extra = len(calls.read_text()) if a.noise else 0
pathlib.Path(a.json).write_text(json.dumps({"accuracy": a.base + a.seed + extra, "shots": {"1": [40.0, 2.0]}}))
"""


def run_here(monkeypatch, call):
    """Call ``call(argv, output file)`` in place of every process of this interpreter; None starts the process."""

    class Child(subprocess.Popen):
        def __init__(self, argv, **settings):
            self.code = call(argv, settings["stdout"]) if argv[0] == sys.executable else None
            if self.code is None:
                super().__init__(argv, **settings)

        def wait(self, timeout=None):
            return super().wait(timeout) if self.code is None else self.code

    monkeypatch.setattr(subprocess, "Popen", Child)


@pytest.fixture
def project(tmp_path, monkeypatch):
    """Write a plan of one row that can run and one whose data is missing; return the command line for it."""
    (tmp_path / "score.py").write_text(SCRIPT)
    (tmp_path / "here").mkdir()
    write_plan(tmp_path)
    paths = {"plan": "plan.toml", "work_dir": "work", "results": "results", "page": "docs/results.md"}
    return [word for flag, name in paths.items() for word in (f"--{flag}", str(tmp_path / name))]


def write_plan(folder, flags="base = 90.0"):
    (folder / "plan.toml").write_text(
        f"""
title = "Results"
[roots]
data = "{folder / "here"}"
[tables.t]
title = "A table"
note = "What it means."
columns = {{ "all labels" = "accuracy", "1 label" = "shots.1.0", "mAP" = "nowhere" }}
[[rows]]
name = "runs"
table = "t"
label = "can run"
script = "{folder / "score.py"}"
flags = {{ {flags} }}
published = "91.5 (somebody)"
[[rows]]
name = "lacks"
table = "t"
label = "cannot run"
script = "{folder / "score.py"}"
flags = {{ base = 1.0 }}
needs = ["data/absent|data/gone"]
"""
    )


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("path", [PLAN, PLAN.with_name("ablations.toml")], ids=lambda path: path.stem)
def test_every_command_of_the_plan_is_one_that_its_script_takes(path, quick, tmp_path):
    plan = Plan.read(path, {})
    if quick:
        plan = Plan.read(path, plan.quick["roots"])
    runner = Runner(plan, work=tmp_path, results=tmp_path, quick=plan.quick["flags"] if quick else {})
    scripts = {row.script for row in plan.rows} | {made.script for made in plan.made.values()}
    assert scripts | {"train_crossnet_con.py"} == set(PARSERS) or path != PLAN
    for row in plan.rows:
        for path, (_, script, *words) in runner.making(row).items():
            assert PARSERS[script]().parse_args(words).out == str(path)
        for _, script, *words in runner.commands(row, 2):
            args = PARSERS[script]().parse_args(words)
            assert args.seed == 2
            assert not quick or args.data_root.startswith(("data/demo", "runs/reproduce/quick/"))


def test_the_data_of_a_quick_run_can_be_made(tmp_path, monkeypatch):
    monkeypatch.chdir(reproduce.ROOT)
    scripts = {"data/make_shapes.py": make_shapes, "datasets/pack.py": pack}
    roots = Plan.read(PLAN, {}).quick["roots"] | {name: str(tmp_path / name) for name in ("generated", "mixed")}
    plan = Plan.read(PLAN, roots)
    runner = Runner(plan, work=tmp_path, results=tmp_path, quick=plan.quick["flags"])
    commands = {path: words for row in plan.rows for path, words in runner.making(row).items()}
    assert {path.parent.name for path in commands} == {"generated", "mixed"}
    for path, (_, script, *words) in commands.items():
        scripts[script].main(words)
        assert path.exists()


def test_a_packed_file_may_be_the_root_of_pairs(tmp_path):
    path = PLAN.with_name("ablations.toml")
    packed = tmp_path / "pairs.h5"
    assert Plan.read(path, {"pairs2k": str(packed)}).missing(["pairs2k/ShapeNet"]) == [f"{packed}/ShapeNet"]
    packed.touch()
    assert Plan.read(path, {"pairs2k": str(packed)}).missing(["pairs2k/ShapeNet"]) == []


def test_variants_are_rows_whose_pretraining_differs_in_the_flags_of_the_case(tmp_path):
    plan = Plan.read(PLAN.with_name("ablations.toml"), {})
    base, *variants = plan.rows
    assert len(variants) >= 30 and len(plan.pretrainings) == len(plan.rows)
    common = plan.pretrainings["ablation"].flags
    for row in variants:
        assert (row.against, row.flags, row.seeds) == (["ablation"], base.flags, base.seeds)
        flags = plan.pretrainings[row.pretraining].flags
        assert flags != common and common.keys() <= flags.keys()
    row = next(row for row in variants if row.name == "ablation-temperature-0.05")
    training, scoring = Runner(plan, work=tmp_path, results=tmp_path, quick={}).commands(row, 2)
    assert "--temperature 0.05" in " ".join(training) and f"{tmp_path}/{row.name}/seed_2/last.pth" in scoring


def test_the_roots_of_a_joined_set_are_placed_and_what_it_is_made_of_is_made_first(tmp_path):
    plan = Plan.read(PLAN, {"furniture": "/f", "generated": "/g", "mixed": "/m"})
    row = next(row for row in plan.rows if row.name == "modelnet10-mixed12k-con")
    made = Runner(plan, work=tmp_path, results=tmp_path, quick={}).making(row)
    assert [str(path) for path in made] == ["/g/12096.h5", "/m/12096.h5"]
    assert made[Path("/m/12096.h5")][2:5] == ["--data_root", "/f", "/g/12096.h5"]


def test_a_row_runs_once_a_seed_is_recorded_and_fills_the_page(project, tmp_path, capsys):
    state = reproduce.main([*project, "--seeds", "1", "2"])
    assert state["runs"]["recorded"] == [1, 2]
    assert state["lacks"] == {"recorded": [], "missing_data": [f"{tmp_path}/here/absent or {tmp_path}/here/gone"]}
    assert "lacks: not run" in capsys.readouterr().out
    record = json.loads((tmp_path / "results/runs/seed_2/row.json").read_text())
    assert record["seed"] == 2 and record["git_commit"] and record["machine"]["cores"]
    assert "--seed 2" in record["commands"][0]
    page = (tmp_path / "docs/results.md").read_text()
    assert "| can run | 91.5 ± 0.7 | 40.0 | not run | 1, 2 | 91.5 (somebody) |" in page
    assert "| cannot run | not run | not run | not run | - | not available |" in page
    first = json.loads((tmp_path / "results/runs/seed_1/row.json").read_text())["commands"][0]
    assert f"`runs`, seed 1:\n\n```\n{first}\n" in page
    reproduce.main([*project, "--seeds", "1", "2", "3"])  # only the third is missing
    assert (tmp_path / "calls").read_text() == "xxx"


def test_a_record_of_other_settings_is_never_mixed_with_new_ones(project, tmp_path):
    reproduce.main([*project, "--seeds", "1"])
    write_plan(tmp_path, flags="base = 80.0")
    with pytest.raises(UserError, match="recorded with other settings"):
        reproduce.main([*project, "--seeds", "1", "2"])


def test_check_runs_again_and_compares_with_what_is_recorded(project, tmp_path, monkeypatch, capsys):
    reproduce.main([*project, "--seeds", "1"])
    assert reproduce.main([*project, "--rows", "runs", "--check", "--seeds", "1"])["runs"]["agrees"] is True
    before = (tmp_path / "results/runs/seed_1/scores.json").read_bytes()
    (tmp_path / "score.py").write_text(SCRIPT.replace("if a.noise else 0", ""))  # the number depends on the call
    monkeypatch.setattr(sys, "argv", ["reproduce", *project, "--rows", "runs", "--check", "--seeds", "1"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(reproduce.__file__, run_name="__main__")
    shown = capsys.readouterr().out
    assert stop.value.code == 1 and "all labels: recorded 91.0, now" in shown
    assert "runs, seed 1: commit, machine, threads and versions are those recorded" in shown
    row = tmp_path / "results/runs/seed_1/row.json"
    record = json.loads(row.read_text())
    record["machine"] |= {"cpu": "A processor", "instructions": "AVX512"}
    record["threads"] = "64"
    row.write_text(json.dumps({**record, "versions": {**record["versions"], "torch": "2.4.0"}}))
    reproduce.main([*project, "--rows", "runs", "--check", "--seeds", "1"])
    found = re.search(
        r"runs, seed 1: machine A processor \(AVX512\) -> .+; threads 64 -> \d+; torch 2.4.0 -> .+",
        capsys.readouterr().out,
    )
    assert found and "commit" not in found[0]
    near = ["--rows", "runs", "--check", "--seeds", "1", "--tolerance", "10"]
    assert reproduce.main([*project, *near])["runs"]["agrees"] is True
    assert (tmp_path / "results/runs/seed_1/scores.json").read_bytes() == before


def test_a_record_names_the_roots_of_the_plan_not_those_of_a_machine(project, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    plan = tmp_path / "plan.toml"
    plan.write_text(plan.read_text().replace("base = 90.0", 'base = 90.0, noise = "{data}/x.h5"'))
    reproduce.main([*project, "--rows", "runs", "--seeds", "1", "--root", f"data={tmp_path / 'elsewhere'}"])
    record = json.loads((tmp_path / "results/runs/seed_1/row.json").read_text())
    assert f"--noise {tmp_path / 'here'}/x.h5" in record["commands"][0]
    assert "elsewhere" not in json.dumps(record)


def test_data_that_can_be_made_is_made_once(project, tmp_path):
    (tmp_path / "make.py").write_text("import sys; open(sys.argv[2], 'x').close()")  # fails if the file is there
    plan = (tmp_path / "plan.toml").read_text().replace("data/absent|data/gone", "data/absent")
    made = f'[made."data/absent"]\nscript = "{tmp_path / "make.py"}"\nflags = {{}}\n'
    (tmp_path / "plan.toml").write_text(plan + made)
    assert reproduce.main([*project, "--seeds", "1", "2"])["lacks"] == {"recorded": [1, 2], "missing_data": []}
    record = json.loads((tmp_path / "results/lacks/seed_2/row.json").read_text())
    assert record["commands"][0] == f"python {tmp_path}/make.py --out {tmp_path}/here/absent"


VARIANTS = """
title = "Effects"
[roots]
[pretraining.small]
flags = {{ {small} }}
[tables.t]
title = "A table"
note = "What it means."
effects = true
picture = "effects.png"
columns = {{ "all labels" = "accuracy", "view loss" = "training.val_loss_intra" }}
digits = {{ "view loss" = 3 }}
[[rows]]
name = "base"
table = "t"
label = "the base"
pretraining = "small"
script = "{script}"
flags = {{ base = 90.0 }}
[[variants]]
of = "base"
factor = "terms"
[variants.cases]
"cross alone" = {{ intra_weight = 0.0 }}
"""


def test_variants_train_fill_the_page_with_differences_and_leave_no_checkpoints(
    project, data_root, tmp_path, monkeypatch, small_runs
):
    def trains(argv, _):
        if argv[1] != "train_crossnet_con.py":
            return None
        train_crossnet_con.main(argv[2:])
        return 0

    run_here(monkeypatch, trains)
    words = arguments(data_root, tmp_path, "--epochs", 1, "--val_fraction", 0.2)
    given = zip((word.removeprefix("--") for word in words[::2]), words[1::2], strict=True)
    small = ", ".join(f"{name} = {value!r}" for name, value in given if name != "output_dir")
    (tmp_path / "plan.toml").write_text(VARIANTS.format(small=small, script=tmp_path / "score.py"))
    state = reproduce.main([*project, "--seeds", "1", "2", "--discard"])
    assert all(entry["recorded"] == [1, 2] for entry in state.values()) and "base-terms-cross_alone" in state
    page = (tmp_path / "docs/results.md").read_text()
    assert "[the base](../results/base) | **91.5 ± 0.7** | **" in page
    (line,) = [line for line in page.splitlines() if "cross alone" in line]
    name = "[cross alone](../results/base-terms-cross_alone)"
    assert line.startswith(f"| terms | {name} | ~ +0.0 [+0.0, +0.0] | ")
    assert re.search(r"\| (~ )?[+-]\d\.\d{3} \[[+-]\d+\.\d{3}, [+-]\d+\.\d{3}\].* \| 1, 2 \|$", line)
    assert "Commit and machine: " in page
    assert "![differences to the base over seeds](effects.png)" in page and (tmp_path / "docs/effects.png").exists()
    folder = tmp_path / "work/base-terms-cross_alone/seed_1"
    assert (folder / "metrics.jsonl").exists() and not list(folder.glob("*.pth"))
    record = json.loads((tmp_path / "results/base-terms-cross_alone/seed_1/row.json").read_text())
    assert record["checkpoint_sha256"] and len(record["command_minutes"]) == 2
    again = reproduce.main([*project, "--rows", "base-*", "--check", "--seeds", "2"])
    assert again["base-terms-cross_alone"]["agrees"] is True
    (folder.parents[2] / "results/base-terms-cross_alone/seed_1/row.json").unlink()
    (folder.parents[2] / "results/base-terms-cross_alone/seed_2/row.json").unlink()
    reproduce.main([*project, "--tables"])
    page = (tmp_path / "docs/results.md").read_text()
    assert "Not run:\n\n- terms: cross alone\n" in page and "| terms |" not in page


@pytest.mark.parametrize(("low", "high", "ends"), [(-1.0, 3.0, 3.15), (-90.0, 92.0, 4.2)])
def test_panels_of_effects_hold_their_intervals_unless_dots_would_merge(tmp_path, monkeypatch, low, high, ends):
    drawn = []
    monkeypatch.setattr("utils.pictures.save_figure", lambda figure, path, **options: drawn.append(figure))
    row = Row(name="a", table="t", label="warm", factor="rate", script="score.py", flags={})
    effect = Difference(mean=1.0, low=low, high=high, each=(0.0, 2.0))
    draw_effects({"mAP": {"a": effect}}, [row], tmp_path / "effects.png")
    (axis,) = drawn[0].axes
    assert axis.get_xlim() == pytest.approx((-ends, ends)) and axis.get_title() == "mAP"


GROWTH = """
title = "Results"
[roots]
data = "{data}"
[pretraining.small]
flags = {{ {small} }}
[tables.t]
title = "Growth"
growth = true
picture = "curves.png"
note = "What it means."
columns = {{ "mAP" = "runs.*.points.-1.mAP" }}
[[rows]]
name = "grows"
table = "t"
label = "tiny pairs"
pretraining = "small"
script = "benchmarks/growth.py"
[rows.flags]
run = "run={{run_folder}}"
work_dir = "{{run_folder}}/growth"
data_root = "{{data}}"
dataset = "demo"
num_points = 24
"""


def test_scores_along_a_run_fill_the_page_step_by_step(project, data_root, tmp_path, monkeypatch, small_runs):
    mains = {"train_crossnet_con.py": train_crossnet_con.main, "benchmarks/growth.py": growth.main}

    def runs(argv, _):
        mains[argv[1]](argv[2:])
        return 0

    run_here(monkeypatch, runs)
    words = arguments(data_root, tmp_path, "--epochs", 2, "--keep_every", 3, "--val_fraction", 0.2, "--eval_every", 0)
    given = zip((word.removeprefix("--") for word in words[::2]), words[1::2], strict=True)
    small = ", ".join(f"{name} = {value!r}" for name, value in given if name != "output_dir")
    (tmp_path / "plan.toml").write_text(GROWTH.format(small=small, data=data_root))
    reproduce.main([*project, "--tables"])
    page = (tmp_path / "docs/results.md").read_text()
    assert "| tiny pairs | not run | `grows` |" in page and "curves.png" not in page
    assert reproduce.main([*project, "--seeds", "1", "2"])["grows"]["recorded"] == [1, 2]
    page = (tmp_path / "docs/results.md").read_text()
    assert "| tiny pairs | 1, 2 | [grows](../results/grows), " in page
    steps = re.findall(r"^\| tiny pairs, seed (\d) \| (\d+) \| .*$", page, flags=re.M)
    assert steps == [("1", "3"), ("1", "6"), ("2", "3"), ("2", "6")]
    assert "extrapolated, not measured" in page and "](curves.png)" in page
    assert (tmp_path / "docs/curves.png").stat().st_size > 10_000
    assert (tmp_path / "work/small/seed_2/growth/run/step_3.json").exists()
    scores = json.loads((tmp_path / "results/grows/seed_2/scores.json").read_text())
    assert value_at(scores, "runs.*.points.-1.mAP") == scores["runs"]["run"]["points"][1]["mAP"]


def test_a_row_that_names_another_is_followed_by_their_difference(project, tmp_path):
    path = tmp_path / "plan.toml"
    third = path.read_text().split("[[rows]]")[1].replace('"runs"', '"third"').replace("can run", "a rival")
    plan = path.read_text() + "[[rows]]" + third.replace("90.0", "88.0") + 'against = ["runs"]\n'
    path.write_text(plan.replace('published = "91.5 (somebody)"\n', ""))
    reproduce.main([*project, "--seeds", "1", "2"])
    page = (tmp_path / "docs/results.md").read_text()
    assert "| mAP | seeds | record |" in page  # nobody published or reproduced a row
    assert "| a rival | can run | -2.0 [-2.0, -2.0] | ~ +0.0 [+0.0, +0.0] | - |" in page
    assert "paired over the seeds that both rows have" in page
    path.write_text(path.read_text().replace('against = ["runs"]', 'against = ["nobody"]'))
    with pytest.raises(UserError, match="row third is compared with a row that is not there: nobody"):
        reproduce.main([*project, "--list"])


def test_a_row_waits_for_its_weights_and_is_a_record_of_these(project, tmp_path, monkeypatch, capsys):
    write_plan(tmp_path, flags='base = 90.0, noise = "pretrained:tiny"')
    one = [*project, "--rows", "runs", "--seeds", "1"]
    for index, missing in (({}, ["pretrained:tiny"]), ({"tiny": {"sha256": "1"}}, [])):
        monkeypatch.setattr(reproduce, "pretrained_index", lambda index=index: index)
        assert reproduce.main(one)["runs"]["missing_data"] == missing
    assert "runs: not run, pretrained:tiny is not there" in capsys.readouterr().out
    record = json.loads((tmp_path / "results/runs/seed_1/row.json").read_text())
    assert record["flags"]["pretrained:tiny"] == {"sha256": "1"}
    monkeypatch.setattr(reproduce, "pretrained_index", lambda: {"tiny": {"sha256": "2"}})
    with pytest.raises(UserError, match="recorded with other settings"):
        reproduce.main(one)


def test_a_command_that_fails_is_named_with_its_log_and_nothing_is_recorded(project, tmp_path):
    write_plan(tmp_path, flags="base = 90.0, fail = true")
    with pytest.raises(UserError, match=r"--fail .* exit code 1; see .*seed_1.log, .*: asked to fail"):
        reproduce.main([*project, "--rows", "runs", "--seeds", "1"])
    assert "asked to fail" in (tmp_path / "work/runs/seed_1.log").read_text()
    assert not (tmp_path / "results/runs").exists()


SHARED = """
title = "Shared"
[roots]
data = "{folder}"
[pretraining.p]
flags = {{}}
[tables.t]
title = "A table"
note = "What it means."
columns = {{ "all labels" = "accuracy" }}
[[rows]]
name = "first"
table = "t"
label = "first"
pretraining = "p"
script = "{folder}/score.py"
flags = {{ base = 90.0 }}
[[rows]]
name = "second"
table = "t"
label = "second"
pretraining = "p"
script = "{folder}/score.py"
flags = {{ base = 80.0 }}
needs = ["data/made"]
[[rows]]
name = "third"
table = "t"
label = "third"
script = "{folder}/score.py"
flags = {{ base = 70.0 }}
needs = ["data/made"]
[made."data/made"]
script = "{folder}/make.py"
flags = {{}}
"""
# Fails if the file is there, or if another process makes it at the same time.
MAKE = "import sys, time; open(sys.argv[2] + '.part', 'x'); time.sleep(0.5); open(sys.argv[2], 'x')"


def test_rows_that_run_at_a_time_share_what_they_need(project, tmp_path, monkeypatch):
    (tmp_path / "make.py").write_text(MAKE)
    (tmp_path / "plan.toml").write_text(SHARED.format(folder=tmp_path))
    trained, scored_with = [], set()

    def trains(argv, _):
        if argv[1] == "train_crossnet_con.py":
            trained.append(argv[argv.index("--seed") + 1])
            return 0
        return None

    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(commands, "available_cores", lambda: 9)
    score = SCRIPT.replace(
        "assert not a.fail",
        "calls.with_name(f'threads{a.base}{a.seed}').write_text("
        "__import__('os').environ['OMP_NUM_THREADS'])\nassert not a.fail",
    )
    (tmp_path / "score.py").write_text(score)
    run_here(monkeypatch, trains)
    state = reproduce.main([*project, "--seeds", "1", "2", "--jobs", "3"])
    assert [entry["recorded"] for entry in state.values()] == [[1, 2]] * 3
    assert sorted(trained) == ["1", "2"]
    scored_with |= {path.read_text() for path in tmp_path.glob("threads*")}
    assert scored_with == {"3"}
    assert json.loads((tmp_path / "results/third/seed_2/row.json").read_text())["threads"] == "3"
    assert len(list(tmp_path.glob("threads*"))) == 6


SLOW = """
import pathlib, signal, sys, time
def stopped(*_):
    pathlib.Path(__file__).with_name("stopped").touch(); sys.exit(1)
signal.signal(signal.SIGTERM, stopped)
pathlib.Path(__file__).with_name("started").touch()
time.sleep(60)
"""


def test_nothing_runs_on_after_sigterm_or_another_row_s_error(project, tmp_path):
    (tmp_path / "score.py").write_text(SLOW)
    process = subprocess.Popen([sys.executable, "-m", "benchmarks.reproduce", *project], cwd=ROOT)
    while not (tmp_path / "started").exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 128 + signal.SIGTERM
    assert (tmp_path / "stopped").exists() and not (tmp_path / "results/runs").exists()
    (tmp_path / "stopped").unlink()
    # The second seed fails once the first has started.
    fails = "import pathlib, sys, time\nif sys.argv[sys.argv.index('--seed') + 1] == '2':\n"
    fails += "    while not pathlib.Path(__file__).with_name('started').exists(): time.sleep(0.05)\n    sys.exit(3)\n"
    (tmp_path / "started").unlink()
    (tmp_path / "score.py").write_text(fails + SLOW)
    with pytest.raises(UserError, match="--seed 2 .* exit code 3"):
        reproduce.main([*project, "--seeds", "1", "2", "3", "--jobs", "2"])
    assert (tmp_path / "stopped").exists() and not (tmp_path / "results/runs").exists()
    assert not (tmp_path / "work/runs/seed_3.log").exists()


def test_a_real_row_at_a_tiny_size(tmp_path, monkeypatch):
    def forks(argv, output):
        done = command(*argv[1:])
        output.write(done.stdout + done.stderr)
        return done.returncode

    run_here(monkeypatch, forks)
    small = """
model = "pointnet_cls"
emb_dims = 16
num_points = 16
"""
    heading = '[quick.flags."downstream/classification/main.py"]\n'
    text = (
        PLAN.read_text().replace("num_points = 64\nshots = [1, 5]", "shots = [1, 5]").replace(heading, heading + small)
    )
    (tmp_path / "plan.toml").write_text(text)
    words = ["--quick", "--rows", "demo-untrained", "--plan", str(tmp_path / "plan.toml"), "--work_dir", str(tmp_path)]
    assert reproduce.main(words)["demo-untrained"]["recorded"] == [1]
    scores = json.loads((tmp_path / "quick/results/demo-untrained/seed_1/scores.json").read_text())
    assert 100 / 15 < scores["test_accuracy_mean"] <= 100
    assert f"| {scores['test_accuracy_mean']:.1f} |" in (tmp_path / "quick/results.md").read_text()


VARIANT = '[[variants]]\nfactor = "f"\ncases = {}\n'


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (('table = "t"', 'table = "u"'), "row runs names a table that is not there: u"),
        (('[[rows]]\nname = "lacks"', '[[rows]]\nname = "runs"'), "two rows are called runs"),
        (("label =", "lable ="), "row 1 has the unknown field lable; there are name, table, label"),
        (('label = "can run"', ""), "row 1 lacks label"),
        (("note =", "nota ="), "table t has the unknown field nota"),
        (('label = "can run"', 'label = "can run"\nseeds = 1'), "row 1 has seeds = 1, which is not of the type .*int"),
        (('label = "can run"', 'label = "can run"\nseeds = ["1"]'), "row 1 has seeds = "),
        (('["data/absent|data/gone"]', '"data/absent"'), "row 2 has needs = 'data/absent', which is not"),
        (("data/absent", "dta/absent"), "row lacks needs dta/absent, which begins with none of the roots"),
        (("base = 90.0", 'noise = "{dta}/x"'), "row runs names a root that is not there: {dta}"),
        (("score.py", "scores.py"), "row runs names a script that is not there: .*scores.py"),
        (('name = "runs"', 'name = "../runs"'), "'../runs' is the name of a folder too"),
        (('name = "runs"', 'name = "check"'), "'check' is the name of a folder too"),
        (("[[rows]]", "[[row]]"), "row is not a part of a plan; there are title"),
        (('title = "Results"', ""), "title is missing"),
        (
            ("[tables.t]", '[[variants]]\nof = "runs"\nfactor = "f"\ncases = {}\n[tables.t]'),
            "has no pretraining to vary",
        ),
        (("[tables.t]", '[[variants]]\nof = "run"\nfactor = "f"\ncases = {}\n[tables.t]'), "which is not there"),
        (("[roots]", "[roots"), "cannot be read as a plan"),
    ],
)
def test_a_plan_that_does_not_fit_is_an_error_that_names_it(project, tmp_path, change, message):
    path = tmp_path / "plan.toml"
    path.write_text(path.read_text().replace(*change))
    with pytest.raises(UserError, match=message):
        reproduce.main([*project, "--list"])


def test_a_plan_that_is_not_text_is_an_error(project, tmp_path):
    (tmp_path / "plan.toml").write_bytes(b"\x89HDF")
    with pytest.raises(UserError, match="plan.toml cannot be read as a plan"):
        reproduce.main([*project, "--list"])


def test_a_damaged_record_is_named_and_a_copy_beside_it_does_not_count(project, tmp_path):
    reproduce.main([*project, "--seeds", "1"])
    folder = tmp_path / "results/runs/seed_1"
    shutil.copytree(folder, folder.with_name("seed_1.bak"))
    reproduce.main([*project, "--tables"])
    assert "| 91.0 |" in (tmp_path / "docs/results.md").read_text()
    for name, message in {"scores.json": "cannot read", "row.json": "cannot read|does not hold"}.items():
        for content in ('{"na', "[]", None):
            text = (folder / name).read_text()
            (folder / name).write_text(content) if content else (folder / name).unlink()
            if (name, content) == ("row.json", None):  # as if the seed had not run
                reproduce.main([*project, "--tables"])
            else:
                with pytest.raises(UserError, match=f"{message}.*|does not hold"):
                    reproduce.main([*project, "--tables"])
            (folder / name).write_text(text)
    (folder / "metrics.jsonl").write_text('{"epoch": 1}\n{"epo')
    with pytest.raises(UserError, match="the last line of .*metrics.jsonl is not JSON"):
        reproduce.main([*project, "--tables"])


def test_a_check_that_compares_nothing_does_not_agree(project, tmp_path, capsys):
    reproduce.main([*project, "--rows", "runs", "--check", "--seeds", "1"])
    assert "nothing to check, no seed of [1] is recorded" in capsys.readouterr().out
    reproduce.main([*project, "--seeds", "1"])
    (tmp_path / "results/runs/seed_1/scores.json").write_text("{}")
    assert reproduce.main([*project, "--rows", "runs", "--check", "--seeds", "1"])["runs"]["agrees"] is False
    assert "none of the columns all labels, 1 label, mAP is in" in capsys.readouterr().out


def test_folders_that_cannot_be_written_are_errors_before_anything_runs(project, tmp_path):
    (tmp_path / "file").touch()
    for flag in ("--work_dir", "--results", "--page"):
        with pytest.raises(UserError, match="cannot write"):
            reproduce.main([*project, "--seeds", "1", flag, str(tmp_path / "file" / "deeper")])
    assert (tmp_path / "calls").read_text() == "x"  # the page comes last


def test_unknown_rows_and_roots_are_errors(project):
    with pytest.raises(UserError, match="no row matches 'x-"):
        reproduce.main([*project, "--rows", "x-*"])
    with pytest.raises(UserError, match="--root nodata: .* has the roots data"):
        reproduce.main([*project, "--root", "nodata=there", "--list"])


def test_flags_paths_and_spread_as_text():
    assert command_line("s.py", {"a": 1, "b": True, "c": [1, 2], "d": False, "e": None}) == [
        *("python", "s.py", "--a", "1", "--b", "--c", "1", "2")
    ]
    runs = {"runs": [{"best": None, "last": {"test": {"miou": 5}}}], "s": {"1": [3.0, 1.0]}}
    assert value_at(runs, "runs.0.reported.test.miou") == 5.0
    assert value_at(runs, "s.1.0") == 3.0
    assert value_at(runs, "runs.1.best") is None
    assert mean_and_deviation([1.0, 2.0, 3.0]) == "2.0 ± 1.0"
    assert mean_and_deviation([2.0]) == mean_and_deviation([2.0, 2.0]) == "2.0"
