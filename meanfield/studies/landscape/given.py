"""The surface of networks that the caller has: files that `meanfield solve` and `save_network` write."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import meanfield as mf
from meanfield.bench import reading
from meanfield.bench.sweep import Cell, Row
from meanfield.data import Dataset
from meanfield.penalties import Penalty
from meanfield.storage import files, load_network, networks
from meanfield.studies.landscape import plan
from meanfield.studies.landscape.measure import PLANES, around, planes
from meanfield.validation import Misuse

PRICES = {"source": "source_penalty", "readout": "readout_penalty", "input": "input_penalty"}
FURTHER = ("kernel_norm", "amplitude_bound", "input_bound")
READ = ("data", "classes", "samples", "pool", "split", "loss")  # of the images and the loss


@dataclass(frozen=True)
class Given:
    """Files of networks, which images and loss (READ; None: as the first network was made), and the view.

    With the settings of a solve in the first file J is drawn as well.
    """

    paths: tuple[str, ...]
    view: plan.View
    wanted: tuple[tuple[str, Any], ...] = ()

    @cached_property
    def settings(self) -> dict[str, Any]:
        made = networks.made_by(self.paths[0]).get("settings", {})
        usual = {"data": "digits", "pool": 1}
        asked = {name: value for name, value in self.wanted if value is not None}
        # other images than those of the solve are read as they are asked for, without its selection
        known = {} if asked.get("data", made.get("data")) != made.get("data") else made
        kept = {name: known.get(name) for name in READ if known.get(name) is not None}
        return {**dict.fromkeys(READ), **usual, **{"loss": made.get("loss")}, **kept, **asked}

    @cached_property
    def networks(self) -> list[mf.ParticleNetwork]:
        return [load_network(path) for path in self.paths]

    @cached_property
    def images(self) -> Dataset:
        chosen = {name: self.settings[name] for name in ("data", "classes", "samples", "pool", "split")}
        classes = chosen.pop("classes")
        return reading.images(**chosen, classes=None if classes is None else tuple(classes))

    @cached_property
    def loss(self) -> str:
        return self.settings["loss"] or ("softmax" if self.networks[0].architecture.outputs > 1 else "squared")

    @cached_property
    def penalty(self) -> Penalty | None:
        """That of the solve."""
        made = networks.made_by(self.paths[0]).get("settings", {})
        if any(made.get(setting) is None for setting in PRICES.values()):
            return None
        prices = {name: made[setting] for name, setting in PRICES.items()}
        return Penalty(**prices, **{name: made[name] for name in FURTHER if made.get(name) is not None})

    def problem(self, images: Dataset) -> mf.Problem:
        """The images as the networks take them."""
        network = self.networks[0]
        expected, found = network.architecture.input_shape, images.input_shape
        if expected != found:
            remedy = f"takes images {expected}, and --data={self.settings['data']!r} has {found}: see --pool, --data"
            raise Misuse("network", self.paths[0], remedy)
        outputs = images.outputs_for(self.loss)
        if network.architecture.outputs != outputs:
            classes = f"{len(images.classes)} classes with --loss={self.loss}"
            remedy = f"has {network.architecture.outputs} outputs, and {classes} need {outputs}: see --classes, --loss"
            raise Misuse("network", self.paths[0], remedy)
        targets = images.targets(self.loss)
        problem = mf.Problem(network.architecture, images.inputs, targets, self.loss, self.penalty or Penalty())
        return problem.to(dtype=network.dtype)

    def check(self) -> None:
        """Refuse what the surface could not be drawn of, before any work."""
        kind, count = self.view.plane, len(self.paths)
        if count < PLANES[kind] or (kind != "pca" and count > PLANES[kind]):
            least = "at least " if kind == "pca" else ""
            came = "is 1 network" if count == 1 else f"are {count} networks"
            raise Misuse("network", self.paths, f"{came}; --plane={kind} takes {least}{PLANES[kind]}")
        problem = self.problem(self.images)
        for name in ("architecture", "widths", "dtype"):
            found = dict.fromkeys(str(getattr(each, name)) for each in self.networks)
            if len(found) > 1:
                shown = "" if name == "architecture" else f", {' and '.join(found)}"
                raise Misuse("network", self.paths, f"are networks of several {name}{shown}: give networks alike")
        if kind in ("line", "triangle", "pca"):
            try:
                planes(self.networks, self.view.cell(0), problem.inputs, problem.targets, problem.loss.value)
            except Misuse:
                remedy = f"span no plane for --plane={kind}: give networks that differ, and three not along one line"
                raise Misuse("network", self.paths, remedy) from None


def cells(given: Given, sizes: Any, seed: int) -> list[Cell]:
    """One: it names the files' contents, so that another network of the same name is another cell."""
    contents = [files.checksum(_content(Path(path))) for path in given.paths]
    return [
        {
            "paths": list(given.paths),
            "contents": contents,
            "wanted": [list(each) for each in given.wanted],
            "names": {"arm": ", ".join(Path(path).stem for path in given.paths)},
            **given.view.cell(seed),
        }
    ]


def _content(path: Path) -> bytes:
    return files.read(path / networks.NETWORK if path.is_dir() else path)


def surface(cell: Cell, store: str) -> list[Row]:
    """The row of the surface around the last of the networks, or through them."""
    view = plan.View.from_dict(cell)
    given = Given(tuple(cell["paths"]), view, tuple((name, _plain(value)) for name, value in cell["wanted"]))
    problem, rest = given.problem(given.images), given.images.rest
    held_out = None if rest is None else given.problem(rest)
    plane = planes(given.networks, cell, problem.inputs, problem.targets, problem.loss.value)
    row = around(
        given.networks[-1],
        plane,
        problem.inputs,
        problem.targets,
        None if held_out is None else (held_out.inputs, held_out.targets),
        problem.loss.value,
        cell,
        store,
        given.penalty,
    )
    return [{**cell["names"], **row}]


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def digest(images: Dataset) -> str:
    """Of the images and labels, those held out as well."""
    parts = [images] if images.rest is None else [images, images.rest]
    return files.checksum(b"".join(each.inputs.numpy().tobytes() + each.labels.numpy().tobytes() for each in parts))[
        :16
    ]
