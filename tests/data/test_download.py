"""The download script, offline: curl and gdown are stubs that serve local archives; everything else is real."""

import os
import shutil
import subprocess
import sys

import pytest

from tests.data.test_unpack import files_in, link, make_tar, make_zip
from tests.support.paths import ROOT

IDS = (
    "1F9XIhF1qngLt-GtdnOnXiTsXH84YtrbC",
    "1UUY729-4VK_igjKUzLn_ygm3LxwW23pX",
    "1r3nJ6gEu6cL59h7cIfMrBeY5p1P_JiIV",
    "15lmtRaHvVIPLOp_o7rms8e6VQp_en8WF",
    "1-Yhqgi7KH6guIej_4X8pciiybQB4pBWQ",
)
MODELNET = {
    "modelnet40_ply_hdf5_2048/ply_data_train9.h5": os.urandom(50_000),
    "modelnet40_ply_hdf5_2048/shape_names.txt": b"airplane\n",
}

# The real curl, on a local file of the same name: --continue-at is really tested.
CURL = """#!/usr/bin/env bash
echo "curl $*" >> "$CALLS"
words=()
for word in "$@"; do
  case "$word" in http*://*) word="file://$FIXTURES/${word##*/}" ;; esac
  words+=("$word")
done
exec "$REAL_CURL" "${words[@]}"
"""
GDOWN = """#!/usr/bin/env bash
echo "gdown $*" >> "$CALLS"
while (( $# )); do
  case "$1" in -O) out="$2"; shift ;; -*) ;; *) id="$1" ;; esac
  shift
done
file="$FIXTURES/$id"
if [[ ! -f "$file" ]]; then echo "quota exceeded" >&2; exit 1; fi
if [[ "$out" == - ]]; then exec cat "$file"; fi
cp "$file" "$out"
"""

pytestmark = pytest.mark.skipif(
    os.name != "posix" or not shutil.which("bash") or not shutil.which("curl"), reason="needs bash and curl"
)


class Shop:
    """A place to run the script: archives on offer in ``fixtures``, data sets in ``dir``, calls in ``calls``."""

    def __init__(self, folder):
        self.fixtures, self.dir, self._calls = folder / "fixtures", folder / "sets", folder / "calls"
        self.stubs = folder / "bin"
        for path in (self.fixtures, self.stubs):
            path.mkdir()
        for name, text in (("curl", CURL), ("gdown", GDOWN)):
            (self.stubs / name).write_text(text)
            (self.stubs / name).chmod(0o755)

    def run(self, *words, code=0):
        """Run the script; returns its output and checks its exit code."""
        env = {
            **os.environ,
            "PATH": f"{self.stubs}:{os.environ['PATH']}",
            "PYTHON": sys.executable,
            "FIXTURES": str(self.fixtures),
            "CALLS": str(self._calls),
            "REAL_CURL": shutil.which("curl"),
        }
        command = ["bash", str(ROOT / "data" / "download_data.sh"), "--dir", str(self.dir), *words]
        done = subprocess.run(command, env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=240)
        output = done.stdout + done.stderr
        assert done.returncode == code, output
        assert "Traceback" not in output
        return output

    def calls(self):
        """Return the calls of curl and gdown since the last call."""
        lines = self._calls.read_text().splitlines() if self._calls.exists() else []
        self._calls.unlink(missing_ok=True)
        return lines

    def installed(self):
        """Files of data sets, without what the script keeps for itself."""
        if not self.dir.exists():
            return {}
        return {name: data for name, data in files_in(self.dir).items() if not name.startswith(".download")}


@pytest.fixture
def shop(tmp_path):
    return Shop(tmp_path)


def test_list_names_address_disk_need_and_target_of_every_set_and_fetches_nothing(shop):
    output = shop.run("--list")
    targets = {
        "shapenet": "ShapeNet",
        "shapenet_render": "ShapeNetRendering",
        "modelnet40": "modelnet40_ply_hdf5_2048",
        "scanobjectnn": "ScanObjectNN",
        "shapenetpart": "shapenet_part_seg_hdf5_data",
        "s3dis": "indoor3d_sem_seg_hdf5_data",
    }
    for name, folder in targets.items():
        block = output[output.index(f"{name}\n  target:") :][:900]
        assert f"target:  {shop.dir}/{folder}\n" in block
        assert "  disk:    " in block and "  address: http" in block
    assert "hkust-vgd.github.io/scanobjectnn" in output and "buildingparser.stanford.edu/dataset.html" in output
    assert shop.calls() == [] and not shop.dir.exists()


def test_a_set_is_fetched_unpacked_and_not_fetched_again(shop):
    make_zip(shop.fixtures / "modelnet40_ply_hdf5_2048.zip", MODELNET)
    output = shop.run("modelnet40")
    assert "at least 0.3 GB" in output and "free: " in output and "the archive has" in output
    assert shop.installed() == MODELNET
    assert list(shop.dir.glob(".download/*")) == []
    assert any("shapenet.cs.stanford.edu" in call for call in shop.calls())
    assert "is there already" in shop.run("modelnet40")
    assert shop.calls() == []


