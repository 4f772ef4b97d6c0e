"""Products with the Hessian of a mean loss, and with its Gauss-Newton part, from graphs that are kept.

A product is linear in the vector and its graph is not: one graph of the gradient is built per batch, and every product
is one backward pass through it (Pearlmutter 1994).  Batches whose graphs would not fit are built anew each time.

Where the loss is not twice differentiable (ReLU, max pooling), the Hessian is that of the smooth piece on which the
parameters lie; what the gradient jumps by between pieces is no part of it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, Self

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from meanfield import limits
from meanfield.landscape.objective import Batch, Objective, mean
from meanfield.network import ordinary
from meanfield.precision import full_float32
from meanfield.subject import Parameters
from meanfield.validation import Misuse

KEPT_SHARE = 0.5  # of the memory that may be taken, for graphs that are kept


class Graph(Protocol):
    """What is kept of one batch."""

    def __init__(self, objective: Objective, leaves: Parameters, batch: Batch) -> None: ...

    def product(self, direction: Sequence[Tensor], keep: bool) -> list[Tensor]:
        """The batch's part of the product, a tensor per parameter; not to be called again unless keep."""
        ...


class Products:
    """v -> S C S v on flat vectors (D,), C the curvature of a mean loss at some parameters, S diagonal.

    scale: S, by name; None is the identity.
    size: D.  like: an empty tensor of the parameters' dtype and device.  count: products so far, shared with operators
    of other scales on the same graphs.
    """

    graph: type[Graph]

    def __init__(self, objective: Objective, parameters: Mapping[str, Tensor], scale: Parameters | None = None) -> None:
        self.objective, self._done = objective, [0]
        self._scale = None if scale is None else flat(scale.values())
        with _differentiable():
            self.leaves = _leaves(parameters)
            self.like = next(iter(self.leaves.values())).new_empty(0)
            self.size = sum(leaf.numel() for leaf in self.leaves.values())
            self._batches = list(_ordinary(objective.batches))
            self._kept: list[Graph | None] = self._graphs()

    @property
    def count(self) -> int:
        return self._done[0]

    def scaled(self, scale: Parameters) -> Self:
        """The same curvature between other S, from the same graphs."""
        other = copy.copy(self)
        other._scale = flat(scale.values())
        return other

    def __call__(self, vector: Tensor) -> Tensor:
        """S C S v (D,), float64, of a vector (D,)."""
        limits.look()
        self._done[0] += 1
        direction = list(self.named(vector).values())
        with _differentiable():
            total = torch.stack([flat(self._part(index, direction)) for index in range(len(self._batches))]).sum(0)
        return total if self._scale is None else total * self._scale

    def named(self, vector: Tensor) -> Parameters:
        """S v as parameters by name, of a vector (D,)."""
        return named(vector if self._scale is None else vector * self._scale, self.leaves)

    def _part(self, index: int, direction: Sequence[Tensor]) -> list[Tensor]:
        kept = self._kept[index]
        graph = self.graph(self.objective, self.leaves, self._batches[index]) if kept is None else kept
        return graph.product(direction, keep=kept is not None)

    def _graphs(self) -> list[Graph | None]:
        """As many as there is room for, from the first batch on; which are kept changes no figure."""
        first = self._batches[0]
        each = _held(lambda: self.graph(self.objective, self.leaves, first)) / len(first[0])
        room = KEPT_SHARE * limits.available(self.like.device)
        graphs: list[Graph | None] = []
        for batch in self._batches:
            room -= each * len(batch[0])
            graphs.append(self.graph(self.objective, self.leaves, batch) if room >= 0 else None)
        return graphs


class _Slope:
    """The gradient of a batch's part of the mean loss, as a function of the parameters."""

    def __init__(self, objective: Objective, leaves: Parameters, batch: Batch) -> None:
        self.leaves = list(leaves.values())
        self.gradient = _pulled([objective.part(leaves, batch)], self.leaves, None, graph=True)

    def product(self, direction: Sequence[Tensor], keep: bool) -> list[Tensor]:
        return _pulled(self.gradient, self.leaves, direction, keep=keep)


class _Outputs:
    """The outputs of a batch as a function of the parameters, J^T u as one of u, the loss's slope as one of outputs."""

    def __init__(self, objective: Objective, leaves: Parameters, batch: Batch) -> None:
        inputs, targets = batch
        self.leaves, self.outputs = list(leaves.values()), objective.subject(leaves, inputs)
        self.cotangent = torch.zeros_like(self.outputs).requires_grad_()
        self.pulled = _pulled([self.outputs], self.leaves, [self.cotangent], graph=True)
        self.here = self.outputs.detach().requires_grad_()
        loss = mean(objective.loss_of, self.here, targets) * (len(inputs) / objective.count)
        (self.slope,) = _pulled([loss], [self.here], None, graph=True)

    def pushed(self, direction: Sequence[Tensor], keep: bool) -> Tensor:
        """J v, (N, ...)."""
        return _pulled(self.pulled, [self.cotangent], direction, keep=keep)[0]

    def product(self, direction: Sequence[Tensor], keep: bool) -> list[Tensor]:
        bent = _pulled([self.slope], [self.here], [self.pushed(direction, True)], keep=keep)
        return _pulled([self.outputs], self.leaves, bent, keep=keep)


