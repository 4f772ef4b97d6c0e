"""One function written in several ways: what filter normalisation makes the same again, and what it does not.

In a network of positively homogeneous activations, what comes into a channel may be multiplied by c > 0 and what goes
out divided by it.  One factor for a whole layer scales every filter below and above alike, and with it the directions:
the surface stays.  A factor of its own for every channel scales the filters below, but changes the shape of those
above, whose entries are divided by different numbers and whose length is one: the surface becomes another one.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn

from meanfield import landscape
from meanfield.bench.classifiers import Classifier
from meanfield.bench.sweep import Cell, Row
from meanfield.network import along_axis
from meanfield.studies.landscape.measure import drawn


def toy(cell: Cell, store: str) -> list[Row]:
    """A row per writing of a ReLU and of a tanh network: how far outputs differ from the network's own, as a share of
    the largest, and the mean loss over the surface of filter-normalised directions, drawn from one seed.

    cell: networks of two convolutions, a ReLU and a tanh one; spread, the largest factor; grid, tolerance, seed.
    """
    rows = []
    for settings, epoch in zip(cell["networks"], cell["epochs"]):
        classifier = Classifier.from_dict(settings)
        network = classifier.at(epoch, store)
        for writing, written in writings(network, cell["spread"], cell["seed"]).items():
            named = {**cell["names"], "activation": classifier.activation, "writing": writing}
            rows.append({**named, **_measured(classifier, network, written, cell)})
            if classifier.activation == "relu" and writing != "per layer":
                even = landscape.balanced(written)
                rows.append({**named, "writing": f"{writing}, balanced", **_measured(classifier, network, even, cell)})
    return rows


def writings(network: nn.Module, spread: float, seed: int) -> dict[str, nn.Module]:
    """As it is; the first layer times `spread`; its channels times factors of their own, log-uniform between 1/spread
    and spread.
    """
    channels = len(network.get_submodule("conv1").get_parameter("weight"))
    generator = torch.Generator().manual_seed(seed)
    drawn_so = (2 * torch.rand(channels, generator=generator, dtype=torch.float64) - 1) * math.log(spread)
    factors = {"per layer": torch.full((channels,), spread, dtype=torch.float64), "per channel": drawn_so.exp()}
    return {"as it is": network, **{name: rescaled(network, each) for name, each in factors.items()}}


@torch.no_grad()
def rescaled(network: nn.Module, factors: Tensor) -> nn.Module:
    """What comes into channel i of conv1 times factors[i], what conv2 takes from it divided by that; a copy."""
    found = copy.deepcopy(network)
    below: Any = found.get_submodule("conv1")
    above: Any = found.get_submodule("conv2")
    scale = factors.to(below.weight)
    below.weight.mul_(along_axis(scale, below.weight, 0))
    below.bias.mul_(scale)
    above.weight.div_(along_axis(scale, above.weight, 1))
    return found


@torch.no_grad()
def _measured(classifier: Classifier, network: nn.Module, written: nn.Module, cell: Cell) -> Row:
    images = classifier.images()
    own, other = (each.eval()(images.held_out).double() for each in (network, written))
    plane = landscape.plane(written, cell["seed"], "filter")
    found = landscape.surface(
        written,
        plane,
        images.inputs,
        classifier.training_labels(),
        cell["tolerance"],
        max_evaluations=cell["evaluations"],
        seed=cell["seed"],
    )
    row = drawn(found, plane, cell["grid"])
    values = torch.tensor(row["values"][found.figures[0]], dtype=torch.float64)
    return {
        "difference": float((own - other).abs().max() / own.abs().max()),
        "mean_loss": float(values.mean()),
        **row,
    }
