"""Where a network is cut: what enters one of its layers, and what the rest makes of another signal put there.

A cut is exact only if everything that reaches the output passes through the layer.  Inside a residual block it does
not (the shortcut goes around); `check` finds that out on the graph of one forward pass and refuses.
"""

from __future__ import annotations

import copy
import difflib
import itertools
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from meanfield.validation import Misuse


class Below(nn.Module):
    """inputs -> the tensor that enters `layer` of a network; what comes after it is not run.

    Networks run on copies of the inputs, which some change in place.  Parameters are shared with the network.
    """

    def __init__(self, network: nn.Module, layer: str) -> None:
        super().__init__()
        children = _children(network)
        self.whole = layer not in children
        self.network = _watched(network, layer) if self.whole else nn.Sequential(OrderedDict(_before(children, layer)))
        self.layer = layer

    def forward(self, inputs: Tensor) -> Tensor:
        if not self.whole:
            return self.network(inputs.clone())
        with _visiting(self.network, self.layer, _Visit()) as visit:
            try:
                self.network(inputs.clone())
            except _Reached as end:
                if end.visit is not visit:
                    raise
        return visit.found()


class Above(nn.Module):
    """signal, inputs -> output of a network in which `layer` is overruled: its output is the signal, or its input if
    `entering`.

    Direct children of an nn.Sequential are cut off and the inputs not used.  In any other module the layers below are
    run on the inputs and what they find is thrown away.  Parameters are shared with the network.
    """

    def __init__(self, network: nn.Module, layer: str, *, entering: bool) -> None:
        super().__init__()
        children = _children(network)
        self.whole = layer not in children
        self.network = (
            _watched(network, layer) if self.whole else nn.Sequential(OrderedDict(_after(children, layer, entering)))
        )
        self.layer, self.entering = layer, entering

    def forward(self, signal: Tensor, inputs: Tensor) -> Tensor:
        if not self.whole:
            return self.network(signal)
        with _visiting(self.network, self.layer, _Visit(signal, self.entering)):
            return self.network(inputs.clone())


@dataclass(eq=False)
class _Visit:
    """What one pass has to do with a layer: carry `signal` in, as its input if `entering` or else as its output; or,
    without one, find it there.
    """

    signal: Tensor | None = None
    entering: bool = True
    reached: bool = False

    def found(self) -> Tensor:
        assert self.signal is not None
        return self.signal


class _Reached(BaseException):
    """Ends a pass at the layer that is asked for; no Exception, which a forward might catch."""

    def __init__(self, visit: _Visit) -> None:
        super().__init__()
        self.visit = visit


# by the id of the layer; a context belongs to a thread (or task) alone, so that calls do not see each other
_VISITS: ContextVar[Mapping[int, _Visit]] = ContextVar("_VISITS", default=MappingProxyType({}))


@contextmanager
def _visiting(network: nn.Module, layer: str, visit: _Visit) -> Iterator[_Visit]:
    """While the context lasts, passes of this thread through a network made by `_watched` heed the visit."""
    token = _VISITS.set({**_VISITS.get(), id(network.get_submodule(layer)): visit})
    try:
        yield visit
    finally:
        _VISITS.reset(token)
    if not visit.reached:
        raise RuntimeError(f"layer {layer!r} was not called in this pass, or in another thread than the pass itself")


def _entered(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Tensor] | None:
    visit = _VISITS.get().get(id(module))
    if visit is None:
        return None
    visit.reached = True
    if visit.signal is None:
        if torch.compiler.is_compiling():  # torch.export follows no exceptions; what is left over it removes
            visit.signal = arguments[0].clone()
            return None
        visit.signal = arguments[0]
        raise _Reached(visit)
    return (visit.signal,) if visit.entering else None


