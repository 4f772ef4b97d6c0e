"""Terms that hold a network to what it was: a quadratic about a point, and the answers of an older network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from meanfield.finite.heads import disjoint
from meanfield.finite.terms import Batch
from meanfield.grafting.graft import frozen
from meanfield.signatures import Nonnegative, Positive, checked
from meanfield.storage.tensors import digest
from meanfield.validation import Misuse

Tensors = Mapping[str, Tensor]


class Anchor:
    """1/2 sum_i precision_i (theta_i - point_i)^2 over the parameters named; other parameters are free.

    precision, point: by name, in the shapes of the parameters.
    """

    def __init__(self, point: Tensors, precision: Tensors) -> None:
        for name, tensor in precision.items():
            if name not in point or point[name].shape != tensor.shape:
                raise Misuse("precision", name, f"has shape {tuple(tensor.shape)} and no point of that shape")
        if not precision:
            raise Misuse("precision", precision, "must be of one parameter at least")
        self.point = {name: point[name].detach().clone() for name in precision}
        self.precision = {name: tensor.detach().clone() for name, tensor in precision.items()}

    @property
    def settings(self) -> dict[str, Any]:
        """What tells this term from others, as plain values: `fit` resumes only where they agree."""
        tensors = (*self.point.values(), *self.precision.values())
        return {"kind": "anchor", "names": list(self.point), "digest": digest(tensors)}

    def __call__(self, network: nn.Module, batch: Batch | None = None) -> Tensor:
        parameters = dict(network.named_parameters())
        for name in self.precision:
            if name not in parameters:
                raise Misuse("network", type(network).__name__, f"has no parameter {name}, which this term holds")
        parts = [
            (precision * (parameters[name] - self.point[name]).square()).sum()
            for name, precision in self.precision.items()
        ]
        return torch.stack(parts).sum() / 2


class Distillation:
    """strength times the sum over heads of the mean over images of -sum_c q_c log p_c, with p and q the softmax of the
    outputs of that head over the temperature, of the network and of an older one on the same images.

    Li & Hoiem 2016, equations (2) to (4), in which roots of probabilities, normalised, are this softmax.  Like theirs
    it lacks the factor temperature^2 of Hinton, Vinyals & Dean 2015.  The older network works in eval mode.
    """

    @checked
    def __init__(
        self,
        older: nn.Module,
        heads: Sequence[Sequence[int]],
        strength: Nonnegative = 1.0,
        temperature: Positive = 2.0,
    ) -> None:
        self.older, self.heads = frozen(older, "older"), [list(head) for head in disjoint(heads, "heads")]
        self.strength, self.temperature = strength, temperature

    @property
    def settings(self) -> dict[str, Any]:
        """What tells this term from others, as plain values: `fit` resumes only where they agree."""
        older = digest(self.older.state_dict().values())
        figures = {"strength": self.strength, "temperature": self.temperature}
        return {"kind": "distillation", "older": older, "heads": self.heads, **figures}

    def __call__(self, network: nn.Module, batch: Batch) -> Tensor:
        with torch.no_grad():
            answers = self.older(batch.images) / self.temperature
        outputs = batch.outputs / self.temperature
        parts = [functional.cross_entropy(outputs[:, head], answers[:, head].softmax(1)) for head in self.heads]
        return self.strength * torch.stack(parts).sum()
