"""Arrays of an .npz archive: sizes are looked at before anything is unpacked, and nothing pickled is loaded."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO
from zipfile import ZipFile, ZipInfo

import numpy as np

from meanfield.data.address import NAMES
from meanfield.data.memory import afford, shortage_of, spelled

ZIP_MAGIC, NPY_MAGIC = b"PK\x03\x04", b"\x93NUMPY"
# photographs shrink to a third, drawings to a twentieth; zeros to a thousandth
BOMB_RATIO, BOMB_SIZE = 200, 2**26
MOST_SAID = 200  # characters
HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


class Archive:
    """An open archive: `keys`, and `array(key, what)`."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self.path = path
        try:
            self.zip = ZipFile(file)
        except Exception as error:  # whatever a damaged file does to the readers, the message must name the file
            raise ValueError(f"{path} is a damaged ZIP archive, perhaps truncated ({error})") from error
        self.members: dict[str, ZipInfo] = {}
        for member in self.zip.infolist():
            key = member.filename.removesuffix(".npy")
            if key in self.members:
                raise ValueError(f"{path} has {key!r} twice; write it anew")
            self.members[key] = member

    @property
    def keys(self) -> list[str]:
        return list(self.members)

    def array(self, key: str, what: str, kinds: str = "biuf") -> np.ndarray:
        """Numbers (text as well, with U and S in `kinds`)."""
        with warnings.catch_warnings(), shortage_of(f"{self.path}: {key!r}"):
            warnings.simplefilter("ignore")  # of headers in an old style
            self._check(key, what, kinds)
            try:
                with self.zip.open(self.members[key]) as stream:
                    return np.lib.format.read_array(stream, allow_pickle=False)
            except MemoryError:
                raise
            except Exception as error:  # as above
                raise self._damaged(key, error) from error

    def _check(self, key: str, what: str, kinds: str) -> None:
        """Before anything is unpacked."""
        member, (shape, dtype, length) = self.members[key], self._header(key)
        if dtype is not None and dtype.hasobject:
            raise ValueError(
                f"{self.path}: {key!r} is a pickled object, which could run code and is refused; store plain numbers"
            )
        if dtype is None or dtype.kind not in kinds:
            raise ValueError(f"{self.path}: {key!r} is {dtype or 'raw bytes'}; {what} must be an array of real numbers")
        declared = math.prod(shape) * dtype.itemsize
        if min(shape, default=0) < 0 or declared != length:
            raise self._damaged(key, f"its header promises {declared} bytes, {length} are there")
        if declared > BOMB_SIZE and declared > BOMB_RATIO * member.compress_size:
            raise ValueError(
                f"{self.path}: {key!r} unpacks from {spelled(member.compress_size)} to {spelled(declared)}, which no "
                "images do; if it is meant, store it with numpy.savez, not compressed"
            )
        afford(declared + 8 * math.prod(shape), f"{self.path}: {key!r} of shape {shape}")

    def _header(self, key: str) -> tuple[tuple[int, ...], np.dtype | None, int]:
        """Shape, type (None of what is no array) and bytes of the data."""
        try:
            with self.zip.open(self.members[key]) as stream:
                start = stream.read(len(NPY_MAGIC) + 2)
                if not start.startswith(NPY_MAGIC):
                    return (), None, 0
                shape, _, dtype = HEADERS[start[-2], start[-1]](stream)
                return shape, dtype, self.members[key].file_size - stream.tell()
        except Exception as error:  # as above
            raise self._damaged(key, error) from error

    def _damaged(self, key: str, why: object) -> ValueError:
        said = str(why)[:MOST_SAID]  # what is damaged may be a name as long as the file
        return ValueError(f"{self.path}: {key!r} cannot be read, the file is damaged or truncated ({said})")


@contextmanager
def opened(path: Path) -> Iterator[Archive]:
    """Of a regular file: a pipe may never end."""
    if not path.exists():
        raise FileNotFoundError(
            f"{path} does not exist; give one of {', '.join(map(repr, NAMES))} or the path of an .npz file, of a "
            "directory of images or of the binary files of CIFAR"
        )
    if not path.is_file():
        raise ValueError(f"{path} is a pipe, a socket or a device; give a regular file, written with numpy.savez")
    with path.open("rb") as file:
        magic = file.read(6)
        if not magic.startswith(ZIP_MAGIC):
            kind = "empty" if not magic else "a single .npy array" if magic == NPY_MAGIC else "of another kind"
            raise ValueError(
                f"{path} is not an .npz archive (the file is {kind}); write one with "
                "numpy.savez(path, inputs=..., targets=...)"
            )
        file.seek(0)
        yield Archive(file, path)
