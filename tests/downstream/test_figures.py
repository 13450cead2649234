import os

import pytest

from downstream.figures import check_output_path
from utils.errors import UserError


def test_outputs_are_checked_where_they_will_be_written(tmp_path, monkeypatch):
    (tmp_path / "kept").mkdir()
    (tmp_path / "link.json").symlink_to(tmp_path / "kept" / "a.json")
    os.mkfifo(tmp_path / "pipe")
    monkeypatch.setattr(os, "access", lambda path, mode: str(path) == os.path.realpath(tmp_path / "kept"))
    for name in ("pipe", "link.json", "kept/b.json"):
        check_output_path(tmp_path / name)
    for name in ("c.json", "kept"):
        with pytest.raises(UserError, match=f"cannot write {tmp_path / name}"):
            check_output_path(tmp_path / name)
