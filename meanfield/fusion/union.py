"""Networks side by side: the mean of their outputs, as a module that holds them or as one network.

A network of particles is a measure, and the union is the mixture of the measures (docs/theory.md, section 6): all
channels of all networks, kernels between channels of one network only, and a mean at the outputs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from meanfield import validation
from meanfield.fusion.channels import INPUTS, Channels, replaced
from meanfield.validation import Misuse

ROUNDING = 1e-9  # of a sum of shares


class Ensemble(nn.Module):
    """The sum of the members' outputs (N, ...), weighted by `shares`, one for each, whose sum is one; by default their
    mean.  The members themselves, in their modes.

    It is what the union computes in which the last layers are weighted so (docs/theory.md, section 6).
    """

    def __init__(self, members: Sequence[nn.Module], shares: Sequence[float] | None = None) -> None:
        super().__init__()
        if not len(members):
            raise Misuse("members", members, "must be at least one network")
        self.members = nn.ModuleList(validation.instance(each, "members", nn.Module) for each in members)
        self.shares = tuple(shares or [1 / len(members)] * len(members))
        if len(self.shares) != len(members) or abs(sum(self.shares) - 1) > ROUNDING:
            raise Misuse("shares", self.shares, f"must be {len(members)} numbers whose sum is one")

    def forward(self, inputs: Tensor) -> Tensor:
        """The mean of the members' outputs on inputs (N, ...), by their shares: (N, K)."""
        outputs = [share * member(inputs.clone()) for share, member in zip(self.shares, self.members)]  # some in place
        return torch.stack(outputs).sum(0)

    def extra_repr(self) -> str:
        return f"shares={self.shares}"


def union(networks: Sequence[nn.Module], descriptions: Sequence[Channels]) -> nn.Module:
    """One network with the channels of all, in their order, and the function of their ensemble.

    Batch norm acts on every channel by itself: each network's keeps its own scales and statistics.  Misuse where
    something behind the last layer is nonlinear, so that a mean in front of it is another function.
    """
    if not descriptions[0].linear_end:
        raise Misuse("a", descriptions[0].form[-1], "ends it with a nonlinear layer: choose 'ensemble'")
    states = [network.state_dict() for network in networks]
    first, found = descriptions[0], {}
    names = [[name for name, _ in each.axes()] for each in descriptions]  # modules may bear other names
    for index, (name, axes) in enumerate(first.axes()):
        if name not in states[0]:
            continue
        tensors = [state[own[index]] for state, own in zip(states, names)]
        if not axes:  # one slope for all channels, and another one in each network
            space, _ = first.slopes[name.rpartition(".")[0]]
            found[name] = torch.cat([tensor.expand(each.widths[space]) for tensor, each in zip(tensors, descriptions)])
            continue
        # outputs are a mean: what writes them counts for its share, in a bias and in a weight
        share = 1 / len(tensors) if axes[0].space == first.output else 1.0
        tensors = [share * tensor for tensor in tensors]
        if axes[0].space == first.output and (len(axes) == 1 or axes[1].space == INPUTS):
            found[name] = torch.stack(tensors).sum(0)
        elif len(axes) == 1 or axes[1].space == INPUTS:
            found[name] = torch.cat(tensors)
        elif axes[0].space == first.output:
            found[name] = torch.cat(tensors, 1)
        else:
            widths = [each.widths[axes[1].space] for each in descriptions]
            found[name] = _block_diagonal(tensors, widths)
    return replaced(networks[0], found)


def _block_diagonal(weights: Sequence[Tensor], sources: Sequence[int]) -> Tensor:
    """Weights (targets, sources, ...) of every network in a block of its own, zeros between."""
    parts = [weight.reshape(len(weight), count, -1) for weight, count in zip(weights, sources)]
    blocks = [torch.block_diag(*(part[..., entry] for part in parts)) for entry in range(parts[0].shape[2])]
    found = torch.stack(blocks, 2)
    shape = weights[0].shape[2:]  # of a kernel; positions of flattened maps belong to the sources
    return found.reshape(len(found), -1, *shape)
