"""Scalings of a network with its widths: the four that have names, and a theorist's own.

An abc-parameterisation (Yang & Hu 2021, definition 3.1; here with signs as they stand) multiplies parameters by a power
of the width, draws them with a power of it, and moves them at a power of it.  Before an adaptive optimiser the size of
gradients is a fourth choice (Yang & Littwin 2023, the d of abcd).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from meanfield import validation
from meanfield.architecture import Architecture
from meanfield.starts import STARTS
from meanfield.validation import Misuse

Rule = float | Callable[[int, int], float]
Rules = Rule | Mapping[str, Rule]

WEIGHTS = ("input", "hidden", "readout")
KINDS = (*WEIGHTS, "bias")
BASE_WIDTH = 64  # at which a power of the width leaves a learning rate as it was given
HE = "he"
DEFAULT_RATES = {"adam": 1e-2, "sgd": 5e-2}


@dataclass(frozen=True)
class Scaling:
    """How multipliers, starts and learning rates of a CNN of widths m_1..m_L depend on them.

    Each field has a rule per kind of parameter: "input", the kernels of layer 1, "hidden", those of the others,
    "readout", and "bias", of all layers.  A number is a power of the width m, that of what the parameters write to for
    "input" and "bias" (m_1, m_l) and of what they read for "hidden" and "readout" (m_{l-1}, m_L).  A function of the
    channels that are read and written, (C_0, m_1), (m_{l-1}, m_l) or (m_L, K), gives the factor itself.  A single rule
    holds for all kinds.

    forward: what kernels and readout are multiplied by wherever the network reads them (never biases); default 1.
    initial: standard deviation of their entries at a random start, m^power times sqrt(gain / (C_0 S)) for "input",
        sqrt(gain / S) for "hidden" and 1 for "readout" (times the root of the positions of a flattened one), S offsets
        of a kernel and the gain of its activation, so that features are of order one where the powers of forward and
        initial add to 0, -1/2 and, for the output, -1/2.  Kinds that are not named, or "he" for all: He et al. 2015,
        eq. (10), multipliers times entries have variance gain / fan-in.  Biases start at zero.  A name of
        `starts.STARTS`: that start of the continuous network, in its own scaling.
    learning_rate: of each kind, as multiple of the one that is given to `train`; a power is one of m / BASE_WIDTH, so
        that at that width all layers have the rate given.  Or rules per optimiser, {"sgd": ..., "adam": ...}.
    gradient: factor of gradients before the optimiser sees them.  For SGD it is a learning rate; for Adam it says how
        large its epsilon is beside them.
    rates: learning rate by optimiser where `train` is given none.
    name: what tables and pages call it.

    Misuse names the field and the kind where a rule is neither, or gives what is not a positive number.
    """

    forward: Rules = 0.0
    learning_rate: Rules | Mapping[str, Rules] = 0.0
    initial: Rules | str = HE
    gradient: Rules = 0.0
    rates: Mapping[str, float] = field(default_factory=lambda: dict(DEFAULT_RATES))
    name: str = "own"

    def __post_init__(self) -> None:
        _check(self.forward, "forward", WEIGHTS)
        for optimiser in DEFAULT_RATES:
            _check(self._rates_of(optimiser), "learning_rate", KINDS)
        if isinstance(self.initial, str):
            validation.one_of(self.initial, "initial", (HE, *STARTS))
        else:
            _check(self.initial, "initial", WEIGHTS)
        _check(self.gradient, "gradient", KINDS)
        for optimiser in DEFAULT_RATES:
            validation.positive(self.rates.get(optimiser), f"rates[{optimiser!r}]")

    def forward_factors(self, architecture: Architecture, widths: Sequence[int]) -> list[float]:
        """Multipliers of the kernels of layers 1..L and of the readout."""
        return [_factor(self.forward, "forward", *place) for place in _weights(architecture, widths)]

    def deviations(self, architecture: Architecture, widths: Sequence[int]) -> list[float]:
        """Standard deviations of the entries of kernels 1..L and of the readout at the start.

        Misuse where the start is one of the continuous network, whose kernels are not independent.
        """
        if self.initial in STARTS:
            raise Misuse("initial", self.initial, "is a start without a deviation of its entries")
        places, factors = _weights(architecture, widths), self.forward_factors(architecture, widths)
        flattened = architecture.readout_positions if architecture.readout == "flatten" else 1
        variances = [
            layer.h.gain / (source * layer.offsets) for layer, (_, source, _) in zip(architecture.layers, places)
        ]
        variances.append(flattened / widths[-1])
        return [
            self._deviation(variance, factor, *place) for variance, factor, place in zip(variances, factors, places)
        ]

    def _deviation(self, variance: float, factor: float, kind: str, source: int, target: int) -> float:
        """variance: of the multiplier times an entry at the He start."""
        he, rule = math.sqrt(variance), None if isinstance(self.initial, str) else _rule(self.initial, kind, None)
        if rule is None:
            return he / factor
        # a sum over `summed` sources; he times its root is the constant of the kind
        summed, width = (1, target) if kind == "input" else (source, source)
        if callable(rule):
            return he * math.sqrt(summed) * _factor(rule, "initial", kind, source, target)
        power = 2 * rule + (kind != "input")  # of the root of the width: whole where the power is a half, hence exact
        return he / _power(math.sqrt(width), -power, "initial", kind)

    def layer_rates(self, architecture: Architecture, widths: Sequence[int], optimiser: str) -> dict[str, float]:
        """Learning rates by the names of a FiniteCNN's parameters, as multiples of the one given."""
        return _by_name(self._rates_of(optimiser), "learning_rate", architecture, widths, BASE_WIDTH)

    def gradient_factors(self, architecture: Architecture, widths: Sequence[int]) -> dict[str, float]:
        """Factors of gradients by the names of a FiniteCNN's parameters."""
        return _by_name(self.gradient, "gradient", architecture, widths)

    def _rates_of(self, optimiser: str) -> Rules:
        rules = self.learning_rate
        if isinstance(rules, Mapping) and rules and set(rules) <= set(DEFAULT_RATES):
            return cast(Rules, rules.get(optimiser, 0.0))
        return cast(Rules, rules)

    def described(self, architecture: Architecture, widths: Sequence[int], optimiser: str) -> str | dict[str, Any]:
        """The name where it is registered, else plain values: functions by what they give at these widths."""
        if SCALINGS.get(self.name) == self:
            return self.name
        return {
            "name": self.name,
            "forward": self.forward_factors(architecture, widths),
            "learning_rate": self.layer_rates(architecture, widths, optimiser),
            "initial": self.initial if self.initial in STARTS else self.deviations(architecture, widths),
            "gradient": self.gradient_factors(architecture, widths),
        }


