"""Files for users are made with their directory, and never over what is there."""

import resource
from pathlib import Path

import pytest

from tuner.errors import UserError
from tuner.new_files import check_new, open_new, write_new


@pytest.mark.parametrize("content", ["Grüße\n\ud83d", b"\x89PNG\r\n\x00"], ids=["text", "bytes"])
def test_a_file_is_written_with_its_directory(tmp_path: Path, content: str | bytes):
    path = tmp_path / "a" / "b" / "file"
    check_new(path)
    write_new(path, content)
    assert path.read_bytes() == ("Grüße\n\\ud83d".encode() if isinstance(content, str) else content)


@pytest.mark.parametrize("make", [check_new, open_new, lambda path: write_new(path, "theirs")])
def test_what_is_there_stays(tmp_path: Path, make):
    path = tmp_path / "file"
    path.write_text("mine")
    with pytest.raises(UserError, match=f"{path} exists already; nothing was written"):
        make(path)
    with pytest.raises(UserError, match=f"{path} is a file, so inner cannot lie in it"):
        make(path / "inner")
    assert path.read_text() == "mine"


def test_a_disk_that_takes_no_more_leaves_no_half_file(tmp_path: Path):
    path = tmp_path / "file"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(UserError, match=f"{path} cannot be written: File too large"):
            write_new(path, "x" * 10_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not path.exists()


def test_a_place_that_is_no_directory_is_told_in_one_message(tmp_path: Path):
    path = tmp_path / ("x" * 300)
    with pytest.raises(UserError, match="cannot be written: File name too long"):
        write_new(path, "x")
