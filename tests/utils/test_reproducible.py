"""What a result says about the code that made it."""

import shutil
import subprocess

import pytest

from utils.reproducible import git_commit

pytestmark = pytest.mark.skipif(shutil.which("git") is None, reason="needs git")


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """Return a function that runs git in a new repository of one commit."""
    for name in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"):  # set in hooks: git would write to that repository
        monkeypatch.delenv(name, raising=False)

    def git(*words):
        who = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
        command = ["git", "-C", str(tmp_path), *who, *words]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    for name in ("train.py", "README.md", "docs/page.md", "docs/a.png", "results/row/row.json", "models/notes.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("a")
    git("init", "--quiet")
    git("add", ".")
    git("commit", "--quiet", "--message", "first")
    return git


@pytest.mark.parametrize(
    ("changed", "dirty"),
    [
        ("train.py", True),
        ("models/new.py", False),  # git does not follow it
        ("README.md", False),
        ("models/notes.md", False),
        ("docs/a.png", False),
        ("results/row/row.json", False),
    ],
)
def test_only_changed_code_makes_a_commit_dirty(tmp_path, repository, changed, dirty):
    (tmp_path / changed).write_text("b")
    assert git_commit.__wrapped__(tmp_path) == repository("rev-parse", "HEAD") + ("-dirty" if dirty else "")


def test_a_copy_in_the_repository_of_another_project_has_a_commit_only_if_that_tracks_it(tmp_path, repository):
    copy = tmp_path / "copy"
    for name in ("train.py", "docs/page.md"):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_text("a")
    assert git_commit.__wrapped__(copy) == "unknown"
    repository("add", ".")
    repository("commit", "--quiet", "--message", "second")
    for name, dirty in (("train.py", ""), ("copy/docs/page.md", ""), ("copy/train.py", "-dirty")):
        (tmp_path / name).write_text("b")
        assert git_commit.__wrapped__(copy) == repository("rev-parse", "HEAD") + dirty


def test_without_git_the_commit_is_unknown(tmp_path, monkeypatch):
    assert git_commit.__wrapped__(tmp_path) == "unknown"
    monkeypatch.setenv("PATH", "")
    assert git_commit.__wrapped__(tmp_path) == "unknown"
