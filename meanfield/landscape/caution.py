"""What in a network makes a picture of its surface mislead: no scale invariance, batch norm."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules import batchnorm, instancenorm, normalization

from meanfield.architecture import Architecture
from meanfield.subject import Network

NORMS = (batchnorm._NormBase, instancenorm._InstanceNorm, normalization.LayerNorm, normalization.GroupNorm)
PROBE = (2, 4, 8, 8)


def cautions(network: Network, *, scaled: bool = True) -> tuple[str, ...]:
    """Sentences that name layers.  scaled: whether directions take their size from the weights.

    The network is one that may be called: modules without parameters are, on random numbers.
    """
    found = []
    curved = list(not_homogeneous(network))
    if scaled and curved:
        found.append(
            f"not positively homogeneous: {', '.join(curved)}.  Rescaled filters are another function there, and "
            "normalised directions do not make networks comparable"
        )
    if isinstance(network, nn.Module):
        norms = [name for name, module in network.named_modules() if isinstance(module, batchnorm._BatchNorm)]
        if norms:
            found.append(
                f"batch norm: {', '.join(norms)}.  Running statistics are those of the network itself unless they are "
                "recomputed at every point"
            )
    return tuple(found)


def not_homogeneous(network: Network) -> Iterator[str]:
    """What is not positively homogeneous, h(t g) = t h(g) for t > 0: "tanh in layers.0", "1 (GELU)"."""
    architecture = getattr(network, "architecture", None)
    if isinstance(architecture, Architecture):
        for index, layer in enumerate(architecture.layers):
            if not layer.h.homogeneous:
                yield f"{layer.h} in layers.{index}"
    elif isinstance(network, nn.Module):
        for name, module in network.named_modules():
            if is_plain(module) and not is_homogeneous(module):
                yield f"{name} ({type(module).__name__})"
        yield from _called(network)


def is_plain(module: nn.Module) -> bool:
    """Whether it has no parameters, no parts, and normalises nothing: an activation, a pooling, a flattening."""
    leaf = not any(True for _ in module.children()) and not any(True for _ in module.parameters())
    return leaf and not isinstance(module, NORMS)


def is_homogeneous(function: Callable[..., Any], *probes: Any, **constants: Any) -> bool:
    """function(2 g, ...) = 2 function(g, ...) on random numbers.

    probes: of several arguments, what is no tensor among them stays as it is.  What does not take images passes.
    """
    given = probes or (_probe(0),)
    twice = [2 * each if isinstance(each, Tensor) else each for each in given]
    try:
        with torch.random.fork_rng([]):  # of a dropout that is always on
            once, found = function(*given, **constants), function(*twice, **constants)
        return not isinstance(once, Tensor) or torch.allclose(found, 2 * once, rtol=1e-9, atol=0)
    except Exception:  # whatever is raised by what takes other shapes: it is no activation
        return True


def _probe(index: int) -> Tensor:
    return torch.randn(PROBE, generator=torch.Generator().manual_seed(index), dtype=torch.float64)


def _called(network: nn.Module) -> Iterator[str]:
    """Functions that the forward pass calls itself, on the graph that torch.fx reads."""
    try:
        graph = fx.Tracer().trace(network)
    except Exception as error:  # whatever a module raises when it is read: it is said, not hidden
        yield f"perhaps more (the forward pass could not be read: {type(error).__name__})"
        return
    for node in graph.nodes:
        if node.op in ("call_function", "call_method") and not _homogeneous_call(node):
            inside = list(node.meta.get("nn_module_stack", {"": ""}))[-1]
            yield f"{getattr(node.target, '__name__', node.target)} in {inside or 'the forward pass'}"


def _homogeneous_call(node: fx.Node) -> bool:
    """Signals are random numbers, each its own; what a module holds (op get_attr) does not grow with them."""
    if any(isinstance(each, fx.Node) and each.op == "get_attr" for each in (*node.args, *node.kwargs.values())):
        return True
    probes = [_probe(index) if isinstance(each, fx.Node) else each for index, each in enumerate(node.args)]
    function: Any = getattr(Tensor, node.target) if isinstance(node.target, str) else node.target
    return is_homogeneous(function, *probes, **node.kwargs)
