"""Files: writes that are whole or not at all, and networks as safetensors with a JSON description beside them."""

from __future__ import annotations

import json
import math
import os
import secrets
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from meanfield.architecture import Architecture
from meanfield.network import ParticleNetwork
from meanfield.signatures import checked
from meanfield.validation import Misuse

FORMAT = "meanfield network 1"
TENSORS, DESCRIPTION = ".safetensors", ".json"


def write_atomically(path: Path, content: bytes | str) -> Path:
    """Write under a temporary name in the same directory, then rename: readers see the old file or
    the whole new one.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        with temporary.open("xb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


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


@checked
def save_network(network: ParticleNetwork, path: str | Path, made: Mapping[str, Any] | None = None) -> Path:
    """Write `path` (.safetensors) and its description beside it (.json); returns the path of the tensors.

    The description is written last: where it is there, so are the tensors.  made: what made it, for the reader.
    """
    tensors = {f"masses.{i}": p for i, p in enumerate(network.masses)} | {
        f"kernels.{i}": w for i, w in enumerate(network.kernels)
    }
    tensors |= {"readout": network.readout} | {f"biases.{i}": b for i, b in enumerate(network.biases) if b is not None}
    path = save_tensors(tensors, path)
    description = {
        "format": FORMAT,
        "tensors": path.name,
        "architecture": network.architecture.to_dict(),
        "widths": list(network.widths),
        "dtype": str(network.dtype).removeprefix("torch."),
        "made": made,
    }
    write_atomically(path.with_suffix(DESCRIPTION), json.dumps(description, indent=2) + "\n")
    return path


def load_network(path: str | Path) -> ParticleNetwork:
    """The network of `path` (.safetensors, or the directory of a report), on the CPU in the dtype it was saved in.

    Raises FileNotFoundError, and ValueError where a file is truncated, of another kind or does not fit its description.
    """
    path = Path(path)
    path = path / f"network{TENSORS}" if path.is_dir() else _tensors_path(path)
    description = _description(path.with_suffix(DESCRIPTION))
    architecture = Architecture.from_dict(description["architecture"])
    tensors = load_tensors(path)
    layers = range(architecture.depth)
    expected = {"readout", *(f"{kind}.{i}" for kind in ("masses", "kernels") for i in layers)}
    expected |= {f"biases.{i}" for i in layers if architecture.layers[i].bias}
    if set(tensors) != expected:
        raise ValueError(
            f"{path} holds the tensors {sorted(tensors)}; its description {path.with_suffix(DESCRIPTION).name} needs "
            f"{sorted(expected)}"
        )
    masses, kernels = ([tensors[f"{kind}.{i}"] for i in layers] for kind in ("masses", "kernels"))
    try:
        return ParticleNetwork(
            architecture, masses, kernels, tensors["readout"], [tensors.get(f"biases.{i}") for i in layers]
        )
    except ValueError as error:
        raise ValueError(f"{path} does not fit its description: {error}") from error


def save_tensors(tensors: dict[str, Tensor], path: str | Path) -> Path:
    """Write tensors to `path` (.safetensors)."""
    from safetensors.torch import save

    path = _tensors_path(path)
    return write_atomically(path, save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}))


def _tensors_path(path: str | Path) -> Path:
    path = Path(path)
    if path.suffix != TENSORS:
        raise Misuse("path", str(path), f"must end in {TENSORS}")
    return path


def _description(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; it describes the architecture of the tensors beside it")
    try:
        description = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON, perhaps truncated ({error})") from error
    if (
        not isinstance(description, dict)
        or description.get("format") != FORMAT
        or not isinstance(description.get("architecture"), dict)
    ):
        raise ValueError(
            f'{path} does not describe a network: expected a JSON object with "format": {FORMAT!r} and an '
            '"architecture"'
        )
    return description


def load_tensors(path: str | Path) -> dict[str, Tensor]:
    """The tensors of `path` (.safetensors), on the CPU; FileNotFoundError, ValueError where it is truncated or of
    another kind.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    path = _tensors_path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; give the path of a {TENSORS} file")
    try:
        return load(path.read_bytes())
    except (SafetensorError, ValueError, KeyError) as error:
        raise ValueError(f"{path} is not a safetensors file, perhaps truncated ({error})") from error
