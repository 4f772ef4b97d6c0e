"""What a training may add to the objective of its steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn


class Batch(NamedTuple):
    """The images of a step (n, ...) as the network saw them, their labels (n,), and its outputs (n, K), with their
    gradients.
    """

    images: Tensor
    labels: Tensor
    outputs: Tensor


class Term(Protocol):
    """A function of the network and of the batch of a step, added to the loss of every step.

    settings: plain values that tell this term from others: a stored state goes on under the same ones only.
    """

    @property
    def settings(self) -> Mapping[str, Any]: ...

    def __call__(self, network: nn.Module, batch: Batch) -> Tensor: ...