def _left(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> Tensor | None:
    visit = _VISITS.get().get(id(module))
    return None if visit is None or visit.entering else visit.signal


def _watched(network: nn.Module, layer: str) -> nn.Module:
    """A copy of the modules, on the same parameters and buffers, whose layer heeds visits: by hooks that stay, for one
    that comes and goes with a call would act on all calls at that time.
    """
    tensors = itertools.chain(network.parameters(), network.buffers())
    copied = copy.deepcopy(network, {id(tensor): tensor for tensor in tensors})
    module = copied.get_submodule(layer)
    module.register_forward_pre_hook(_entered)
    module.register_forward_hook(_left)
    return copied


def _children(network: nn.Module) -> dict[str, nn.Module]:
    """Direct children of a plain nn.Sequential in their order, a shared one under each of its names; otherwise none."""
    if type(network) is not nn.Sequential:
        return {}
    return {name: child for name, child in network.named_modules(remove_duplicate=False) if name and "." not in name}


def _before(children: dict[str, nn.Module], layer: str) -> list[tuple[str, nn.Module]]:
    return list(children.items())[: list(children).index(layer)]


def _after(children: dict[str, nn.Module], layer: str, entering: bool) -> list[tuple[str, nn.Module]]:
    return list(children.items())[list(children).index(layer) + (not entering) :]


def find(network: nn.Module, layer: str, argument: str) -> nn.Module:
    """The module of that name; ValueError with the nearest names."""
    if not isinstance(layer, str):
        raise TypeError(f"{argument}={layer!r} must be the name of a module, a string such as '4' or 'stage2.0'")
    names = [name for name, _ in network.named_modules(remove_duplicate=False) if name]
    if layer in names:
        return network.get_submodule(layer)
    near = ", ".join(map(repr, difflib.get_close_matches(layer, names, n=3) or names[:8]))
    there = f"there are {near} ({len(names)} in all)" if names else "it has none, put it into an nn.Sequential"
    raise Misuse(argument, layer, f"is not a module of the network; {there}")


@torch.no_grad()
def arriving(network: nn.Module, layer: str, inputs: Tensor, *, entering: bool) -> Tensor:
    """The signal that makes `Above` the network itself: the layer's input if `entering`, or else its output."""
    there = Below(network, layer)(inputs)
    return there if entering else network.get_submodule(layer)(there)


def check(network: nn.Module, layer: str, inputs: Tensor, argument: str, *, entering: bool) -> None:
    """ValueError unless `layer` is called once, with one tensor, and the output depends on the inputs through it alone.

    The dependence is read off the graph of one pass in which the layer's output is a constant, which is exact whatever
    the values, and where no graph is recorded (torch.no_grad, detach) from what a change of the inputs does to the
    output. Only for the upper network; `called_once` is for the lower one.
    """
    called_once(network, layer, inputs, argument)
    above, constant = Above(network, layer, entering=entering), arriving(network, layer, inputs, entering=entering)
    leaf = inputs.detach().clone().requires_grad_()
    with torch.enable_grad():
        first = above(constant.clone(), leaf)
        linked = first.requires_grad and torch.autograd.grad(first.sum(), leaf, allow_unused=True)[0] is not None
    with torch.no_grad():
        second = above(constant.clone(), 1 - 2 * leaf.detach())
        linked = linked or not torch.equal(first.nan_to_num(), second.nan_to_num())
    if linked:
        raise Misuse(
            argument,
            layer,
            "is no cut of the network: its output depends on its inputs on a way around this layer, as along the "
            "shortcut of a residual block; name the block as a whole (a 1x1 convolution in front of it is fitted) or "
            "a layer outside of it",
        )


@torch.no_grad()
def called_once(network: nn.Module, layer: str, inputs: Tensor, argument: str) -> None:
    calls: list[tuple[int, int]] = []

    def note(_: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        calls.append((len(arguments) if all(isinstance(each, Tensor) for each in arguments) else -1, len(named)))

    handle = network.get_submodule(layer).register_forward_pre_hook(note, with_kwargs=True)
    try:
        network(inputs.clone())
    finally:
        handle.remove()
    if len(calls) != 1:
        raise Misuse(
            argument, layer, f"is called {len(calls)} times in one pass; a cut needs a layer that is called once"
        )
    if calls[0] != (1, 0):
        raise Misuse(
            argument,
            layer,
            "does not take one tensor by position and nothing else; name a module that does, such as a block around it",
        )


@contextmanager
def recorded(network: nn.Module, kinds: tuple[type[nn.Module], ...]) -> Iterator[dict[str, Tensor]]:
    """Outputs of all modules of these kinds while the context lasts, by name, in the order in which they were made."""
    found: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, output: Tensor) -> None:
            found[name] = output.detach().clone()  # an activation in place may follow

        return hook

    handles = [
        module.register_forward_hook(keep(name))
        for name, module in network.named_modules()
        if isinstance(module, kinds)
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
