"""One file: written whole or not at all, read with an end, JSON that is strict and not too deep."""

from __future__ import annotations

import hashlib
import json
import math
import os
import secrets
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any


def write_atomically(path: str | Path, content: bytes | str) -> Path:
    """Write under a temporary name in the same directory, then rename: readers see the old file or the whole new one.

    An OSError, such as that of a full disk, names `path`.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    with naming(path):
        try:
            write_new(temporary, content)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    return path


def write_new(path: Path, content: bytes | str) -> None:
    """Write a file that is not there yet, to the disk."""
    with path.open("xb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """OSErrors name this path: those of a full disk come without one, others with that of a temporary file."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def read(path: Path) -> bytes:
    """The content of a file; ValueError for what has no end, such as a FIFO or a device, and for a directory."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise ValueError(f"{path} is not a file but a directory, a pipe or a device")
    return path.read_bytes()


def checksum(content: bytes | str) -> str:
    """SHA-256 in hexadecimal."""
    return hashlib.sha256(content.encode() if isinstance(content, str) else content).hexdigest()


def parse(text: bytes | str, where: str | Path) -> Any:
    """The value of JSON text; ValueError, which says `where` it stood, for what is none or is nested too deeply."""
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"{where} is not JSON, perhaps truncated ({error})") from error
    except RecursionError as error:
        raise ValueError(f"{where} is JSON nested too deeply to be read") from error


def to_json(value: Any) -> str:
    """Strict JSON: NaN and infinities become null, dataclasses objects, paths text."""
    return json.dumps(_strict(value), indent=2, allow_nan=False) + "\n"


def _strict(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return _strict(asdict(value))
    if isinstance(value, Mapping):
        return {str(key): _strict(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(entry) for entry in value]
    if isinstance(value, Path):
        return str(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value