def test_a_download_that_stopped_is_continued(shop):
    archive = make_zip(shop.fixtures / "modelnet40_ply_hdf5_2048.zip", MODELNET).read_bytes()
    part = shop.dir / ".download" / "modelnet40_ply_hdf5_2048.zip.part"
    part.parent.mkdir(parents=True)
    # The half on disk differs from the server's in two bytes that zip readers ignore: only a continuation keeps them.
    half = archive[:10] + b"\1\2" + archive[12:20_000]
    part.write_bytes(half)
    output = shop.run("--keep", "modelnet40")
    assert "continuing at 20000 bytes" in output
    assert any("--continue-at -" in call for call in shop.calls())
    assert (shop.dir / ".download" / "modelnet40_ply_hdf5_2048.zip").read_bytes() == half + archive[20_000:]
    assert shop.installed() == MODELNET


def test_the_drive_stands_in_and_only_the_right_archive_is_fetched(shop):
    big = {f"ShapeNetRendering/02691156/{i}/rendering/00.png": os.urandom(900_000) for i in range(6)}
    make_tar(shop.fixtures / IDS[0], big)
    make_tar(shop.fixtures / IDS[1], {"ShapeNet/02691156/a.ply": b"ply"})
    make_tar(shop.fixtures / IDS[3], MODELNET)
    output = shop.run("modelnet40", "shapenet")
    assert shop.installed() == {**MODELNET, "ShapeNet/02691156/a.ply": b"ply"}
    assert f"Drive {IDS[0]}: shapenet_render" in output and f"Drive {IDS[2]}: no answer" in output
    fetched = [call.split()[-1] for call in shop.calls() if call.startswith("gdown --continue")]
    assert fetched == [IDS[3], IDS[1]]
    # The result is remembered: the next set is downloaded without peeking again.
    shop.run("shapenet_render")
    calls = [call for call in shop.calls() if call.startswith("gdown")]
    assert [call.split()[-1] for call in calls if "--continue" in call] == [IDS[0]]
    assert {call.split()[-1] for call in calls if "--quiet" in call} == {IDS[2], IDS[4]}
    assert set(big) <= set(shop.installed())


def test_an_archive_whose_beginning_does_not_tell_is_judged_by_all_of_it(shop):
    # A zip file has its list of members at the end.
    members = {"main_split/big.h5": os.urandom(4_500_000), "main_split/train.h5": b"x"}
    make_zip(shop.fixtures / IDS[2], members)
    output = shop.run("scanobjectnn")
    assert f"Drive {IDS[2]}: unknown" in output
    assert shop.installed() == {f"ScanObjectNN/{name}": content for name, content in members.items()}


def test_an_unsafe_archive_installs_nothing_and_is_kept_for_a_look(shop, tmp_path):
    make_tar(shop.fixtures / "indoor3d_sem_seg_hdf5_data.zip", {"../../evil": b"x", "l": link("l", b"2")})
    output = shop.run("s3dis", code=2)
    assert "is refused" in output and "not installed: s3dis" in output
    assert "buildingparser.stanford.edu/dataset.html" in output
    assert shop.installed() == {} and not (tmp_path / "evil").exists()
    assert (shop.dir / ".download" / "indoor3d_sem_seg_hdf5_data.zip").exists()


def test_a_wrong_checksum_is_reported(shop):
    make_zip(shop.fixtures / "modelnet40_ply_hdf5_2048.zip", {"modelnet40_ply_hdf5_2048/ply_data_train0.h5": b"x"})
    output = shop.run("modelnet40", code=2)
    assert "3176385ffc31a7b6b5af22191fd920d1" in output
    assert shop.installed() == {}


def test_where_nothing_answers_the_other_sets_still_come_and_the_way_by_hand_is_shown(shop):
    make_tar(shop.fixtures / IDS[4], MODELNET)
    output = shop.run("scanobjectnn", "modelnet40", code=2)
    assert shop.installed() == MODELNET
    assert "error: not installed: scanobjectnn" in output
    assert "https://hkust-vgd.github.io/scanobjectnn" in output
    assert f"{shop.dir}/ScanObjectNN/main_split/training_objectdataset.h5" in output


def test_own_files_are_not_overwritten(shop):
    make_zip(shop.fixtures / "modelnet40_ply_hdf5_2048.zip", MODELNET)
    mine = shop.dir / "modelnet40_ply_hdf5_2048" / "shape_names.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    assert "is there already" in shop.run("modelnet40")
    assert "different content" in shop.run("--again", "modelnet40", code=2)
    assert shop.installed() == {"modelnet40_ply_hdf5_2048/shape_names.txt": b"mine"}
    # An interrupted installation is completed without --again.
    mine.write_bytes(MODELNET["modelnet40_ply_hdf5_2048/shape_names.txt"])
    shop.run("modelnet40")
    assert shop.installed() == MODELNET


def test_an_archive_at_hand_is_unpacked_without_a_download(shop, tmp_path):
    archive = make_tar(tmp_path / "from a friend", MODELNET)
    assert "modelnet40: 2 files installed" in shop.run("--archive", str(archive))
    assert shop.installed() == MODELNET and archive.exists()
    assert shop.calls() == []


@pytest.mark.parametrize("words", [("imagenet",), ("--frobnicate",), (), ("--archive",)])
def test_wrong_usage_ends_with_code_2(shop, words):
    assert "error" in shop.run(*words, code=2) or not words
    assert not shop.dir.exists()
