"""Grafting: the lower layers of one network on the upper layers of another, joined by one fitted layer.

Gu, Fang, Lee, Zhang & Zhang 2020 (NeurIPS), "neural network grafting": only the connecting layer is fitted, so that its
pre-activations match those of the upper network; no labels and no penalty are used.
"""

from __future__ import annotations

import copy
import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from meanfield import validation
from meanfield.grafting import cut, steady
from meanfield.grafting.connection import Connection, is_linear, own, widened
from meanfield.grafting.least_squares import error, moments
from meanfield.grafting.transport import plan
from meanfield.validation import Misuse

METHODS = ("least_squares", "transport", "match", "adam")
IMAGES = 256  # that pass through the networks at a time, where inputs are a tensor
ADAM_STEPS, ADAM_BATCH, ADAM_RATE = 4692, 64, 1e-3  # the authors' procedure

Inputs = Tensor | Iterable[Any]


@dataclass(frozen=True, eq=False)
class Graft:
    """A grafted network and how well its connecting layer does.

    network: in evaluation mode, parameters of its own.  error: |g' - g|^2 / |g - mean g|^2 over the inputs of the fit,
    g the pre-activation of the upper network, g' that of the connection, means by channel; nan where g is constant.
    rank: of the design that was fitted, out of `unknowns` per channel (least squares without ridge; None otherwise).
    """

    network: Grafted = field(repr=False)
    layer: str
    lower_layer: str
    method: str
    error: float
    rank: int | None
    unknowns: int
    samples: int
    seconds: float = field(compare=False)


@torch.inference_mode(False)
def graft(
    lower: nn.Module,
    upper: nn.Module,
    layer: str,
    inputs: Inputs,
    method: str = "least_squares",
    ridge: float = 0.0,
    *,
    lower_layer: str | None = None,
    steps: int = ADAM_STEPS,
    seed: int = 0,
    progress: Callable[[int], None] = lambda images: None,
) -> Graft:
    """What enters `lower_layer` of network `lower`, through a fitted connection, as what leaves `layer` of network
    `upper`.

    layer: name of a module of `upper` ("4" or "conv2" in an nn.Sequential, "stage2.0" elsewhere), called once and with
    one
        tensor in a pass, through which all that reaches the output must pass.  A Conv2d (without groups) or Linear is
        the connecting layer and gets a new kernel and, if it has one, bias; anything else, such as a residual block,
        stays as it is and gets a 1x1 convolution (a matrix for (N, D) or (N, T, D)) in front of it, fitted to its
        input.  Maps are (N, C, H, W).  Widths of the two networks may differ.
    lower_layer: name of the module of `lower` whose input is taken, default `layer`.  Maps of another size are averaged
        down or repeated up to the size that `layer` takes.
    inputs: tensor (N, ...), or an iterable of batches (tensors, or tuples that begin with one) such as a DataLoader,
    read
        once unless method="adam".
    method: "least_squares", exact and of least norm where the features do not determine it; "transport", the kernel of
        `upper` pulled through an optimal transport plan between the features (channels) of the two networks; "match",
        the same for a one-to-one assignment, equal widths only; "adam", the authors' procedure: `steps` steps of Adam
        (rate 1e-3) on batches of 64 (an iterable's own batches) from a random start, drawn like all else from `seed`.
    ridge: least squares only, adds ridge |W|^2 to the mean over rows of the squared error; the bias is free.
    progress: called with the number of images of every batch that is read.

    Both networks are copied and run in evaluation mode; the caller's are not changed.  dtype and device are theirs.
    ParticleNetwork and FiniteCNN go through `finite.sequential`, which gives their layers names.
    Raises ValueError where the networks do not fit together, `layer` is no cut, or what a network makes of an image
    depends on chance, on earlier passes or on the other images of its batch.
    """
    distances = validation.one_of(method, "method", METHODS) in ("transport", "match")
    junction = Junction.observe(
        lower, upper, layer, inputs, lower_layer=lower_layer, distances=distances, progress=progress
    )
    return junction.graft(method, ridge, steps=steps, seed=seed)


