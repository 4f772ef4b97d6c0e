"""What a part of a network may not depend on, spoilt one way at a time, below and above the cut."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from strategies import normal
from torch import Tensor, nn
from torch.nn import functional
from torch_networks import IMAGES, filled, residual

from meanfield.grafting import graft, steady

INPUTS = normal((65, 6), 1)  # batches end with a single one if they are of 64
CHANCE, MEMORY = "depends on chance in evaluation mode", "differs between two passes over the same images"
COMPANY, BUFFER = "depends for one image on the others in its batch", "changes the buffer 'seen' in evaluation mode"


class Spoilt(nn.Module):
    """What is done to the features in front of layer "b", or after it."""

    def __init__(self, way: str = "", where: str = "") -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.norm, self.unused = nn.BatchNorm1d(8, track_running_stats=False), nn.BatchNorm1d(8, affine=False)
        self.register_buffer("seen", torch.zeros(()))
        self.way, self.where, self.calls, self.generator = way, where, 0, np.random.default_rng(0)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.a(x))
        x = torch.tanh(self.b(self._spoilt(x) if self.where == "below" else x))
        return self.c(self._spoilt(x) if self.where == "above" else x)

    def _spoilt(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.way == "maximum":
            self.seen.copy_(torch.maximum(self.seen, x.abs().max()))
        return {
            "dropout": lambda: functional.dropout(x, 0.5),
            "noise": lambda: x + 1e-6 * torch.randn_like(x),
            "rarely": lambda: 2 * x if random.random() < 0.2 else x,
            "numpy": lambda: x * float(np.random.rand()),  # noqa: NPY002
            "generator": lambda: x * self.generator.random(),
            "calls": lambda: x * (1 + self.calls % 2),
            "maximum": lambda: x / self.seen,
            "norm": lambda: self.norm(x),
            "functional": lambda: functional.batch_norm(x, None, None, training=True),
            "mean": lambda: x - x.mean(0),
            "first": lambda: x - x[:1],
            "reversed": lambda: x.flip(0).cumsum(0).flip(0),
            "place": lambda: x * torch.arange(1, len(x) + 1)[:, None],
            "pairs": lambda: x.view(2, -1, 8).flip(0).flatten(0, 1),
            "squeezed": lambda: x.squeeze(0),
            "discarded": lambda: x + 0 * torch.rand(()),
        }[self.way]()


WAYS = {
    "dropout": CHANCE,
    "noise": CHANCE,
    "rarely": CHANCE,
    "numpy": CHANCE,
    "generator": MEMORY,
    "calls": MEMORY,
    "maximum": BUFFER,
    "norm": r"takes 16 images and not one alone \(ValueError: Expected more than 1 value.*statistics in 'norm';",
    "functional": "takes 16 images and not one alone",
    "mean": COMPANY,
    "first": COMPANY,
    "reversed": COMPANY,
    "place": COMPANY,
    "pairs": "takes 16 images and not one alone",
    "squeezed": r"has shape \(\d,\) for one image and \(16, \d\) for 16",
}


@pytest.mark.parametrize("way", WAYS)
def test_a_network_that_is_not_the_same_everywhere_is_refused_for_that_reason(way):
    """A part that no graft uses, above the cut of the lower network, may do as it likes."""
    sound = filled(Spoilt(), 0)
    for where, argument in (("below", "layer"), ("above", "layer"), ("below", "lower_layer")):
        network = filled(Spoilt(way, where), 1)
        pair = (sound, network) if argument == "layer" else (network, sound)
        with pytest.raises(ValueError, match=f"^{argument}='b' .* computes {where} it {WAYS[way]}"):
            graft(*pair, "b", INPUTS)
    if way != "pairs":  # of an odd number of images it makes nothing at all
        assert graft(filled(Spoilt(way, "above"), 0), sound, "b", INPUTS).error < 1e-20


def test_random_numbers_that_change_nothing_are_no_chance():
    network = filled(Spoilt("discarded", "below"), 0)
    assert graft(network, network, "b", INPUTS).error < 1e-20


def test_batch_norm_that_takes_statistics_of_maps():
    """An image alone has statistics there: what shows is that they are others."""
    network = residual(4, 0)
    network.norm = nn.BatchNorm2d(4, track_running_stats=False, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"on the others in its batch.* without running statistics in 'norm'; set"):
        graft(network, network, "stage1.1", IMAGES)
    with pytest.raises(ValueError, match=r"on the others in its batch.* without running statistics in 'norm'; set"):
        graft(network, network, "stem", IMAGES)


@pytest.mark.parametrize("count", [1, 2, 65])
def test_a_single_image_is_enough_to_see_it(count):
    network = filled(Spoilt("mean", "below"), 0)
    with pytest.raises(ValueError, match=COMPANY):
        graft(network, network, "b", INPUTS[:count])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rounding_is_no_dependence(dtype):
    """Sums of 10^4 terms of which a tenth is left; batches of one are added up in another order."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(10_000, 64), nn.BatchNorm1d(64), nn.Linear(64, 3)).to(dtype).eval()
    network[0].weight.data += 0.1
    inputs = torch.randn(32, 10_000, dtype=dtype)
    steady.require(network, (inputs - inputs.mean(1, keepdim=True),), "layer", "0", "what it computes")


def test_a_network_must_return_one_tensor():
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 2)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.layer(x), self.layer.weight

    with pytest.raises(ValueError, match="what upper computes above it is a tuple, not one tensor"):
        graft(Pair().double(), Pair().double(), "layer", INPUTS)
