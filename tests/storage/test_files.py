"""One file: whole or not at all, errors that name it, reads that end."""

import errno
import os

import pytest

from meanfield import storage
from meanfield.storage import files


def listed(directory):
    return sorted(path.name for path in directory.iterdir())


@pytest.mark.parametrize(("content", "expected"), [(b"\x00\xff", b"\x00\xff"), ("na\u00efve", b"na\xc3\xafve")])
def test_bytes_and_text(tmp_path, content, expected):
    assert storage.write_atomically(tmp_path / "a.b", content) == tmp_path / "a.b"
    assert storage.write_atomically(str(tmp_path / "a.b"), content) == tmp_path / "a.b"
    assert (tmp_path / "a.b").read_bytes() == expected
    assert listed(tmp_path) == ["a.b"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, step):
    path = storage.write_atomically(tmp_path / "a", "old")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(OSError, match="disk full"):
        storage.write_atomically(path, "new")
    assert path.read_text() == "old"
    assert listed(tmp_path) == ["a"]


def test_readers_see_the_old_file_until_the_new_one_is_whole_and_on_the_disk(tmp_path, monkeypatch):
    path, seen, sync = storage.write_atomically(tmp_path / "a", "old"), [], os.fsync

    def look(file):
        seen.append(path.read_text())
        assert sorted(each.read_text() for each in tmp_path.iterdir()) == ["new", "old"]
        sync(file)

    monkeypatch.setattr(os, "fsync", look)
    storage.write_atomically(path, "new")
    assert seen == ["old"]
    assert path.read_text() == "new"


def test_two_writers_do_not_share_a_temporary_file(tmp_path, monkeypatch):
    path, sync = tmp_path / "a", os.fsync

    def another(file):
        monkeypatch.setattr(os, "fsync", sync)
        storage.write_atomically(path, "theirs")

    monkeypatch.setattr(os, "fsync", another)
    storage.write_atomically(path, "ours")
    assert path.read_text() == "ours"
    assert listed(tmp_path) == ["a"]


def test_contents_of_another_kind_leave_nothing(tmp_path):
    with pytest.raises(TypeError):
        storage.write_atomically(tmp_path / "a", 3)
    with pytest.raises(FileNotFoundError):
        storage.write_atomically(tmp_path / "none" / "a", "text")
    assert listed(tmp_path) == []


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_full_disk_names_the_file(tmp_path, monkeypatch, step):
    """It used to say "[Errno 28] No space left on device", and no path."""

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, step, full)
    with pytest.raises(OSError, match="No space left") as caught:
        storage.write_atomically(tmp_path / "a", "new")
    assert caught.value.filename == str(tmp_path / "a")
    assert caught.value.errno == errno.ENOSPC


@pytest.mark.skipif(os.name == "nt", reason="makes a pipe")
def test_what_has_no_end_is_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("/dev/zero")
    for name in ("pipe", "link", "."):
        with pytest.raises(ValueError, match="is not a file but a directory, a pipe or a device"):
            files.read(tmp_path / name)


def test_json_that_is_none_or_too_deep_is_named():
    for text in (b"", b"{", b"\xff", "[1,"):
        with pytest.raises(ValueError, match=r"a.json is not JSON, perhaps truncated"):
            files.parse(text, "a.json")
    with pytest.raises(ValueError, match=r"a.json is JSON nested too deeply"):
        files.parse("[" * 10**6, "a.json")