class Grafted(nn.Module):
    """above(connection(below(inputs))).

    Calls share nothing: any number of threads may call one graft.  It can be copied, pickled, traced (torch.jit.trace),
    compiled and exported (torch.export.export with strict=False, its default since torch 2.6), not scripted.
    """

    def __init__(self, below: cut.Below, connection: Connection, above: cut.Above) -> None:
        super().__init__()
        self.below, self.connection, self.above = below, connection, above
        self.eval().requires_grad_(False)

    def forward(self, inputs: Tensor) -> Tensor:
        """The outputs of the upper network, behind the connection, on inputs (N, ...)."""
        return self.above(self.connection(self.below(inputs)), inputs)

    def __prepare_scriptable__(self) -> NoReturn:
        """What torch.jit.script asks for."""
        raise TypeError(
            "network is a graft, which torch.jit.script cannot read: use torch.export.export(network, (inputs,), "
            "strict=False) or torch.jit.trace(network, inputs)"
        )


class Junction:
    """Two networks cut at a layer, and all that least squares and transport need to know of the inputs.

    One pass over the inputs serves every method and ridge; the memory does not depend on their number.
    own: the connecting layer that the upper network has itself.  moments: of the patches that enter the connection and
    the upper network's pre-activations.  products: inner products of the features of both networks, (C + C', C + C'),
    lower ones first.
    """

    def __init__(
        self,
        lower: nn.Module,
        upper: nn.Module,
        layer: str,
        lower_layer: str,
        example: Tensor,
        *,
        distances: bool = True,
    ) -> None:
        """Without inputs so far; `example` is a batch of them from which shapes are taken.

        distances: keep the inner products that "transport" and "match" need.
        """
        lower, upper = frozen(lower, "lower"), frozen(upper, "upper")
        module = cut.find(upper, layer, "layer")
        cut.find(lower, lower_layer, "layer" if lower_layer == layer else "lower_layer")
        entering = not is_linear(module)
        _check(lower, upper, layer, lower_layer, example, entering)
        self.layer, self.lower_layer, self.began = layer, lower_layer, time.perf_counter()
        self.below, self._target = cut.Below(lower, lower_layer), cut.Below(upper, layer)
        self.above = cut.Above(upper, layer, entering=entering)
        with torch.no_grad():
            here, there = self.below(example), self._target(example)
            self.own = Connection(own(module, there))
            self._unfitted = _connection(self.own, here, there, layer, lower_layer)
        (unknowns, targets), both = self._unfitted.weights.shape, self._unfitted.features + self.own.features
        self.moments = moments(unknowns, targets, here)
        self.products = torch.zeros(both, both, dtype=torch.float64, device=here.device) if distances else None
        self.inputs: Inputs | None = None

    @classmethod
    def observe(
        cls,
        lower: nn.Module,
        upper: nn.Module,
        layer: str,
        inputs: Inputs,
        *,
        lower_layer: str | None = None,
        distances: bool = True,
        progress: Callable[[int], None] = lambda images: None,
    ) -> Junction:
        """After one pass over the inputs; arguments as for `graft` and for the class."""
        batches = batches_of(inputs)
        first = _first(batches)
        found = cls(
            lower, upper, layer, layer if lower_layer is None else lower_layer, _example(first), distances=distances
        )
        found.inputs = inputs
        for batch in itertools.chain([first], batches):
            if (batch.dtype, batch.device, batch.shape[1:]) != (first.dtype, first.device, first.shape[1:]):
                raise ValueError(
                    f"inputs begin with {_described(first)} and go on with {_described(batch)}; give one tensor or "
                    "batches of a kind"
                )
            found.add(batch)
            progress(len(batch))
        return found

    @torch.no_grad()
    def add(self, batch: Tensor) -> None:
        """Take a batch of inputs into account."""
        here, there = self.below(batch), self._target(batch)
        goal = self.own(there)
        step = max(1, self.moments.block // self.own.columns(goal[:1])[0].numel())
        for first in range(0, len(batch), step):
            part = slice(first, first + step)
            self.moments.add(self._unfitted.design(here[part]), self.own.columns(goal[part]))
            if self.products is not None:
                clouds = torch.cat([self._unfitted.cloud(here[part]), self.own.cloud(there[part])]).double()
                self.products.addmm_(clouds, clouds.T)

    @torch.no_grad()
    def features(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """What enters the connection from below and what enters the upper network's own layer, (C, n) and (C', n)."""
        return self._unfitted.cloud(self.below(inputs)), self.own.cloud(self._target(inputs))

    @torch.no_grad()
    def graft(
        self, method: str = "least_squares", ridge: float = 0.0, *, steps: int = ADAM_STEPS, seed: int = 0
    ) -> Graft:
        """See the function `graft`; seconds count from the making of the junction."""
        validation.one_of(method, "method", METHODS)
        if validation.nonnegative(ridge, "ridge") and method != "least_squares":
            raise Misuse("ridge", ridge, f"is of least squares; method={method!r} has none")
        self._require_inputs()
        rank = None
        if method == "least_squares":
            connection, rank = self._least_squares(ridge)
            rank = None if ridge else rank
        elif method == "adam":
            connection = self._adam(validation.integer(steps, "steps"), validation.integer(seed, "seed", minimum=0))
        else:
            connection = self._pulled(self._plan(method))
        layer = connection.layer
        network = Grafted(self.below, connection, self.above)
        missed = error(self.moments, connection.weights, layer.bias)
        figures = (method, missed, rank, self.moments.unknowns, self.moments.samples, time.perf_counter() - self.began)
        return Graft(copy.deepcopy(network), self.layer, self.lower_layer, *figures)

    def _require_inputs(self) -> None:
        if self.moments.samples == 0:
            raise ValueError("inputs have not been added to this junction; use Junction.observe or add")
        if not math.isfinite(self.moments.residual(torch.ones_like(self._unfitted.weights), None)):
            raise ValueError(
                "inputs lead to values that are not finite; look for nan and infinities in them and in the networks"
            )

    def _least_squares(self, ridge: float) -> tuple[Connection, int]:
        precision = torch.finfo(self.own.layer.weight.dtype).eps
        fit = self.moments.solve(ridge, precision, offset=self.own.layer.bias is not None)
        return self._unfitted.with_weights(fit.weights, fit.offset), fit.rank

    def _pulled(self, plan: Tensor) -> Connection:
        """The upper network's kernel on features C' sum_i plan_ij f_i in place of its own f'_j, plan (C, C')."""
        kernel = self.own.layer.weight
        pulled = torch.einsum("ij,kj...->ki...", len(plan[0]) * plan.to(kernel), kernel)
        return self._unfitted.with_weights(pulled.flatten(1).T, self.own.layer.bias)

    @property
    def costs(self) -> Tensor:
        """Squared distances of features as vectors over inputs and positions, (C, C')."""
        if self.products is None:
            raise ValueError("this junction was made with distances=False; 'transport' and 'match' need distances=True")
        below, sizes = self._unfitted.features, self.products.diagonal()
        return (sizes[:below, None] + sizes[below:] - 2 * self.products[:below, below:]).clamp_min(0)

    def _plan(self, method: str) -> Tensor:
        """Of least cost between uniform masses; for equal widths a permutation."""
        costs = self.costs
        if method == "match" and costs.shape[0] != costs.shape[1]:
            raise ValueError(
                f"method='match' needs equal widths; {costs.shape[0]} features below and {costs.shape[1]} above: use "
                "'transport'"
            )
        return plan(costs)

    def _adam(self, steps: int, seed: int) -> Connection:
        if self.inputs is None:
            raise ValueError("method='adam' reads the inputs again and needs a junction made by Junction.observe")
        generator = torch.Generator().manual_seed(seed)
        connection = _started(self._unfitted, generator)
        optimiser = torch.optim.Adam(connection.layer.parameters(), lr=ADAM_RATE)
        for batch in itertools.islice(_endless(self.inputs, generator), steps):
            here, goal = self.below(batch), self.own(self._target(batch))
            with torch.enable_grad():
                loss = torch.nn.functional.mse_loss(connection(here), goal)
                optimiser.zero_grad()
                loss.backward()
            optimiser.step()
        return connection


def _started(unfitted: Connection, generator: torch.Generator) -> Connection:
    """The usual random start of such a layer: uniform up to 1 / sqrt(fan-in)."""
    connection = copy.deepcopy(unfitted)
    bound = 1 / math.sqrt(connection.layer.weight[0].numel())
    for parameter in connection.layer.parameters():
        parameter.copy_(bound * (2 * torch.rand(parameter.shape, generator=generator) - 1))
        parameter.requires_grad_(True)
    return connection


def frozen(network: nn.Module, argument: str) -> nn.Module:
    if not isinstance(network, nn.Module):
        hint = "; finite.sequential makes one of it" if type(network).__name__ == "ParticleNetwork" else ""
        raise TypeError(f"{argument} must be a torch.nn.Module, not {type(network).__name__}{hint}")
    try:
        copied = copy.deepcopy(network)
    except RuntimeError as error:
        raise ValueError(
            f"{argument} cannot be copied ({error}); remove what its modules keep from a pass, such as the old "
            "weight_norm"
        ) from error
    return copied.eval().requires_grad_(False)


def batches_of(inputs: Inputs, size: int = IMAGES) -> Iterator[Tensor]:
    """Without empty ones."""
    if not isinstance(inputs, (Tensor, Iterable)):
        raise TypeError(f"inputs must be a tensor (N, ...) or an iterable of batches, not {type(inputs).__name__}")
    for batch in inputs.split(size) if isinstance(inputs, Tensor) else inputs:
        found = batch[0] if isinstance(batch, (tuple, list)) else batch
        if not isinstance(found, Tensor) or len(found):
            yield found


def _first(batches: Iterator[Tensor]) -> Tensor:
    first = next(batches, None)
    if not isinstance(first, Tensor) or len(first) == 0:
        came = (
            "nothing"
            if first is None
            else f"an empty tensor {tuple(first.shape)}"
            if isinstance(first, Tensor)
            else type(first).__name__
        )
        raise ValueError(f"inputs must be a tensor (N, ...) or batches of them; got {came}")
    if not first.is_floating_point():
        raise ValueError(f"inputs are {first.dtype}; they must be floating-point, in the dtype of the networks")
    return first


def _example(first: Tensor) -> Tensor:
    """A few of the images; of a single one two, for what depends on company to show."""
    return first[: steady.IMAGES] if len(first) > 1 else torch.cat([first, 1 - 2 * first])


def _endless(inputs: Inputs, generator: torch.Generator) -> Iterator[Tensor]:
    """Epoch after epoch: a tensor's rows in a new order each time, an iterable's batches as they come."""
    while True:
        empty = True
        if isinstance(inputs, Tensor):
            order = torch.randperm(len(inputs), generator=generator).to(inputs.device)
            yield from (inputs[rows] for rows in order.split(ADAM_BATCH))
            continue
        for batch in batches_of(inputs):
            empty = False
            yield batch
        if empty:
            raise ValueError(
                "inputs can be read only once; method='adam' needs a tensor or a loader that starts anew, such as a "
                "DataLoader"
            )


def _check(lower: nn.Module, upper: nn.Module, layer: str, lower_layer: str, inputs: Tensor, entering: bool) -> None:
    kinds = {
        (each.dtype, each.device)
        for network in (lower, upper)
        for each in network.parameters()
        if each.is_floating_point()
    }
    kinds.add((inputs.dtype, inputs.device))
    if len(kinds) > 1:
        raise ValueError(f"lower, upper and inputs must share one dtype and one device; got {sorted(map(str, kinds))}")
    places = (("lower_layer", lower, lower_layer, "lower"), ("layer", upper, layer, "upper"))
    for argument, network, name, called in places:
        cut.called_once(copy.deepcopy(network), name, inputs, argument)
        steady.require(cut.Below(network, name), (inputs,), argument, name, f"what {called} computes below it")
    above, signal = cut.Above(upper, layer, entering=entering), cut.arriving(upper, layer, inputs, entering=entering)
    steady.require(above, (signal, inputs), "layer", layer, "what upper computes above it")
    cut.check(upper, layer, inputs, "layer", entering=entering)


def _connection(owned: Connection, here: Tensor, there: Tensor, layer: str, lower_layer: str) -> Connection:
    """What leads `here` to where `there` enters the upper network's own layer; ValueError where the two cannot meet."""
    if isinstance(owned.layer, nn.Conv2d) and here.ndim == 4:
        size = None if here.shape[2:] == there.shape[2:] else (there.shape[2], there.shape[3])
        return Connection(widened(owned.layer, here.shape[1]), size)
    if isinstance(owned.layer, nn.Linear) and there.ndim == 2 and here.ndim == 4:
        return Connection(widened(owned.layer, here[0].numel()), flat=True)
    if isinstance(owned.layer, nn.Linear) and here.shape[:-1] == there.shape[:-1]:
        return Connection(widened(owned.layer, here.shape[-1]))
    raise Misuse(
        "lower_layer",
        lower_layer,
        f"receives {tuple(here.shape[1:])} per input and layer={layer!r} of upper {tuple(there.shape[1:])}: maps "
        "connect to maps, and vectors or flattened maps to vectors",
    )


def _described(batch: Any) -> str:
    return f"{batch.dtype} {tuple(batch.shape)}" if isinstance(batch, Tensor) else type(batch).__name__