class Hessian(Products):
    """C = H, the second derivatives of the mean loss."""

    graph = _Slope


class GaussNewton(Products):
    """C = (1/N) sum_n J_n^T l''_n J_n, H without the curvature of the outputs: J_n their derivatives, l''_n the second
    derivative of the loss in them (Schraudolph 2002).
    """

    graph = _Outputs


def slope(objective: Objective, parameters: Mapping[str, Tensor]) -> tuple[Tensor, Parameters]:
    """The mean loss over all images, 0-dimensional, and its gradient, one batch after the other."""
    with _differentiable():
        leaves = _leaves(parameters)
        value = next(iter(leaves.values())).detach().new_zeros(())
        gradient = [torch.zeros_like(leaf) for leaf in leaves.values()]
        for batch in _ordinary(objective.batches):
            part = objective.part(leaves, batch)
            pulled = _pulled([part], list(leaves.values()), None)
            value, gradient = value + part.detach(), [total + each for total, each in zip(gradient, pulled)]
    return value, dict(zip(leaves, gradient))


def slopes_along(objective: Objective, parameters: Mapping[str, Tensor], direction: Mapping[str, Tensor]) -> Tensor:
    """d loss_n(parameters + t direction) / dt at t = 0, image by image, (N,) in float64."""
    found = []
    with _differentiable():
        leaves = _leaves(parameters)
        for batch in _ordinary(objective.batches):
            graph = _Outputs(objective, leaves, batch)
            along = graph.slope.detach().double() * graph.pushed([direction[name] for name in leaves], False).double()
            found.append(objective.count * along.flatten(1).sum(1))
    return torch.cat(found)


def flat(tensors: Any) -> Tensor:
    """One vector (D,) in float64."""
    return torch.cat([tensor.detach().double().flatten() for tensor in tensors])


def named(vector: Tensor, like: Mapping[str, Tensor]) -> Parameters:
    """The pieces of a vector (D,) in the names, shapes and dtype of parameters."""
    pieces = vector.split([tensor.numel() for tensor in like.values()])
    return {name: piece.view_as(tensor).to(tensor.dtype) for (name, tensor), piece in zip(like.items(), pieces)}


def require_smooth(objective: Objective, parameters: Mapping[str, Tensor]) -> float:
    """The mean loss; Misuse where it or its gradient is not finite."""
    value, gradient = slope(objective, parameters)
    if not bool(torch.stack([value.isfinite(), *(each.isfinite().all() for each in gradient.values())]).all()):
        raise Misuse("network", float(value), "is its mean loss; that and its gradient must be finite")
    return float(value)


def _leaves(parameters: Mapping[str, Tensor]) -> Parameters:
    """Copies that take gradients."""
    return {name: ordinary(tensor).detach().clone().requires_grad_() for name, tensor in parameters.items()}


def _ordinary(batches: Iterable[Batch]) -> Iterator[Batch]:
    return ((ordinary(inputs), ordinary(targets)) for inputs, targets in batches)


def _pulled(
    outputs: Sequence[Tensor],
    inputs: Sequence[Tensor],
    cotangents: Sequence[Tensor] | None,
    keep: bool = False,
    graph: bool = False,
) -> list[Tensor]:
    """The cotangents pulled back, a tensor per input; zero where outputs do not depend on inputs."""
    live = [index for index, each in enumerate(outputs) if each.requires_grad]
    if not live:
        return [torch.zeros_like(each) for each in inputs]
    return list(
        torch.autograd.grad(
            [outputs[index] for index in live],
            inputs,
            None if cotangents is None else [cotangents[index] for index in live],
            retain_graph=keep or graph,
            create_graph=graph,
            allow_unused=True,
            materialize_grads=True,
        )
    )


@contextmanager
def _differentiable() -> Iterator[None]:
    """What is computed inside can be differentiated twice, whatever the caller switched off (of attention torch has
    fused kernels that cannot), and is not rounded to TF32.
    """
    with torch.inference_mode(False), torch.enable_grad(), full_float32(), sdpa_kernel(SDPBackend.MATH):
        yield


def _held(graph: Callable[[], object]) -> int:
    """The bytes that a graph holds on to."""
    storages: dict[int, int] = {}

    def counted(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(counted, lambda tensor: tensor):
        graph()
    return sum(storages.values())
