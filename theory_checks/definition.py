"""Before all claims: the library computes what sections 1 and 2 of the theory define, by another program.

Everything here is written from the formulas alone, in numpy and without the library's layers, losses and penalties.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view

import meanfield as mf
from meanfield import finite
from theory_checks.claim import Axes, Claim, Evidence, Setting, ranked
from theory_checks.instances import Variety, random_network
from theory_checks.rounding import in_units, output_error, value_error
from theory_checks.statistics import largest, share_text

WIDTHS = ((5,), (5, 4), (4, 3, 5))
BEYOND = 1.01  # times a bound: infeasible


def _gelu(g: np.ndarray) -> np.ndarray:
    return g * torch.special.ndtr(torch.as_tensor(g)).numpy()


ACTIVATIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "relu": lambda g: np.where(g > 0, g, 0.0),
    "tanh": np.tanh,
    "softplus": lambda g: np.logaddexp(0, g),
    "gelu": _gelu,
}


@dataclass(frozen=True)
class Rules:
    """What the formulas say, one entry per thing that a control reads otherwise."""

    masses: bool = True
    flipped: bool = False
    biases: bool = True
    padded: str = "constant"
    pooled: Callable[..., np.ndarray] = np.mean
    divided: bool = True
    source_outside: bool = True
    bounds: bool = True


def _convolved(x: np.ndarray, w: np.ndarray, layer: mf.Conv, rules: Rules) -> np.ndarray:
    """sum_i sum_s w_ijs T_s x_i: windows of the zero-padded image, every `stride`-th of them, against the kernel."""
    (up, left), (down, right) = layer.padding, layer.stride  # type: ignore[misc]
    padded = np.pad(x, ((0, 0), (0, 0), (up, up), (left, left)), mode=rules.padded)  # type: ignore[call-overload]
    windows = sliding_window_view(padded, layer.kernel, axis=(2, 3))[:, :, ::down, ::right]
    w = w[:, :, ::-1, ::-1] if rules.flipped else w
    return np.einsum("ncyxab,mcab->nmyx", windows, w)


def _pooled(f: np.ndarray, layer: mf.Conv, rules: Rules) -> np.ndarray:
    """Over windows that do not overlap; incomplete ones are dropped."""
    if layer.pooling == "none":
        return f
    (a, b), (height, width) = layer.pool_size, f.shape[2:]  # type: ignore[misc]
    windows = f[:, :, : height // a * a, : width // b * b].reshape(*f.shape[:2], height // a, a, width // b, b)
    return (np.max if layer.pooling == "max" else rules.pooled)(windows, axis=(3, 5))


def _output(network: mf.ParticleNetwork, inputs: np.ndarray, rules: Rules) -> np.ndarray:
    """F, (N, K)."""
    plain = network.map(lambda tensor: tensor.detach().cpu())
    masses = [p.numpy() if rules.masses else np.full(len(p), 1 / len(p)) for p in plain.masses]
    measures = [np.full(inputs.shape[1], 1 / inputs.shape[1]), *masses]
    signal = inputs
    for layer, w, b, p in zip(network.architecture.layers, plain.kernels, plain.biases, measures):
        g = _convolved(signal, w.numpy() * p[None, :, None, None], layer, rules)
        if b is not None and rules.biases:
            g = g + b.numpy()[None, :, None, None]
        signal = _pooled(ACTIVATIONS[layer.h.name](g), layer, rules)
    count, width = signal.shape[:2]
    maps, u = signal.reshape(count, width, -1), plain.readout.numpy()
    if network.architecture.readout == "average":
        return np.einsum("nj,kj,j->nk", maps.mean(2), u, masses[-1])
    total = np.einsum("njq,kjq,j->nk", maps, u, masses[-1])
    return total / maps.shape[2] if rules.divided else total


def _loss(problem: mf.Problem, outputs: np.ndarray) -> float:
    targets = problem.targets.cpu().numpy()
    if problem.loss.name == "squared":
        return float(0.5 * ((outputs - targets) ** 2).sum(1).mean())
    if problem.loss.name == "logistic":
        return float(np.logaddexp(0, -targets * outputs).sum(1).mean())
    return float((np.logaddexp.reduce(outputs, 1) - outputs[np.arange(len(targets)), targets]).mean())


def _objective(problem: mf.Problem, network: mf.ParticleNetwork, outputs: np.ndarray, rules: Rules) -> float:
    """J of section 2, term by term; +inf outside the bounds."""
    penalty, plain = problem.penalty, network.map(lambda tensor: tensor.detach().cpu())
    p, w, u = [[each.numpy() for each in group] for group in (plain.masses, plain.kernels, [plain.readout])]
    b = [None if each is None else each.numpy() for each in plain.biases]
    power = 2 if penalty.kernel_norm == "l2" else 1
    size = lambda kernels: (np.abs(kernels) ** power).sum((2, 3)) ** (1 / power)  # noqa: E731
    first = np.sqrt((w[0] ** 2).sum((1, 2, 3)) + (0.0 if b[0] is None else b[0] ** 2))
    value = _loss(problem, outputs) + penalty.input * float(p[0] @ first**2)
    value += penalty.readout * sum(float(p[-1][j] * (u[0][:, j] ** 2).sum()) for j in range(len(p[-1])))
    inside = penalty.input_bound is None or first.max() <= penalty.input_bound
    for layer in range(1, len(p)):
        source, target, norms = p[layer - 1], p[layer], size(w[layer])  # norms (targets, sources)
        if rules.source_outside:
            value += penalty.source * sum(source[i] * (norms[:, i] @ target) ** 2 for i in range(len(source)))
        else:
            value += penalty.source * sum(target[j] * (norms[j] @ source) ** 2 for j in range(len(target)))
        bias = b[layer]
        reached = float((norms @ source).max())
        reached = reached if bias is None else max(reached, float(np.abs(bias).max()))
        inside &= penalty.amplitude_bound is None or reached <= penalty.amplitude_bound
    return value if inside or not rules.bounds else float("inf")


def _differences(problem: mf.Problem, network: mf.ParticleNetwork, rules: Rules) -> dict[str, float]:
    """Output and J of the library against the formulas, and the network as torch modules, in rounding bounds."""
    inputs = problem.inputs
    mine = _output(network, inputs.cpu().numpy(), rules)
    allowed, spread = 2 * output_error(network, inputs), 2 * value_error(problem, network)
    modules = finite.sequential(network)(inputs).detach()
    against = lambda output: in_units(output.cpu() - torch.as_tensor(mine), allowed.cpu())  # noqa: E731
    longer = [
        [None if each is None else BEYOND * each for each in group] for group in (network.kernels, network.biases)
    ]
    outside = mf.ParticleNetwork(network.architecture, network.masses, longer[0], network.readout, longer[1])  # type: ignore[arg-type]
    values = []
    for each in (network, outside):
        own = _objective(problem, each, _output(each, inputs.cpu().numpy(), rules), rules)
        value = float(problem.value(each))
        values.append(
            0.0 if value == own else float(np.nan_to_num(abs(value - own) / spread, nan=np.inf, posinf=np.inf))
        )
    return {
        "output": against(network(inputs)),
        "output of torch's modules": against(modules),
        "value": values[0],
        "value beyond the bounds": values[1],
    }


def _against_formulas(setting: Setting, rules: Rules) -> Evidence:
    variety, worst, names = Variety(setting, 13), [], []
    for instance in range(setting.instances(24, 240)):
        depth = 1 + instance % 3
        problem = variety.problem(instance, depth)
        network = random_network(problem, WIDTHS[depth - 1], setting.generator(131, instance))
        if instance // 3 % 2:
            problem, network = variety.bounded(problem, network, 1 + 1e-9, instance)
        found = _differences(problem, network, rules)
        names.append(max(found, key=lambda name: found[name]))
        worst.append(found[names[-1]])
    top, beyond = int(np.argmax(worst)), sum(each > 1 for each in worst)
    text = (
        f"{share_text(beyond, len(worst), 'networks differ from the formulas')}; the largest difference is "
        f"{worst[top]:.2g} rounding bounds, in the {names[top]}"
    )
    shown = [min(each, 1e18) for each in worst]
    return Evidence(largest(worst), text, len(worst), beyond, (ranked("largest difference", shown),))


def _control(**read: object) -> Callable[[Setting], Evidence]:
    return lambda setting: _against_formulas(setting, replace(Rules(), **read))


CLAIMS = (
    Claim(
        name="definition",
        statement="The library's networks, their form as torch modules and J are those of the definitions.",
        source="docs/theory.md, sections 1 and 2",
        statistic="largest difference of output or value from a program written from the formulas, over random "
        "networks of every kind, in rounding bounds",
        threshold=1.0,
        derivation="running error bounds of both programs in float64",
        limits="What is defined, not whether it is a good definition. Every control reads one line of it otherwise, "
        "and shows that instances depend on that line.",
        measure=_control(),
        controls={
            "masses taken as equal": _control(masses=False),
            "kernels turned by half a turn": _control(flipped=True),
            "biases left out": _control(biases=False),
            "padding with the border in place of zeros": _control(padded="edge"),
            "the largest in place of the mean of a pooling window": _control(pooled=np.max),
            "flattened readout not divided by its positions": _control(divided=False),
            "source penalty with the target outside": _control(source_outside=False),
            "bounds left out": _control(bounds=False),
        },
        axes=Axes("network, sorted by its difference", "difference / rounding bound", "y", 1.0),
    ),
)
