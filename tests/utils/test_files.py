import os

import pytest

from utils.errors import DataError, UserError
from utils.files import check_name, data_files, decode_text, has_data_files, is_data_name, read_lines, replacing

TEXT = "Stühle\nTische\n"
ENCODINGS = ("utf-8", "utf-8-sig", "latin-1", "utf-16", "utf-16-le", "utf-16-be", "utf-32")


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"])
def test_texts_are_read_in_every_encoding_and_line_end(tmp_path, encoding, line_end):
    (tmp_path / "a.txt").write_bytes(TEXT.replace("\n", line_end).encode(encoding))
    assert decode_text((tmp_path / "a.txt").read_bytes()) == TEXT
    assert read_lines(tmp_path / "a.txt") == ["Stühle", "Tische"]


def test_a_line_of_latin_1_is_not_split_at_its_control_characters():
    assert decode_text(b"a\x85\xe9\n") == "a\x85é\n"


@pytest.mark.parametrize("data", [b"ab\0cdefgh", b"\xef\xbb\xbf\xff", b"\xff\xfea"])
def test_what_is_not_a_text_is_refused(data):
    with pytest.raises(ValueError):
        decode_text(data)


def test_files_of_operating_systems_are_not_data(tmp_path):
    junk = ("._00.png", ".DS_Store", "Thumbs.db", "thumbs.db", "desktop.ini", "Desktop.ini", ".nfs001", "__MACOSX")
    assert not any(map(is_data_name, junk)) and all(map(is_data_name, ("00.png", "icon.png", "a.b", "thumbs")))
    (tmp_path / ".hidden" / "__MACOSX").mkdir(parents=True)
    root = tmp_path / ".hidden"  # the folder that is named may have any name
    for name in (*junk[:6], "__MACOSX/a.png", "b.png", "a.png"):
        (root / name).touch()
    assert data_files(root, "**/*.png") == [root / "a.png", root / "b.png"]
    assert has_data_files(root, "*.png") and not has_data_files(root, "*.ini") and not has_data_files(root / "none")


def test_links_to_folders_are_followed_once_and_may_form_a_loop(tmp_path):
    root, elsewhere = tmp_path / "root", tmp_path / "elsewhere"
    for folder in (root / "chairs" / "deep", elsewhere / "lamps"):
        folder.mkdir(parents=True)
        (folder / "a.obj").touch()
    (root / "again").symlink_to(root / "chairs")  # before "chairs" in the alphabet, but that is the folder itself
    (root / "linked").symlink_to(elsewhere)
    (root / "chairs" / "up").symlink_to(root)
    (elsewhere / "lamps" / "self").symlink_to(elsewhere)
    (root / "gone").symlink_to(tmp_path / "nowhere")
    assert data_files(root, "**/*.obj") == [root / "chairs" / "deep" / "a.obj", root / "linked" / "lamps" / "a.obj"]


def test_a_folder_in_the_place_of_a_file_is_an_error_before_hours_of_work(tmp_path):
    with pytest.raises(UserError, match=f"cannot write {tmp_path}: Is a directory"), replacing(tmp_path):
        pytest.fail("the block ran")


def test_links_stay_links_and_pipes_stay_pipes(tmp_path):
    link, pipe = tmp_path / "link.json", tmp_path / "pipe"
    link.symlink_to(tmp_path / "file.json")
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDWR)  # a pipe without a reader would block
    for path in (link, pipe):
        with replacing(path) as temporary:
            temporary.write_text("{}")
    assert link.is_symlink() and (tmp_path / "file.json").read_text() == "{}"
    assert pipe.is_fifo() and os.read(reader, 9) == b"{}"
    os.close(reader)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file.json", "link.json", "pipe"]


def test_paths_that_the_system_refuses_are_named(tmp_path):
    loop = tmp_path / "loop.json"
    loop.symlink_to("loop.json")
    for path in (tmp_path / ("a" * 300), loop):
        with pytest.raises(UserError, match=f"cannot write {path}"), replacing(path / "b.json") as temporary:
            temporary.write_text("{}")
    with pytest.raises(UserError, match="cannot write .*aaa"), replacing(tmp_path / ("a" * 300)) as temporary:
        temporary.write_text("{}")
    with replacing(loop) as temporary:
        temporary.write_text("{}")
    assert loop.read_text() == "{}"


def test_a_name_that_is_not_text_is_named(tmp_path):
    name = os.fsdecode(b"\xff\xfe.npy")
    with pytest.raises(DataError, match=r"dcff.+dcfe\.npy: its name is not UTF-8\. Rename it"):
        check_name(name, tmp_path / name)
    check_name("é ü", tmp_path)
