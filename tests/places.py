"""A network whose loss on a plane is a function of choice: f at the coordinates themselves."""

import torch
from torch import nn

from meanfield.landscape.directions import Plane

IMAGE, TARGET = torch.zeros(1, 1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)


class Place(nn.Module):
    """Answers with its two parameters, whatever comes."""

    def __init__(self):
        super().__init__()
        self.place = nn.Parameter(torch.zeros(2, dtype=torch.float64))

    def forward(self, inputs):
        return self.place.expand(len(inputs), 2)


def plane(first=(1.0, 0.0), second=(0.0, 1.0)):
    """Through the origin of the two parameters."""
    directions = ({"place": torch.tensor(each, dtype=torch.float64)} for each in (first, second))
    return Plane({"place": torch.zeros(2, dtype=torch.float64)}, *directions)


def loss(function, seen=None):
    """Of outputs (N, 2): the function of both, (N,); the points that were asked are noted in `seen`."""

    def at(outputs, targets):
        if seen is not None:
            seen.extend(tuple(each) for each in outputs.tolist())
        return function(outputs[:, 0], outputs[:, 1])

    return at
