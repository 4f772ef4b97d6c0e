"""From the steps of a module to particles: a chain of convolutions, activations, pools and one linear readout.

A finite network of m channels in a layer is the continuous one with particles of mass 1/m: weights v that sum over
channels are kernels w = m v that average over them.  Folded are batch norm with its running statistics (into the layer
in front of it, or where an activation stands between into the one that reads it); a Linear on a map, which is a
convolution of the size of the map; and the bias of the readout, which is one more particle of the last layer, of kernel
0 and bias 1, that is constant: h(1) everywhere.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from math import prod
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from meanfield.activations import ACTIVATIONS
from meanfield.architecture import Architecture, Conv
from meanfield.modules.steps import Graph, Signal, Step, with_defaults
from meanfield.validation import Misuse, working

RISING = ("relu", "tanh", "softplus", "identity")  # h(max g) = max h(g)
PASSING = ("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout")
NOTHING = ("alias", "clone", "contiguous", "detach", "lift_fresh_copy")
DECOMPOSED = ("convolution", "addmm", "_native_batch_norm_legit_no_training")
ENDS = ("softmax", "log_softmax", "sigmoid", "_softmax", "_log_softmax")


class Particles(NamedTuple):
    """What ParticleNetwork is made of, in its order."""

    architecture: Architecture
    masses: list[Tensor]
    kernels: list[Tensor]
    readout: Tensor
    biases: list[Tensor | None]


def particles(graph: Graph) -> Particles:
    """The particles of mass 1/m that compute what the graph does; Misuse by the name of the layer where none do."""
    chain = _Chain(graph)
    for index, step in enumerate(graph.steps):
        chain.take(step, last=not any(_kind(later) in ("linear", "conv2d") for later in graph.steps[index + 1 :]))
    return chain.particles()


def _kind(step: Step) -> str:
    return step.operator.partition(".")[0].rstrip("_")


@dataclass
class _Layer:
    """weight (M_l, M_{l-1}, kh, kw), in float64, as the module multiplies with it; activation: None as long as none has
    come.
    """

    weight: Tensor
    bias: Tensor | None
    stride: tuple[int, ...] = (1, 1)
    padding: tuple[int, ...] = (0, 0)
    activation: str | None = None
    pooling: str = "none"
    pool_size: tuple[int, ...] = (1, 1)

    @property
    def conv(self) -> Conv:
        size = {} if self.pooling == "none" else {"pool_size": self.pool_size}
        return Conv(
            tuple(self.weight.shape[2:]),  # type: ignore[arg-type]
            self.padding,  # type: ignore[arg-type]
            self.stride,  # type: ignore[arg-type]
            self.activation or "identity",
            self.pooling,
            bias=self.bias is not None,
            **size,  # type: ignore[arg-type]
        )


class _Chain:
    """What has been read so far: layers, and what still acts on the features of the last one."""

    def __init__(self, graph: Graph) -> None:
        self.graph, self.signal, self.seen = graph, graph.images, {graph.images}
        if len(graph.shape) != 3:
            raise Misuse(graph.argument, graph.shape, "is the shape of its input: it must take images (N, C, H, W)")
        self.map = graph.shape  # (C, H, W) of the signal, before it was flattened as well
        self.flat = False
        self.layers: list[_Layer] = []
        self.readout: tuple[Tensor, Tensor | None] | None = None
        self.affine: tuple[Tensor, Tensor, Step] | None = None  # what features are multiplied with, and shifted by
        self.average: Step | None = None  # over all positions, of the readout or of this layer
        self.kinds: set[tuple[torch.dtype, torch.device]] = set()

    def refuse(self, step: Step, reason: str) -> NoReturn:
        raise Misuse(self.graph.argument, step.layer, reason)

    def take(self, step: Step, *, last: bool) -> None:
        met = [each for each in step.signals if each in self.seen]
        if step.shape is None or not met:
            return  # a size, or something of the parameters alone
        kind = _kind(step)
        if met != [self.signal]:
            self.refuse(step, f"joins or branches signals ({kind}), as a shortcut does; only chains of layers enter")
        if self.readout is not None and kind not in NOTHING:
            remedy = "; leave it out: the loss has it" if kind in ENDS else ""
            self.refuse(step, f"({kind}) follows the last Linear, which must be the readout{remedy}")
        if kind == "linear":
            self.read(step) if last else self.connect(step)
        elif kind in HANDLERS:
            HANDLERS[kind](self, step)
        elif kind not in NOTHING:
            self.activate(step, kind)
        self.seen.add(step.name)
        self.signal = step.name
        if len(step.shape) == 3:
            self.map = step.shape

    # ---- layers

    def convolve(self, step: Step) -> None:
        given = step.arguments
        weight = self.held(step, "weight")
        if given["groups"] != 1:
            self.refuse(step, f"has groups={given['groups']}; every channel must read all of the layer below")
        if any(each != 1 for each in _pair(given["dilation"])):
            self.refuse(step, f"has dilation={tuple(given['dilation'])}, which particles do not have; use 1")
        stride, size = _pair(given["stride"]), tuple(weight.shape[2:])
        if isinstance(given["padding"], str):
            if given["padding"] == "same" and any(side % 2 == 0 for side in size):
                self.refuse(step, "pads two sides differently; use kernels of odd size or pad by a number")
            padding = tuple((side - 1) // 2 for side in size) if given["padding"] == "same" else (0, 0)
        else:
            padding = _pair(given["padding"])
        self.add(step, weight, stride, padding)

    def connect(self, step: Step) -> None:
        """A Linear in front of others: a convolution of the size of the map, whose map is one position."""
        self.require_flat(step)
        weight = self.held(step, "weight")
        self.add(step, weight.reshape(len(weight), *self.map), (1, 1), (0, 0))
        self.map = (len(weight), 1, 1)

    def add(self, step: Step, weight: Tensor, stride: tuple[int, ...], padding: tuple[int, ...]) -> None:
        self.settle_average(step)
        bias = None if step.arguments["bias"] is None else self.held(step, "bias")
        weight, bias = self.unfolded(weight, bias, padded=any(padding))
        self.layers.append(_Layer(weight, bias, stride, padding))

    def read(self, step: Step) -> None:
        """The last Linear."""
        self.require_flat(step)
        if not self.layers:
            self.refuse(step, "is the only layer; put a layer and an activation in front of the readout")
        if self.average is not None:
            self.map = (self.map[0], 1, 1)
        weight = self.held(step, "weight")
        bias = None if step.arguments["bias"] is None else self.held(step, "bias")
        weight, bias = self.unfolded(weight.reshape(len(weight), *self.map), bias, padded=False)
        self.readout = weight.flatten(2), bias

    def unfolded(self, weight: Tensor, bias: Tensor | None, padded: bool) -> tuple[Tensor, Tensor | None]:
        """Weights and bias that read the features as they are where the module reads them scaled and shifted."""
        if self.affine is None:
            return weight, bias
        scale, shift, step = self.affine
        if padded and bool(shift.any()):
            self.refuse(step, "shifts features that a convolution then pads with zeros; put it behind that convolution")
        self.affine = None
        added = (weight.flatten(2).sum(2) * shift).sum(1)
        return weight * scale[None, :, None, None], added if bias is None else bias + added

    def held(self, step: Step, name: str) -> Tensor:
        found = step.arguments[name]
        if isinstance(found, Signal) or not isinstance(found, Tensor):
            self.refuse(step, f"computes its {name} from other tensors; fix it first, as remove_parametrizations does")
        if not bool(found.isfinite().all()):
            self.refuse(step, f"holds a {name} with entries that are not finite")
        self.kinds.add((found.dtype, found.device))
        return found.detach().double()

    # ---- what acts on features

    def activate(self, step: Step, kind: str) -> None:
        own = _signature(step)
        names = [name for name, each in ACTIVATIONS.items() if own in _operators(each.function)]
        if not names:
            known = ", ".join(ACTIVATIONS)
            if kind in DECOMPOSED:
                self.refuse(step, f"was taken apart ({kind}); export it without run_decompositions")
            self.refuse(step, f"({kind}) is no layer or activation that is known here; activations are {known}")
        if not self.layers:
            self.refuse(step, "acts on the images themselves; do that before the network")
        layer = self.layers[-1]
        if layer.activation is not None:
            self.refuse(step, "follows another activation without a layer between them")
        if self.affine is not None or self.average is not None:
            self.refuse(step, "acts on averages or on normalised pools; put it in front of them")
        if layer.pooling == "average" or (layer.pooling == "max" and names[0] not in RISING):
            self.refuse(step, f"acts on {layer.pooling} pools; put it in front of the pooling")
        layer.activation = names[0]

    def normalise(self, step: Step) -> None:
        given = step.arguments
        if given["training"]:
            remedy = "normalises by the statistics of a batch: call module.eval(), and keep running statistics"
            self.refuse(step, remedy)
        mean, variance = self.held(step, "running_mean"), self.held(step, "running_var")
        scale = (variance + given["eps"]).rsqrt()
        scale = scale if given["weight"] is None else scale * self.held(step, "weight")
        shift = -mean * scale if given["bias"] is None else self.held(step, "bias") - mean * scale
        layer = self.layers[-1] if self.layers else None
        if layer is not None and layer.activation is None and layer.pooling == "none" and self.average is None:
            layer.weight = layer.weight * scale[:, None, None, None]
            layer.bias = shift if layer.bias is None else layer.bias * scale + shift
            return
        if self.flat and prod(self.map[1:]) > 1 and self.average is None:
            self.refuse(step, "normalises every position of a map by itself; put it in front of the flattening")
        if self.affine is not None:
            scale, shift = self.affine[0] * scale, self.affine[1] * scale + shift
        self.affine = scale, shift, step

    def drop(self, step: Step) -> None:
        if step.arguments["train"]:
            self.refuse(step, "drops out at random: call module.eval()")

    def flatten(self, step: Step) -> None:
        if step.shape == self.map and not self.flat:
            return
        if step.shape != (prod(self.map),):
            self.refuse(step, f"makes {step.shape} of maps {self.map}; only flattening all of it enters")
        self.flat = True

    def average_over(self, step: Step) -> None:
        """x.mean((2, 3))"""
        if self.flat or sorted(axis % 4 for axis in step.arguments["dim"] or ()) != [2, 3]:
            self.refuse(step, "averages over other axes than both of the map")
        self.average = step
        self.flat = not step.arguments["keepdim"]
        self.map = (self.map[0], 1, 1)

    def adapt(self, step: Step) -> None:
        wanted, size = _pair(step.arguments["output_size"]), self.map[1:]
        if wanted == (1, 1):
            self.average = step
        elif any(have % want for have, want in zip(size, wanted)):
            self.refuse(step, f"averages maps {size} over windows of unequal size; use a divisor of the size")
        else:
            self.pool(step, "average", tuple(have // want for have, want in zip(size, wanted)))

    def pool_by(self, step: Step) -> None:
        given, size = step.arguments, _pair(step.arguments["kernel_size"])
        stride = _pair(given["stride"]) if given["stride"] else size
        if stride != size or any(_pair(given["padding"])) or any(each != 1 for each in _pair(given.get("dilation", 1))):
            self.refuse(step, f"pools windows {size} that overlap, leave gaps or are padded; use stride = kernel_size")
        if given["ceil_mode"] and any(have % side for have, side in zip(self.map[1:], size)):
            self.refuse(step, "keeps incomplete windows; set ceil_mode=False")
        if given.get("divisor_override"):
            self.refuse(step, "divides by a number of its own; leave divisor_override out")
        self.pool(step, "max" if _kind(step) == "max_pool2d" else "average", size)

    def pool(self, step: Step, pooling: str, size: tuple[int, ...]) -> None:
        if not self.layers:
            self.refuse(step, "pools the images themselves; do that before the network")
        layer = self.layers[-1]
        if self.affine is not None and pooling == "max" and bool((self.affine[0] < 0).any()):
            self.refuse(self.affine[2], "turns the sign of features before their maximum; put it behind the pooling")
        if layer.pooling not in ("none", pooling):
            self.refuse(step, f"pools what was {layer.pooling} pooled before; a layer pools in one way")
        if prod(size) > 1:
            layer.pooling = pooling
            layer.pool_size = tuple(old * new for old, new in zip(layer.pool_size, size))

    def settle_average(self, step: Step) -> None:
        """An average over all positions in front of a layer is the pooling of the layer below."""
        if self.average is None:
            return
        if self.layers:
            height, width = self.sizes()[-1]
            self.pool(self.average, "average", (height, width))
        else:
            self.refuse(self.average, "averages the images themselves; do that before the network")
        self.average = None

    def sizes(self) -> list[tuple[int, int]]:
        convs = tuple(layer.conv for layer in self.layers)
        return [each.pooled for each in Architecture(self.graph.shape, convs).geometry]  # type: ignore[arg-type]

    def require_flat(self, step: Step) -> None:
        if not self.flat:
            self.refuse(step, "acts on the last axis of maps; put a Flatten in front of it")

    # ---- particles

    def particles(self) -> Particles:
        if self.readout is None or self.signal != self.graph.output:
            for step in self.graph.steps[::-1]:  # a size of the signal that is asked for comes before its use
                if step.shape is None and self.signal in step.signals:
                    self.refuse(step, f"({_kind(step)}) gives no single tensor; only chains of layers enter")
            last = self.graph.steps[-1] if self.graph.steps else None
            came = "a module without layers" if last is None else last.layer
            raise Misuse(self.graph.argument, came, "is where it ends; it must end in one Linear, the readout")
        if len(self.kinds) > 1:
            kinds = ", ".join(sorted(f"{dtype} on {device}" for dtype, device in self.kinds))
            raise Misuse(self.graph.argument, kinds, "is what it holds; convert it to one dtype on one device")
        ((dtype, device),) = self.kinds
        working(dtype, self.graph.argument)
        weight, bias = self.readout
        if bias is not None and bool(bias.any()):
            weight = self.with_constant(weight, bias)
        layers, average = self.layers, self.average is not None
        convs = tuple(layer.conv for layer in layers)
        architecture = Architecture(
            self.graph.shape,  # type: ignore[arg-type]
            convs,
            "average" if average else "flatten",
            len(weight),
        )
        like = torch.empty(0, dtype=dtype, device=device)
        masses = [like.new_full((len(layer.weight),), 1 / len(layer.weight)) for layer in layers]
        kernels, channels = [], self.graph.shape[0]
        for layer, read in zip(layers, [None, *masses]):
            mass = None if read is None else read[0]
            forward = (lambda w: w / channels) if mass is None else (lambda w, mass=mass: w * mass)
            kernels.append(_undone(forward, layer.weight.to(dtype), channels if mass is None else 1 / mass))
        positions = 1 if average else weight.shape[2]
        mass = masses[-1][0]
        readout = _undone(lambda u: u * mass / positions, weight.to(dtype), positions / mass)
        biases = [None if layer.bias is None else layer.bias.to(dtype) for layer in layers]
        return Particles(architecture, masses, kernels, readout[..., 0] if average else readout, biases)

    def with_constant(self, weight: Tensor, bias: Tensor) -> Tensor:
        """The readout (K, M + 1, positions) with one more feature, which carries the bias evenly over positions."""
        layer = self.layers[-1]
        height = ACTIVATIONS[layer.activation or "identity"].function(bias.new_ones(1))
        if not bool(height.abs() > 0):
            reason = f"follows an activation with h(1) = 0, {layer.activation}, so that no feature can stand for a bias"
            raise Misuse(self.graph.argument, "the bias of the readout", reason)
        own = layer.bias if layer.bias is not None else bias.new_zeros(len(layer.weight))
        layer.bias = torch.cat([own, own.new_ones(1)])
        layer.weight = torch.cat([layer.weight, torch.zeros_like(layer.weight[:1])])
        even = (bias / height / weight.shape[2])[:, None, None].expand(-1, 1, weight.shape[2])
        return torch.cat([weight, even], 1)


HANDLERS: dict[str, Callable[[_Chain, Step], None]] = {
    "conv2d": _Chain.convolve,
    "batch_norm": _Chain.normalise,
    "max_pool2d": _Chain.pool_by,
    "avg_pool2d": _Chain.pool_by,
    "adaptive_avg_pool2d": _Chain.adapt,
    "mean": _Chain.average_over,
    **dict.fromkeys(PASSING, _Chain.drop),
    **dict.fromkeys(("flatten", "view", "reshape", "squeeze"), _Chain.flatten),
}


def _pair(value: Any) -> tuple[int, int]:
    entries = tuple(value) if isinstance(value, (list, tuple)) else (value,)
    return (entries[0], entries[0]) if len(entries) == 1 else (entries[0], entries[1])


def _undone(forward: Callable[[Tensor], Tensor], wanted: Tensor, factor: Any) -> Tensor:
    """x with forward(x) = wanted, to the last bit where a number has one: among the neighbours of wanted * factor."""
    guess = wanted * factor
    best, miss = guess, (forward(guess) - wanted).abs()
    for direction in (torch.inf, -torch.inf):
        near = guess
        for _ in range(2):
            near = torch.nextafter(near, torch.full_like(near, direction))
            off = (forward(near) - wanted).abs()
            best, miss = torch.where(off < miss, near, best), torch.minimum(off, miss)
    return best


def _signature(step: Step) -> tuple[str, str]:
    """An operator with its numbers: what tells one activation from another."""
    given = [value for value in step.arguments.values() if not isinstance(value, Signal)]
    return _kind(step), repr([float(value) if isinstance(value, (int, float)) else value for value in given])


@cache
def _operators(function: Callable[[Tensor], Tensor]) -> tuple[tuple[str, str], ...]:
    """The operator that an activation is, where it is one; none where it is more, or cannot be followed."""
    try:
        traced = make_fx(lambda g: function(g), pre_dispatch=True)  # of one argument, whatever else it may take
        nodes = list(traced(torch.zeros(2)).graph.nodes)
    except Exception:  # whatever a user's function does not take
        return ()
    calls = [node for node in nodes if node.op == "call_function"]
    if len(calls) != 1:
        return ()
    schema = calls[0].target._schema
    given = {
        each.name: Signal(value.name) if isinstance(value, torch.fx.Node) else value
        for each, value in zip(schema.arguments, calls[0].args)
    }
    named = {**given, **calls[0].kwargs}
    operator = str(calls[0].target).removeprefix("aten.")
    return (_signature(Step(operator, with_defaults(operator, named), "", (), "")),)
