"""The Fisher information of a classifier's parameters, its diagonal, exact."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.func import jacrev, vmap

from meanfield import validation
from meanfield.finite.heads import disjoint
from meanfield.finite.recipes import LOSSES
from meanfield.signatures import checked
from meanfield.subject import Subject
from meanfield.validation import Misuse

ENTRIES = 2**24  # of Jacobians that are held at a time


@checked
def fisher(
    network: nn.Module, images: Tensor, classes: Sequence[int] | None = None, loss: str = "cross_entropy"
) -> dict[str, Tensor]:
    """mean over images (N, ...) of E_y [d log p(y | x) / d theta]^2, entry by entry, for every parameter that needs a
    gradient, by name.

    y is what the model expects, not the label (Kirkpatrick et al. 2017 use this information; with labels it would be
    the empirical one, which vanishes where the network is right).  The expectation is taken exactly: with the Jacobian
    J of the outputs, sum_c p_c (J_c - sum_k p_k J_k)^2 for the softmax of the cross-entropy, and sum_c J_c^2 for the
    squared loss, whose model is a Gaussian of unit variance.

    classes: the outputs that compete, default all; p is theirs alone, and information about the rows of others is zero.
    The network works in eval mode on a copy: statistics of batch norm do not move.  Misuse where all of it is zero: a
    network so certain that its probabilities round to 0 and 1 would be held by nothing.
    """
    validation.one_of(loss, "loss", LOSSES)
    subject = Subject(network)
    images = subject.taken(images, "images")
    free = [name for name, parameter in network.named_parameters() if parameter.requires_grad]
    parameters = {name: subject.parameters[name] for name in free}
    if not free:
        raise Misuse("network", type(network).__name__, "has no parameter that needs a gradient")
    count = subject(subject.parameters, images[:1]).shape[1]
    chosen = list(range(count)) if classes is None else list(disjoint((classes,), "classes")[0])
    if max(chosen) >= count:
        raise Misuse("classes", chosen, f"must be outputs of the network, which are 0..{count - 1}")

    def outputs(moved: dict[str, Tensor], image: Tensor) -> tuple[Tensor, Tensor]:
        found = subject({**subject.parameters, **moved}, image[None])[0, chosen]
        return found, found

    def information(image: Tensor) -> dict[str, Tensor]:
        jacobian, found = jacrev(outputs, has_aux=True)(parameters, image)
        return {name: _expected(each, found.softmax(0), loss) for name, each in jacobian.items()}

    with torch.no_grad():
        entries = len(chosen) * sum(tensor.numel() for tensor in parameters.values())
        total = {name: torch.zeros_like(tensor) for name, tensor in parameters.items()}
        for some in images.split(max(1, ENTRIES // entries)):
            for name, each in vmap(information)(some).items():
                total[name] += each.sum(0)
    if not any(bool(each.any()) for each in total.values()):
        remedy = "has no Fisher information: its outputs are certain, to rounding or as one class competes alone"
        raise Misuse("network", type(network).__name__, remedy)
    return {name: each / len(images) for name, each in total.items()}


def _expected(jacobian: Tensor, shares: Tensor, loss: str) -> Tensor:
    """Of the square of d log p / d theta, from d outputs / d theta (K, ...) and probabilities (K,)."""
    if loss == "squared":
        return jacobian.square().sum(0)
    centred = jacobian - torch.tensordot(shares, jacobian, 1)
    return torch.tensordot(shares, centred.square(), 1)
