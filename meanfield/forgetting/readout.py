"""Readouts by name: networks whose numbers of classes differ are brought to the same outputs."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn.utils import skip_init

from meanfield import validation
from meanfield.signatures import checked
from meanfield.validation import Misuse


def readout_of(network: nn.Module, readout: str) -> nn.Linear:
    """The linear layer of that name, whose rows are the outputs."""
    validation.instance(network, "network", nn.Module)
    found = {name: each for name, each in network.named_modules() if isinstance(each, nn.Linear)}
    if readout not in found:
        raise Misuse("readout", readout, f"must name the last linear layer; the network has {', '.join(found)}")
    return found[readout]


@checked
def narrowed(network: nn.Module, readout: str, classes: Sequence[int]) -> nn.Module:
    """A copy that has these outputs only, (N, len(classes)), in this order: one head of a network."""
    layer = readout_of(network, readout)
    rows = _outputs(classes, layer.out_features)
    return _with_rows(network, readout, rows, list(range(len(rows))), len(rows))


@checked
def widened(network: nn.Module, readout: str, classes: Sequence[int], outputs: int) -> nn.Module:
    """A copy with more outputs, (N, outputs): its own are those of `classes`, in this order, and the others are 0."""
    layer, rows = readout_of(network, readout), _outputs(classes, outputs)
    if len(rows) != layer.out_features:
        raise Misuse("classes", classes, f"must name one class for each of the {layer.out_features} outputs there are")
    return _with_rows(network, readout, list(range(len(rows))), rows, outputs)


def _outputs(classes: Sequence[int], outputs: int) -> list[int]:
    found = [validation.integer(each, "classes", minimum=0) for each in classes]
    if not found or len(set(found)) < len(found) or max(found) >= outputs:
        raise Misuse("classes", found, f"must be different outputs among 0..{outputs - 1}, at least one")
    return found


@torch.no_grad()
def _with_rows(network: nn.Module, readout: str, rows: list[int], places: list[int], outputs: int) -> nn.Module:
    """A copy whose readout has given rows of the old one at given places, and zeros elsewhere."""
    copied, old = copy.deepcopy(network), readout_of(network, readout)
    # the constructor of a layer draws from the global random numbers: skip_init does not
    new = skip_init(nn.Linear, old.in_features, outputs, bias=old.bias is not None, dtype=old.weight.dtype)
    new = new.to(old.weight.device).train(old.training)
    for name, tensor in new.named_parameters():
        tensor.zero_()[places] = getattr(old, name)[rows]
        tensor.requires_grad_(getattr(old, name).requires_grad)
    if not readout:
        return new
    parent, _, name = readout.rpartition(".")
    setattr(copied.get_submodule(parent), name, new)
    return copied
