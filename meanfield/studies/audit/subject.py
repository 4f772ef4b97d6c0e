"""The network of a file, the images and the objective that it is audited on: what was asked for, or what it was made
with.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from meanfield.auditing import implied_penalty, in_float64
from meanfield.bench import reading
from meanfield.data import Dataset
from meanfield.modules import archive, chain
from meanfield.network import ParticleNetwork
from meanfield.penalties import Penalty
from meanfield.problem import Problem
from meanfield.storage import load_network, networks
from meanfield.validation import Misuse

PRICES = {"source": "source_penalty", "readout": "readout_penalty", "input": "input_penalty"}
FURTHER = ("kernel_norm", "amplitude_bound", "input_bound")
READ = ("data", "classes", "samples", "pool", "split", "loss")


@dataclass(frozen=True)
class Subject:
    """asked: settings, None where they are left open."""

    path: str
    asked: dict[str, Any]

    @cached_property
    def made(self) -> dict[str, Any]:
        """Settings of the solve that wrote the network."""
        return {} if self.path.endswith(archive.EXPORTED) else networks.made_by(self.path).get("settings", {})

    @cached_property
    def settings(self) -> dict[str, Any]:
        """With as little left open as can be."""
        asked = {name: value for name, value in self.asked.items() if value is not None}
        # other images than those of the solve are read as they are asked for
        own = asked.get("data", self.made.get("data")) == self.made.get("data")
        made = {name: self.made.get(name) for name in (*PRICES.values(), *FURTHER, *(READ if own else ("loss",)))}
        made = {name: value for name, value in made.items() if value is not None}
        if any(name in asked for name in PRICES.values()):
            made = {name: value for name, value in made.items() if name not in PRICES.values()}
        return {**dict.fromkeys(self.asked), "data": "digits", "pool": 1, **made, **asked}

    @cached_property
    def network(self) -> ParticleNetwork:
        """In float64."""
        if not self.path.endswith(archive.EXPORTED):
            return in_float64(load_network(self.path))
        try:
            return in_float64(ParticleNetwork(*chain.particles(archive.of_file(self.path))))
        except Misuse as error:  # of the file or a layer, in words of the command line
            said = error.remedy if error.value == self.path else f"has {error.value!r}, which {error.remedy}"
            raise Misuse("network", self.path, said) from error

    @cached_property
    def images(self) -> Dataset:
        chosen = {name: self.settings[name] for name in ("data", "samples", "pool", "split")}
        classes = self.settings["classes"]
        return reading.images(**chosen, classes=None if classes is None else tuple(classes))

    @cached_property
    def loss(self) -> str:
        return self.settings["loss"] or ("softmax" if self.network.architecture.outputs > 1 else "logistic")

    def problem(self, images: Dataset, penalty: Penalty | None = None) -> Problem:
        """In float64; Misuse where the images are none for this network."""
        architecture = self.network.architecture
        if architecture.input_shape != images.input_shape:
            remedy = f"takes images {architecture.input_shape}, and --data={self.settings['data']!r} has "
            raise Misuse("network", self.path, f"{remedy}{images.input_shape}: see --pool, --data")
        needed = images.outputs_for(self.loss)
        if architecture.outputs != needed:
            remedy = f"has {architecture.outputs} outputs; {len(images.classes)} classes with --loss={self.loss} need "
            raise Misuse("network", self.path, f"{remedy}{needed}: see --classes, --loss")
        return Problem(architecture, images.inputs.double(), images.targets(self.loss), self.loss, penalty)

    def penalty(self, images: Dataset) -> Penalty:
        """What was asked for or the solve had, 0 for those left out beside others; else the implied strengths."""
        given = {name: self.settings[setting] for name, setting in PRICES.items()}
        further = {name: self.settings[name] for name in FURTHER if self.settings[name] is not None}
        if self.implied:
            return implied_penalty(self.problem(images, Penalty(**further)), self.network)
        return Penalty(**{name: value or 0.0 for name, value in given.items()}, **further)

    @property
    def implied(self) -> bool:
        """Whether no strength was asked for or known."""
        return all(self.settings[name] is None for name in PRICES.values())


def saved(value: Any, argument: str) -> str:
    """A file of a network, an exported module, or the directory of a solve."""
    place = Path(str(value))
    suffixes = (".safetensors", archive.EXPORTED)
    if not value or not (place.is_dir() or (place.suffix in suffixes and place.is_file())):
        text = "must be NETWORK.safetensors, MODULE.pt2 as torch.export.save writes it, or the directory of a solve"
        raise Misuse(argument, value, text)
    return str(value)
