"""Activations h: the function, and what is known of it, tried on a grid before anything stands on it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from meanfield.validation import Misuse, boolean, one_of, positive

NEAR = 40.0  # the grid is dense up to here, and geometric up to FAR
FAR = 1e6
FARTHER = 1e12  # where a bounded h has not grown, and h(t g) / t has settled
ROUNDING = 1e-9  # relative, of what an identity may be off by
SETTLED = 1e-5  # relative, of what is a limit


class Pointwise(nn.Module):
    """An activation as a module, where torch has none."""

    def __init__(self, activation: Activation) -> None:
        super().__init__()
        self.activation = activation

    def forward(self, signal: Tensor) -> Tensor:
        """h of every entry, in the shape of `signal`."""
        return self.activation.function(signal)

    def extra_repr(self) -> str:
        return self.activation.name


@dataclass(frozen=True, repr=False)
class Activation:
    """An activation h and what is known of it; ValueError where the grid contradicts what is declared.

    function: h, elementwise on tensors of any shape, float32 or float64, differentiated by torch.
    layer: makes the nn.Module of the same h, such as nn.SiLU; without it a module that calls the function.
    bounded: |h| is bounded.  homogeneous: h(t g) = t h(g) for t >= 0.  recession: for an h that is neither, the name of
    the homogeneous activation that h(t g) / t tends to as t -> inf.  At most one of the three; of an h with none of
    them, the bounds that a minimum needs and the limits of a lower bound follow from `derivative_bound`.
    gain: fan-in times the variance of a kernel's entries at the He start (He et al. 2015, eq. (10)): 2 for what loses
    half of the signal as ReLU does.
    derivative_bound: a number that |h'| nowhere exceeds; None where none is known.
    name: of its layers, in files and in messages, an identifier; that of the function where none is given.

    What is declared is tried at points up to 1e12.  A grid finds what is false, and proves nothing.
    """

    function: Callable[[Tensor], Tensor]
    layer: Callable[[], nn.Module] | None = field(default=None, compare=False)
    bounded: bool = False
    homogeneous: bool = False
    recession: str | None = None
    gain: float = field(default=1.0, compare=False)
    derivative_bound: float | None = None
    name: str = ""

    def __post_init__(self) -> None:
        if not callable(self.function):
            raise Misuse("function", self.function, "must be a function of a tensor")
        object.__setattr__(self, "name", self.name or getattr(self.function, "__name__", ""))
        if not isinstance(self.name, str) or not self.name.isidentifier():
            remedy = "must name the activation by letters, digits and _, such as Activation(function, name='cube')"
            raise Misuse("name", self.name, remedy)
        object.__setattr__(self, "bounded", boolean(self.bounded, "bounded"))
        object.__setattr__(self, "homogeneous", boolean(self.homogeneous, "homogeneous"))
        object.__setattr__(self, "gain", positive(self.gain, "gain"))
        if self.derivative_bound is not None:
            object.__setattr__(self, "derivative_bound", positive(self.derivative_bound, "derivative_bound"))
        if self.bounded + self.homogeneous + (self.recession is not None) > 1:
            raise ValueError(
                f"bounded={self.bounded}, homogeneous={self.homogeneous}, recession={self.recession!r}: an activation "
                "is at most one of the three"
            )
        _check(self)

    def __repr__(self) -> str:
        return repr(self.name)

    def __str__(self) -> str:
        return self.name

    @property
    def linear_growth(self) -> bool:
        """Whether |h(g)| <= a + b |g| is known for some a, b."""
        return self.bounded or self.homogeneous or self.recession is not None or self.derivative_bound is not None

    def module(self) -> nn.Module:
        """h as a module."""
        return Pointwise(self) if self.layer is None else self.layer()

    @torch.no_grad()
    def fingerprint(self) -> list[float]:
        """Values by which files know the function again: near 0, and so far that ReLU is told from what ends at 6."""
        far = torch.tensor([-40, -20, -10, -5, 5, 10, 20, 40], dtype=torch.float64)
        return self.function(torch.cat([torch.linspace(-3, 3, 13, dtype=torch.float64), far])).tolist()


@torch.no_grad()
def _check(activation: Activation) -> None:
    """Refuse a function that is not elementwise or not differentiated, and what is declared and false of it."""
    near = torch.linspace(-NEAR, NEAR, 1601, dtype=torch.float64)  # 0 and the integers included
    far = torch.logspace(math.log10(NEAR), math.log10(FAR), 60, dtype=torch.float64)
    grid = torch.cat([-far.flip(0), near, far])
    _check_function(activation, near)
    if activation.layer is not None:
        _check_layer(activation, near)
    if activation.bounded:
        _check_bounded(activation, grid)
    if activation.homogeneous:
        _check_homogeneous(activation, grid)
    if activation.recession is not None:
        _check_recession(activation, near)
    if activation.derivative_bound is not None:
        _check_derivative(activation, grid)


def _false(activation: Activation, declared: str, why: str) -> Misuse:
    return Misuse(declared, getattr(activation, declared), f"is false of the activation {activation.name!r}: {why}")


def _check_function(activation: Activation, grid: Tensor) -> None:
    for dtype in (torch.float64, torch.float32):
        g = grid.to(dtype).detach().requires_grad_()
        try:
            with torch.enable_grad():
                h = activation.function(g)
        except (RuntimeError, TypeError, ValueError) as error:  # in place, or no function of tensors
            raise Misuse("function", activation.name, f"fails on a tensor of dtype {dtype}: {error}") from error
        if not isinstance(h, Tensor) or h.shape != g.shape or h.dtype != dtype:
            got = f"{tuple(h.shape)}, {h.dtype}" if isinstance(h, Tensor) else type(h).__name__
            remedy = f"must give a tensor of the shape {tuple(g.shape)} and dtype {dtype} that it takes, not {got}"
            raise Misuse("function", activation.name, remedy)
        if not h.requires_grad:
            raise Misuse("function", activation.name, "must be written in operations that torch differentiates")
    h = activation.function(grid)
    if not bool(h.isfinite().all()):
        where = grid[~h.isfinite()]
        where = float(where[where.abs().argmin()])
        raise Misuse("function", activation.name, f"must be finite on [-{NEAR:g}, {NEAR:g}], and is not at g={where:g}")
    apart = activation.function(grid[::2, None, None]).flatten()
    if not torch.allclose(apart, h[::2], rtol=ROUNDING, atol=ROUNDING):
        raise Misuse("function", activation.name, "must act on every entry by itself, and twice alike")


def _check_layer(activation: Activation, grid: Tensor) -> None:
    layer = activation.layer
    module = None if layer is None or isinstance(layer, nn.Module) else layer()
    if not isinstance(module, nn.Module):
        raise Misuse("layer", layer, "must make an nn.Module without arguments, such as nn.SiLU")
    if not torch.allclose(module(grid), activation.function(grid), rtol=ROUNDING, atol=ROUNDING):
        raise Misuse("layer", layer, f"is another function than {activation.name!r}")


def _check_bounded(activation: Activation, grid: Tensor) -> None:
    beyond = torch.logspace(math.log10(FAR), math.log10(FARTHER), 60, dtype=torch.float64)
    here, there = (activation.function(each).abs() for each in (grid, torch.cat([-beyond, beyond])))
    least, most = float(here.max()), float(there.nan_to_num(nan=math.inf).max())
    if most > 1.01 * least:
        why = f"|h| reaches {least:.4g} at |g| <= {FAR:.0e} and {most:.4g} at |g| <= {FARTHER:.0e}"
        raise _false(activation, "bounded", why)


def _check_homogeneous(activation: Activation, grid: Tensor) -> None:
    h = activation.function(grid)
    for factor in (0.0, 0.3, 7.0):
        off = activation.function(factor * grid) - factor * h
        size = factor * h.abs() + grid.abs() + 1
        worst = int((off.abs() / size).nan_to_num(nan=math.inf).argmax())
        if not abs(float(off[worst])) <= ROUNDING * float(size[worst]):
            why = f"h({factor:g} g) and {factor:g} h(g) differ by {abs(float(off[worst])):.4g} at g={grid[worst]:.4g}"
            raise _false(activation, "homogeneous", why)


def _check_recession(activation: Activation, grid: Tensor) -> None:
    homogeneous = [name for name, each in ACTIVATIONS.items() if each.homogeneous]
    limit = ACTIVATIONS[one_of(activation.recession, "recession", homogeneous)]
    off = activation.function(FARTHER * grid) / FARTHER - limit.function(grid)
    worst = int(off.abs().nan_to_num(nan=math.inf).argmax())
    if not abs(float(off[worst])) <= SETTLED * (1 + abs(float(grid[worst]))):
        why = f"h(t g) / t and {limit.name}(g) differ by {abs(float(off[worst])):.4g} at g={grid[worst]:.4g}, t=1e12"
        raise _false(activation, "recession", why)


def _check_derivative(activation: Activation, grid: Tensor) -> None:
    """By torch's derivative at the points, and by the slope between neighbours, which is that of a point between."""
    bound = float(activation.derivative_bound or 0)
    g = grid.detach().requires_grad_()
    with torch.enable_grad():
        h = activation.function(g)
        slopes = torch.autograd.grad(h.sum(), g)[0].abs()
    between = (h.detach().diff() / grid.diff()).abs()
    for found, places in ((slopes, grid), (between, (grid[1:] + grid[:-1]) / 2)):
        worst = int(found.nan_to_num(nan=math.inf).argmax())
        if not float(found[worst]) <= bound * (1 + ROUNDING) + ROUNDING:
            raise _false(activation, "derivative_bound", f"|h'| reaches {found[worst]:.6g} at g={places[worst]:.4g}")