def _weights(architecture: Architecture, widths: Sequence[int]) -> list[tuple[str, int, int]]:
    """(kind, channels read, channels written) of the kernels and the readout."""
    channels = (architecture.input_shape[0], *widths, architecture.outputs)
    kinds = ("input", *("hidden",) * (len(widths) - 1), "readout")
    return list(zip(kinds, channels, channels[1:]))


def _by_name(
    rules: Rules, argument: str, architecture: Architecture, widths: Sequence[int], base: int = 1
) -> dict[str, float]:
    *kernels, readout = _weights(architecture, widths)
    found = {"readout": _factor(rules, argument, *readout, base)}
    for layer, (kind, source, target) in enumerate(kernels):
        found[f"kernels.{layer}"] = _factor(rules, argument, kind, source, target, base)
        if architecture.layers[layer].bias:
            found[f"bias_parameters.{layer}"] = _factor(rules, argument, "bias", source, target, base)
    return found


def _rule(rules: Any, kind: str, default: Any = 0.0) -> Any:
    """That of one kind, `default` where it is not named."""
    return rules.get(kind, default) if isinstance(rules, Mapping) else rules


def _factor(rules: Any, argument: str, kind: str, source: int, target: int, base: int = 1) -> float:
    """What a rule gives for parameters that read `source` channels and write `target`."""
    rule = _rule(rules, kind)
    if not callable(rule):
        return _power((target if kind in ("input", "bias") else source) / base, rule, argument, kind)
    found = rule(source, target)
    try:
        return validation.positive(found, argument)
    except Misuse:
        place = f"{argument}[{kind!r}]({source}, {target})"
        raise Misuse(place, found, "must be a positive number: a factor, not a power") from None


def _power(width: float, power: float, argument: str, kind: str) -> float:
    try:
        return validation.positive(width**power, argument)
    except (Misuse, OverflowError):
        raise Misuse(f"{argument}[{kind!r}]", power, f"is too large a power of {width:g}") from None


def _check(rules: Any, argument: str, kinds: Sequence[str]) -> None:
    if isinstance(rules, Mapping):
        for kind, rule in rules.items():
            validation.one_of(kind, argument, kinds)
            _check_rule(rule, f"{argument}[{kind!r}]")
    else:
        _check_rule(rules, argument)


def _check_rule(rule: Any, argument: str) -> None:
    if not callable(rule):
        try:
            validation.number(rule, argument)
        except Misuse:
            remedy = "must be a power of the width or a function (channels read, channels written) -> factor"
            raise Misuse(argument, rule, remedy) from None


# functions of modules, unlike lambdas, travel between processes with the networks that have them
def _mean(source: int, target: int) -> float:
    return 1 / source


def _root(source: int, target: int) -> float:
    return 1 / math.sqrt(source)


def _both(source: int, target: int) -> float:
    return source * target


def _widening(source: int, target: int) -> float:
    return target / source


def _narrowing(source: int, target: int) -> float:
    return BASE_WIDTH / source


SCALINGS: dict[str, Scaling] = {
    each.name: each
    for each in (
        # gradients divided by the masses 1/m of their particles, the metric of the particle flow (Chizat & Bach 2018):
        # dz_i/dt = -(1/p_i) dJ/dz_i,  dw_ij/dt = -(1/(p_i p_j)) dJ/dw_ij,  du_j/dt = -(1/p_j) dJ/du_j
        Scaling(
            forward=_mean,
            initial="anchored",
            gradient={"input": 1, "hidden": _both, "readout": 1, "bias": 1},
            rates={"adam": 5e-2, "sgd": 5e-1},
            name="mean_field",
        ),
        Scaling(forward=_root, rates={"adam": 3e-2, "sgd": 5e-1}, name="ntk"),
        Scaling(name="standard"),
        Scaling(
            initial={"readout": -1},
            learning_rate={
                "adam": {"hidden": _narrowing, "readout": _narrowing},
                "sgd": {"input": 1, "hidden": _widening, "readout": _narrowing, "bias": 1},
            },
            rates={"adam": 1e-2, "sgd": 2e-1},
            name="mup",
        ),
    )
}


def registered(value: Any, argument: str = "scaling") -> Scaling:
    """A Scaling as it is, a name as the one that is registered under it."""
    return value if isinstance(value, Scaling) else SCALINGS[validation.one_of(value, argument, SCALINGS)]
