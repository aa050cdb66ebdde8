"""Files and folders that take their name when they are whole."""

from contextlib import suppress

import pytest

from fmlightning.runs.files import (
    atomic_folder,
    atomic_write,
    clear_unfinished,
    explain_write_errors,
    write_text,
)


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def test_a_text_is_written_with_the_directory_it_lies_in(tmp_path):
    path = tmp_path / "a" / "b" / "x.json"
    write_text(path, "first\r\n")
    write_text(path, "second ü\r\n")
    assert path.read_bytes() == "second ü\r\n".encode()
    assert names(path.parent) == ["x.json"]


def test_a_write_that_fails_leaves_what_was_there(tmp_path):
    path = tmp_path / "x"
    write_text(path, "before")
    with suppress(KeyError), atomic_write(path) as file:
        file.write(b"half")
        file.flush()
        assert path.read_text() == "before"
        raise KeyError
    assert path.read_text() == "before"
    assert names(tmp_path) == ["x"]


def test_two_writers_of_one_name_do_not_meet(tmp_path):
    path = tmp_path / "x"
    with atomic_write(path) as first:
        first.write(b"first")
        with atomic_write(path) as second:
            second.write(b"second")
        assert path.read_bytes() == b"second"
    assert path.read_bytes() == b"first"


def test_a_folder_is_whole_or_not_there(tmp_path):
    path = tmp_path / "out"
    with suppress(KeyError), atomic_folder(path) as folder:
        (folder / "a").write_text("half")
        assert not path.exists()
        raise KeyError
    assert names(tmp_path) == []
    path.mkdir()  # one that is empty is replaced
    with atomic_folder(path) as folder:
        (folder / "a").write_text("a")
    assert names(tmp_path) == ["out"]
    assert names(path) == ["a"]


def test_a_folder_that_holds_something_is_not_replaced(tmp_path):
    path = tmp_path / "out"
    write_text(path / "a", "mine")
    with pytest.raises(OSError, match="not empty"), atomic_folder(path) as folder:
        (folder / "a").write_text("yours")
    assert (path / "a").read_text() == "mine"
    assert names(tmp_path) == ["out"]


def test_only_unfinished_files_are_cleared(tmp_path):
    for name in (".last.ckpt.1a2b3c4d.tmp", ".notes.tmp", "x.tmp", ".x", "x"):
        (tmp_path / name).touch()
    (tmp_path / ".folder.tmp").mkdir()
    clear_unfinished(tmp_path)
    assert names(tmp_path) == [".folder.tmp", ".notes.tmp", ".x", "x", "x.tmp"]
    clear_unfinished(tmp_path / "nowhere")


def test_an_error_of_the_disk_says_which_file_and_how_to_go_on(tmp_path):
    refused = pytest.raises(
        OSError, match=r"x could not be written: No such file.*--ckpt_path auto"
    )
    with refused, explain_write_errors(tmp_path / "x"), atomic_write(tmp_path / "none" / "x"):
        pass
    with pytest.raises(RuntimeError, match="another"), explain_write_errors(tmp_path / "x"):
        raise RuntimeError("another, of no disk")