def _identity(g: Tensor) -> Tensor:
    return g


SLOPE = 0.01  # of leaky ReLU below zero, torch's own
ACTIVATIONS: dict[str, Activation] = {}


def _enter(*given: Activation) -> None:
    ACTIVATIONS.update((each.name, each) for each in given)


_enter(
    Activation(functional.relu, nn.ReLU, homogeneous=True, gain=2.0, derivative_bound=1.0),
    Activation(torch.tanh, nn.Tanh, bounded=True, derivative_bound=1.0),
)
_enter(
    Activation(functional.softplus, nn.Softplus, recession="relu", derivative_bound=1.0),
    Activation(functional.gelu, nn.GELU, recession="relu", gain=2.0, derivative_bound=1.129),  # 1.1289 at sqrt(2)
    Activation(_identity, nn.Identity, homogeneous=True, derivative_bound=1.0, name="identity"),
    Activation(  # He et al. 2015, eq. (15)
        functional.leaky_relu, nn.LeakyReLU, homogeneous=True, gain=2 / (1 + SLOPE**2), derivative_bound=1.0
    ),
    Activation(functional.silu, nn.SiLU, recession="relu", gain=2.0, derivative_bound=1.0999),  # 1.09984 at 2.3994
    Activation(functional.hardtanh, nn.Hardtanh, bounded=True, derivative_bound=1.0),
    Activation(torch.sin, bounded=True, derivative_bound=1.0),
    Activation(torch.erf, bounded=True, derivative_bound=2 / math.sqrt(math.pi)),
)


def resolve(value: Any, argument: str = "activation") -> Activation:
    """The activation of this name in ACTIVATIONS, or of this function there, an Activation itself, or a function of
    which nothing is declared.
    """
    if isinstance(value, str) or not (isinstance(value, Activation) or callable(value)):
        return ACTIVATIONS[one_of(value, argument, ACTIVATIONS)]
    for each in ACTIVATIONS.values():
        if value is each.function:
            return each
    found = value if isinstance(value, Activation) else Activation(value)  # type: ignore[arg-type]
    if ACTIVATIONS.get(found.name, found) != found:
        remedy = (
            "is the name of another activation of the library: give that name for it, or this one another, by "
            "Activation(..., name=...)"
        )
        raise Misuse(argument, found.name, remedy)
    return found


Given = Annotated[str | Activation | Callable[[Tensor], Tensor], resolve]
