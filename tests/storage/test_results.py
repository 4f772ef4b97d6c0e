"""A result changes as a whole: whatever ends the process at whatever moment, the folder holds one or the other."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from meanfield.storage import files, locks, results
from meanfield.storage.results import Result, opened
from meanfield.validation import Misuse

OLD = {"a": "old a", "b": b"old b", "only old": "x"}
NEW = {"a": "new a", "b": b"new b", "only new": "y"}


def there(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def as_bytes(contents):
    return {name: content.encode() if isinstance(content, str) else content for name, content in contents.items()}


def without_manifest(directory):
    found = there(directory)
    return {name: found[name] for name in found if name != "r.manifest.json"}


def test_a_result_replaces_the_older_one_as_a_whole(tmp_path):
    result = Result(tmp_path, "r")
    for contents in (OLD, NEW, NEW):
        result.publish(contents)
        assert without_manifest(tmp_path) == as_bytes(contents)
        assert (result.faults(), set(result.listed())) == ([], set(contents))
    assert result.read("a") == b"new a"


class Killed(BaseException):
    """As by kill -9: nothing is cleaned up after it."""


class Mortal:
    """Functions of os and shutil that end the process at the n-th call that changes the disk."""

    def __init__(self, patch, calls):
        self.left = calls
        for module, name in (
            (os, "replace"), (os, "unlink"), (os, "rmdir"), (os, "mkdir"), (os, "rename"), (os, "fsync"),
        ):  # fmt: skip
            patch.setattr(module, name, self.counted(getattr(module, name)))
        patch.setattr(shutil, "rmtree", lambda *_, **__: None)  # a killed process does not clean up

    def counted(self, function):
        def call(*arguments, **options):
            if self.left == 0:
                raise Killed
            self.left -= 1
            return function(*arguments, **options)

        return call


def test_killed_at_every_moment_the_folder_holds_the_old_result_or_the_new_one(tmp_path):
    seen = []
    for calls in range(100):
        directory = tmp_path / str(calls)
        directory.mkdir()
        Result(directory, "r").publish(OLD)
        with pytest.MonkeyPatch.context() as patch:
            Mortal(patch, calls)
            try:
                Result(directory, "r").publish(NEW)
                ended = False
            except Killed:
                ended = True
        result = Result(directory, "r")
        assert result.faults() == []
        found = {name: result.read(name) for name in result.listed()}  # for readers, before anyone cleaned up
        assert found in (as_bytes(OLD), as_bytes(NEW))
        with opened(directory, "r", NEW):
            visible = {path.name: path.read_bytes() for path in directory.iterdir() if not path.name.startswith(".")}
        assert visible.pop("r.manifest.json")
        assert visible == found  # for people, after
        seen.append(found == as_bytes(NEW))
        result.publish(NEW)
        assert without_manifest(directory) == as_bytes(NEW)
        if not ended:
            break
    assert not ended
    assert seen == sorted(seen)  # from one moment on it is the new one
    assert len(seen) > 12
    assert set(seen) == {False, True}


def there_names(directory):
    return [path.name for path in directory.iterdir()]


def test_what_the_disk_cannot_hold_leaves_the_older_result(tmp_path, monkeypatch):
    result = Result(tmp_path, "r")
    result.publish(OLD)
    before, write = there(tmp_path), files.write_new

    def full(path, content):
        if path.name == "b":
            raise OSError(28, "No space left on device")
        write(path, content)

    monkeypatch.setattr(files, "write_new", full)
    with pytest.raises(OSError, match="No space left") as caught:
        result.publish(NEW)
    assert caught.value.filename == str(tmp_path / "b")
    assert there(tmp_path) == before


def test_readers_find_one_result_while_it_is_replaced(tmp_path, monkeypatch):
    """Every rename of a publication is watched."""
    result, replace, seen = Result(tmp_path, "r"), os.replace, []
    result.publish(OLD)

    def look(*paths):
        for moment in range(2):
            seen.append({name: result.read(name) for name in result.listed()})
            if not moment:
                replace(*paths)

    monkeypatch.setattr(os, "replace", look)
    result.publish(NEW)
    assert len(seen) == 2 * (len(NEW) + 1)
    assert all(found == as_bytes(NEW) for found in seen)


def test_files_that_are_not_ours_stay(tmp_path):
    (tmp_path / "a").write_text("theirs")
    (tmp_path / "notes").write_text("theirs")
    with pytest.raises(Misuse, match=r"out='.*' holds a, which is no part of an earlier r there; give another"):
        opened(tmp_path, "r", NEW).__enter__()
    with opened(tmp_path, "r", NEW, overwrite=True) as result:
        result.publish(NEW)
    with opened(tmp_path, "r", NEW) as result:
        result.publish(OLD)
    assert without_manifest(tmp_path) == {**as_bytes(OLD), "notes": b"theirs"}
    (tmp_path / "a").write_text("changed by hand")
    with pytest.raises(Misuse, match="holds a, which is no part"):
        opened(tmp_path, "r", NEW).__enter__()
    with pytest.raises(Misuse, match="holds a, which is no part of an earlier other there"):
        opened(tmp_path, "other", ["a"]).__enter__()


def test_what_was_changed_by_hand_is_not_removed(tmp_path):
    result = Result(tmp_path, "r")
    result.publish(OLD)
    (tmp_path / "only old").write_text("changed by hand")
    result.publish(NEW)
    assert (tmp_path / "only old").read_text() == "changed by hand"


@pytest.mark.parametrize("content", ["", "{", "[]", '{"format": "meanfield result 1"}', '{"files": {}}'])
def test_a_damaged_manifest_is_named(tmp_path, content):
    (tmp_path / "r.manifest.json").write_text(content)
    with pytest.raises(ValueError, match=r"r.manifest.json"):
        Result(tmp_path, "r").read("a")
    with pytest.raises(Misuse, match=r"holds a damaged r.manifest.json"):
        opened(tmp_path, "r").__enter__()
    with opened(tmp_path, "r", overwrite=True) as result:
        result.publish(NEW)
    assert without_manifest(tmp_path) == as_bytes(NEW)


def test_a_manifest_names_nothing_elsewhere(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "precious").write_text("theirs")
    listed = {"../precious": files.checksum("theirs")}
    manifest = {"format": results.FORMAT, "result": "r", "files": listed}
    (tmp_path / "out" / "r.manifest.json").write_text(json.dumps(manifest))
    Result(tmp_path / "out", "r").publish(NEW)
    assert (tmp_path / "precious").exists()


def test_places_that_cannot_be_written_are_refused_and_leave_nothing(tmp_path):
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "a").mkdir()
    for place, text in (
        ("file", "it is no directory"),
        ("pipe", "it is no directory"),
        ("file/deeper", "Not a directory"),
        (".", "a is a directory; give another one"),
    ):
        with pytest.raises(Misuse, match=rf"out='.*' cannot be .*{text}"):
            opened(tmp_path / place, "r", NEW).__enter__()
    with pytest.raises(Misuse, match="file is no directory; give another one"):
        opened(tmp_path, "r", (), ["file"]).__enter__()
    assert sorted(there_names(tmp_path)) == ["a", "file", "pipe"]


def test_a_directory_that_stays_empty_goes(tmp_path):
    (tmp_path / "mine").mkdir()
    for place in ("one/two", "mine"):
        with pytest.raises(ZeroDivisionError), opened(tmp_path / place, "r"):
            raise ZeroDivisionError
    assert there_names(tmp_path) == ["mine"]
    assert there_names(tmp_path / "mine") == []


HOLD = """
import sys, time
from pathlib import Path
from meanfield.storage import locks
with locks.held(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.mark.skipif(os.name == "nt", reason="flock")
def test_one_command_to_a_folder_until_its_process_ends(tmp_path):
    with opened(tmp_path, "r"), pytest.raises(Misuse, match=rf"is in use by another command \(process {os.getpid()}\)"):
        opened(tmp_path, "other").__enter__()
    assert there_names(tmp_path) == []
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"held\n"
        with pytest.raises(Misuse, match=rf"in use by another command \(process {process.pid}\)"):
            opened(tmp_path, "r").__enter__()
        process.kill()
    assert there_names(tmp_path) == [locks.LOCK]
    with opened(tmp_path, "r") as result:
        result.publish(NEW)
    assert without_manifest(tmp_path) == as_bytes(NEW)


@pytest.mark.skipif(os.name == "nt", reason="flock")
def test_a_full_disk_can_be_locked_and_left_as_it_was(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with opened(tmp_path / "new", "r"):
        pass
    assert there_names(tmp_path) == []


@pytest.mark.skipif(os.name == "nt", reason="flock")
def test_a_lock_that_its_owner_removed_in_between_is_taken_anew(tmp_path, monkeypatch):
    """Between opening and locking the file of another, it may go: the lock of a file without a name is none."""
    lock, before = locks._lock, []

    def late(file, path):
        if not before:
            before.append(path.unlink())
        lock(file, path)

    monkeypatch.setattr(locks, "_lock", late)
    with locks.held(tmp_path), pytest.raises(locks.Taken):
        locks.held(tmp_path).__enter__()


@pytest.mark.skipif(os.name == "nt", reason="flock")
def test_where_there_are_no_locks_a_warning_says_so(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(locks.fcntl, "flock", no_locks)
    with pytest.warns(UserWarning, match=r"cannot be locked \(Function not implemented\)"), opened(tmp_path, "r"):
        assert Path(tmp_path, locks.LOCK).exists()


@pytest.mark.parametrize(
    "spoil",
    [
        lambda place: (place / ".r.part").write_text("a file"),
        lambda place: (place / ".r.part").symlink_to(place.parent),
        lambda place: (place / ".r.new").write_text("a file"),
        lambda place: (place / ".r.new").symlink_to(place.parent / "nowhere"),
        lambda place: [(place / ".r.new").mkdir(), (place / ".r.new" / "a.txt").write_text("no manifest")],
        lambda place: [(place / ".r.new").mkdir(), (place / ".r.new" / "r.manifest.json").write_text("{")],
    ],
)
@pytest.mark.parametrize("overwrite", [False, True])
def test_what_would_be_in_the_way_of_a_result_is_refused_before_the_work(tmp_path, spoil, overwrite):
    """It ended the write after all work, or the opening without the name of an argument."""
    place = tmp_path / "out"
    with opened(place, "r", OLD) as result:
        result.publish(OLD)
    spoil(place)
    message = r"out='.*out' has the remains of a change that cannot be completed \(.*\); remove them or give another"
    with pytest.raises(Misuse, match=message):
        opened(place, "r", {**OLD, **NEW}, overwrite=overwrite).__enter__()
    assert not (place / locks.LOCK).exists()
