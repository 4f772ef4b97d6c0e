"""Archives that promise too much, or more than they hold; files that never end."""

import os
import zipfile

import numpy as np
import pytest
from image_files import write

from meanfield import data, limits
from meanfield.data import archives
from meanfield.validation import Misuse


def header(shape, dtype="<u1", order=False):
    """The head of a .npy file that promises an array."""
    text = repr({"descr": dtype, "fortran_order": order, "shape": shape}).encode()
    text += b" " * (-(10 + len(text) + 1) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


def packed(path, **members):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(f"{name}.npy", content)
    return path


def test_a_bomb_is_refused_by_its_declared_size_before_it_is_unpacked(tmp_path, monkeypatch):
    """0.49 MB used to become 8 GB."""
    monkeypatch.setattr(archives, "BOMB_SIZE", 2**20)
    monkeypatch.setattr(np.lib.format, "read_array", lambda *_, **__: pytest.fail("unpacked"))
    path = packed(tmp_path / "bomb.npz", x=header((2000, 32, 32)) + bytes(2000 * 1024), y=header((2000,)) + bytes(2000))
    with pytest.raises(ValueError, match=r"bomb.npz: 'x' unpacks from 0.0 MB to 2.0 MB, which no images do"):
        data.load(path)


@pytest.mark.parametrize("shape", [(10**6, 1000, 1000), (10**30,), (-4, 2, 2), (3, 2, 2), (5, 2, 2)])
def test_a_header_that_promises_another_size_is_damage(tmp_path, shape):
    path = packed(tmp_path / "a.npz", x=header(shape) + bytes(16), y=header((4,)) + bytes(4))
    with pytest.raises(ValueError, match=r"a.npz: 'x' cannot be read, the file is damaged .*its header promises"):
        data.load(path)


def test_arrays_that_do_not_fit_are_refused_by_their_size(tmp_path, monkeypatch, rng):
    path = write(tmp_path / "a.npz", x=rng.random((8, 4, 4)), y=np.arange(8) % 2)
    monkeypatch.setattr(limits, "free_memory", lambda _: 1000)
    with pytest.raises(
        ValueError, match=r"a.npz: 'x' of shape \(8, 4, 4\) would take 0.0 MB of memory, and 0.0 MB may"
    ):
        data.load(path)


def test_memory_that_runs_out_on_the_way_is_no_damage(tmp_path, monkeypatch, rng):
    def fail(*_, **__):
        raise MemoryError("Unable to allocate 8 GiB")

    path = write(tmp_path / "a.npz", x=rng.random((8, 4, 4)), y=np.arange(8) % 2)
    monkeypatch.setattr(np.lib.format, "read_array", fail)
    with pytest.raises(ValueError, match=r"memory ran out over .*a.npz: 'x'") as caught:
        data.load(path)
    assert "damaged" not in str(caught.value)


def test_one_key_twice(tmp_path):
    path = tmp_path / "a.npz"
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("x.npy", "y.npy"):
            archive.writestr(name, header((4,)) + bytes(4))
        with pytest.warns(UserWarning, match="Duplicate name"):
            archive.writestr("x.npy", header((4,)) + bytes(4))
    with pytest.raises(ValueError, match=r"a.npz has 'x' twice"):
        data.load(path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes")
def test_a_pipe_or_a_device_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.npz")
    for path in (tmp_path / "pipe.npz", "/dev/zero"):
        with pytest.raises(ValueError, match="is a pipe, a socket or a device; give a regular file"):
            data.load(path)


@pytest.mark.parametrize("name", ["", "\0", "a\0.npz", "x" * 5000 + ".npz", "x/" * 3000, 3, None, b"digits"])
def test_what_is_no_path_is_refused(name):
    with pytest.raises(Misuse, match=r"^data=.* (must be one of|is too long)"):
        data.load(name)


def test_a_damaged_length_of_a_name_does_not_fill_the_screen(tmp_path, rng):
    """The whole file was quoted as the name of an array."""
    path = write(tmp_path / "a.npz", x=rng.random((4, 30, 30)), y=np.array([0, 1, 0, 1]))
    content = bytearray(path.read_bytes())
    content[26:28] = (20000).to_bytes(2, "little")  # of the name in the first local header
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"a.npz: 'x' cannot be read, the file is damaged") as refused:
        data.load(path)
    assert len(str(refused.value)) < 500
