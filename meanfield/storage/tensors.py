"""Tensors as safetensors files that say what they are: kind, description and checksum stand in their own header."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from meanfield.storage import files
from meanfield.validation import Misuse

TENSORS = ".safetensors"
KEY = "meanfield"  # of the header's metadata; one entry, for their order is not kept
PLAIN = "meanfield tensors 1"


def digest(tensors: Iterable[Tensor]) -> str:
    """SHA-256 of dtypes, shapes and entries, in hexadecimal; the same on every device."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def pack(tensors: Mapping[str, Tensor], kind: str, about: Mapping[str, Any]) -> bytes:
    """A safetensors file; `about` is of JSON kinds, its floats are kept to the last bit."""
    from safetensors.torch import save

    kept = {name: tensor.detach().cpu().contiguous() for name, tensor in sorted(tensors.items())}
    body = {"kind": kind, **about}
    return save(kept, metadata={KEY: json.dumps({**body, "sha256": _checksum(body, kept)})})


def unpack(content: bytes, where: str | Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """Tensors, on the CPU, and what `pack` was told, with the "kind"; None in its place in a file of other origin.

    Raises ValueError where the content is truncated, of another format or does not fit its checksum.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        tensors = load(content)
    except (SafetensorError, ValueError, KeyError) as error:
        raise ValueError(f"{where} is not a safetensors file, perhaps truncated ({error})") from error
    size = int.from_bytes(content[:8], "little")
    text = (files.parse(content[8 : 8 + size], f"the header of {where}").get("__metadata__") or {}).get(KEY)
    if text is None:
        return tensors, None
    body = files.parse(text, f"the description in {where}")
    if not isinstance(body, dict) or body.pop("sha256", None) != _checksum(body, tensors):
        raise ValueError(f"{where} is damaged: its checksum does not fit")
    return tensors, body


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """As `unpack`, from a file that is opened once; FileNotFoundError without it."""
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; give the path of a {TENSORS} file")
    return unpack(files.read(path), path)


def save_tensors(tensors: Mapping[str, Tensor], path: str | Path) -> Path:
    """Write tensors to `path` (.safetensors)."""
    return files.write_atomically(suffixed(path), pack(tensors, PLAIN, {}))


def load_tensors(path: str | Path) -> dict[str, Tensor]:
    """The tensors of `path` (.safetensors), on the CPU; FileNotFoundError, ValueError where it is truncated, of another
    format or does not fit the checksum in it.
    """
    return read(suffixed(path))[0]


def suffixed(path: str | Path, argument: str = "path") -> Path:
    """The path; Misuse unless it ends in .safetensors."""
    if Path(path).suffix != TENSORS:
        raise Misuse(argument, str(path), f"must end in {TENSORS}")
    return Path(path)


def _checksum(body: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    names = sorted(tensors)
    named = json.dumps([body, names], sort_keys=True)
    return files.checksum(named + digest(tensors[name] for name in names))
