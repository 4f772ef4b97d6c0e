"""Networks as one file each: the tensors with the architecture, widths and dtype that they belong to."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor

from meanfield import validation
from meanfield.activations import ACTIVATIONS, Activation
from meanfield.architecture import Architecture
from meanfield.network import ParticleNetwork
from meanfield.signatures import checked
from meanfield.storage import files, tensors
from meanfield.storage.results import Result
from meanfield.validation import Misuse

KIND = "meanfield network 2"
RESULT, NETWORK = "solve", "network.safetensors"  # in the directory of a report
OLDER = (
    "does not say which network it holds: it is no network of this library, or one written before its description "
    "moved into the file; run the command named in results.json beside it again"
)


@checked
def save_network(
    network: ParticleNetwork, path: Annotated[str | Path, validation.path], made: Mapping[str, Any] | None = None
) -> Path:
    """Write `path` (.safetensors), which holds everything `load_network` needs; returns it.  made: what made it, for
    the reader.
    """
    return files.write_atomically(tensors.suffixed(path), pack(network, made))


def pack(network: ParticleNetwork, made: Mapping[str, Any] | None = None) -> bytes:
    """The content of the file."""
    used = {layer.h.name: layer.h for layer in network.architecture.layers}
    about = {
        "architecture": network.architecture.to_dict(),
        "widths": list(network.widths),
        "dtype": str(network.dtype).removeprefix("torch."),
        "activations": {name: h.fingerprint() for name, h in used.items()},
        "made": None if made is None else json.loads(files.to_json(made)),
    }
    return tensors.pack(_named(network), KIND, about)


@checked
def load_network(
    path: Annotated[str | Path, validation.path], activations: Sequence[Activation] = ()
) -> ParticleNetwork:
    """The network of `path` (.safetensors, or the directory of a report), on the CPU in the dtype it was saved in.

    activations: those of the network that are not in `activations.ACTIVATIONS`; a file holds their names and a few of
    their values, and no functions.

    Raises FileNotFoundError, and ValueError where a file is truncated or changed, of another kind, where the
    directory's other files are of another run, and where an activation is not given or is another function.
    """
    held, about, place = _read(Path(path))
    given = _given(activations, about.get("activations", {}), place)
    try:
        return _network(held, about, given)
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{place} does not fit its description: {error}") from error


@checked
def made_by(path: Annotated[str | Path, validation.path]) -> dict[str, Any]:
    """What made the network of `path`, as it was given to `save_network`; {} where nothing was.  Raises as
    `load_network`.
    """
    _, about, _ = _read(Path(path))
    return about.get("made") or {}


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any], Path]:
    """Tensors, their description, and the file."""
    if path.is_dir():
        content, path = Result(path, RESULT).read(NETWORK), path / NETWORK
        held, about = tensors.unpack(content, path)
    else:
        held, about = tensors.read(tensors.suffixed(path))
    if about is None:
        raise ValueError(f"{path} {OLDER}")
    if about.get("kind") != KIND:
        raise ValueError(f"{path} holds {about.get('kind')!r}, not {KIND!r}")
    return held, about, path


def _given(activations: Sequence[Activation], stored: dict[str, list[float]], place: Path) -> list[Activation]:
    """The activations that the file names, by the values that it holds of them."""
    known = {**ACTIVATIONS, **{validation.instance(each, "activations", Activation).name: each for each in activations}}
    for name, values in stored.items():
        if name not in known:
            remedy = f"must hold {name!r}, the Activation of the network in {place}, which holds its name alone"
            raise Misuse("activations", tuple(each.name for each in activations), remedy)
        here = known[name].fingerprint()[: len(values)]  # files of before hold the first ones alone
        if not torch.allclose(torch.tensor(here), torch.tensor(values), rtol=1e-6, atol=1e-6):
            raise Misuse("activations", name, f"is another function than the one of this name in {place}")
    return [known[name] for name in stored]


def _network(held: dict[str, Tensor], about: dict[str, Any], activations: Sequence[Activation]) -> ParticleNetwork:
    architecture = Architecture.from_dict(about["architecture"], activations)
    layers = range(architecture.depth)
    expected = {"readout", *(f"{kind}.{i}" for kind in ("masses", "kernels") for i in layers)}
    expected |= {f"biases.{i}" for i in layers if architecture.layers[i].bias}
    if set(held) != expected:
        raise ValueError(f"it holds the tensors {sorted(held)} and needs {sorted(expected)}")
    masses, kernels = ([held[f"{kind}.{i}"] for i in layers] for kind in ("masses", "kernels"))
    network = ParticleNetwork(architecture, masses, kernels, held["readout"], [held.get(f"biases.{i}") for i in layers])
    found = {"widths": list(network.widths), "dtype": str(network.dtype).removeprefix("torch.")}
    for name, value in found.items():
        if about[name] != value:
            raise ValueError(f"its {name} are said to be {about[name]!r} and are {value!r}")
    return network


def _named(network: ParticleNetwork) -> dict[str, Tensor]:
    found = {f"masses.{i}": p for i, p in enumerate(network.masses)}
    found |= {f"kernels.{i}": w for i, w in enumerate(network.kernels)} | {"readout": network.readout}
    return found | {f"biases.{i}": b for i, b in enumerate(network.biases) if b is not None}
