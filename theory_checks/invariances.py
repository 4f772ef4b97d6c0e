"""Claim 9: what is done to the particles and leaves the measure alone leaves the network alone."""

from __future__ import annotations

from collections.abc import Callable

import torch

import meanfield as mf
from meanfield import measures
from meanfield.starts import normal
from theory_checks.claim import Axes, Claim, Evidence, Setting, ranked
from theory_checks.instances import Variety, permuted, random_masses, random_network, random_problem
from theory_checks.rounding import in_units, output_error, value_error
from theory_checks.statistics import largest, share_text

WIDTHS = ((5,), (5, 4), (4, 3, 5))
Move = Callable[[mf.ParticleNetwork, torch.Generator], mf.ParticleNetwork]


def _pick(network: mf.ParticleNetwork, generator: torch.Generator) -> tuple[int, int]:
    """A random layer and particle."""
    layer = int(torch.randint(network.architecture.depth, (), generator=generator))
    return layer, int(torch.randint(network.widths[layer], (), generator=generator))


def _split(network: mf.ParticleNetwork, generator: torch.Generator) -> mf.ParticleNetwork:
    return measures.split(network, *_pick(network, generator), random_masses(3, generator).to(network.readout))


def _split_and_merged(network: mf.ParticleNetwork, generator: torch.Generator) -> mf.ParticleNetwork:
    layer, particle = _pick(network, generator)
    cloned = measures.split(network, layer, particle, random_masses(2, generator).to(network.readout))
    return measures.merge(cloned, layer, [particle, particle + 1])


def _drifted_and_merged(network: mf.ParticleNetwork, generator: torch.Generator) -> mf.ParticleNetwork:
    """Clones whose outgoing kernels or readout move apart around their mass average, merged again."""
    layer, particle = _pick(network, generator)
    shares = random_masses(2, generator).to(network.readout)
    cloned = measures.split(network, layer, particle, shares)
    kernels, readout = list(cloned.kernels), cloned.readout
    last = layer + 1 == network.architecture.depth
    outgoing = readout if last else kernels[layer + 1]
    moved, apart = outgoing.clone(), normal(outgoing[:, particle].shape, generator, outgoing)
    moved[:, particle] += shares[1] * apart  # shares[0] shares[1] - shares[1] shares[0] = 0
    moved[:, particle + 1] -= shares[0] * apart
    if last:
        readout = moved
    else:
        kernels[layer + 1] = moved
    drifted = mf.ParticleNetwork(network.architecture, cloned.masses, kernels, readout, cloned.biases)
    return measures.merge(drifted, layer, [particle, particle + 1])


def _copied_whole(network: mf.ParticleNetwork, generator: torch.Generator) -> mf.ParticleNetwork:
    """A clone that takes the whole mass of its original, the layer then renormalised."""
    layer, particle = _pick(network, generator)
    half = network.readout.new_full((2,), 0.5)
    cloned = measures.split(network, layer, particle, half)
    masses = list(cloned.masses)
    masses[layer] = masses[layer].clone()
    masses[layer][particle : particle + 2] = network.masses[layer][particle]
    masses[layer] = masses[layer] / masses[layer].sum()
    return mf.ParticleNetwork(network.architecture, masses, cloned.kernels, cloned.readout, cloned.biases)


MOVES: dict[str, Move] = {
    "permutation": permuted,
    "splitting": _split,
    "splitting and merging": _split_and_merged,
    "merging of clones that drifted apart": _drifted_and_merged,
}


def _change(problem: mf.Problem, network: mf.ParticleNetwork, moved: mf.ParticleNetwork) -> float:
    """Change of output and value, in rounding bounds of both networks."""
    values = abs(float(problem.terms(network).total()) - float(problem.terms(moved).total()))
    allowed = value_error(problem, network) + value_error(problem, moved)
    return max(_output_change(problem, network, moved), values / allowed)


def _output_change(problem: mf.Problem, network: mf.ParticleNetwork, moved: mf.ParticleNetwork) -> float:
    outputs = network.responses(problem.inputs).output - moved.responses(problem.inputs).output
    allowed = output_error(network, problem.inputs) + output_error(moved, problem.inputs)
    return in_units(outputs, allowed)


def _changes(setting: Setting, moves: dict[str, Move]) -> Evidence:
    found: dict[str, list[float]] = {}
    variety = Variety(setting, 92)
    for instance in range(setting.instances(24, 240)):
        generator, depth = setting.generator(9, instance), 1 + instance % 3
        problem = variety.problem(instance, depth)
        network = random_network(problem, WIDTHS[depth - 1], generator)
        for name, move in moves.items():
            found.setdefault(name, []).append(_change(problem, network, move(network, generator)))
    return _evidence(found)


def _evidence(found: dict[str, list[float]]) -> Evidence:
    every = [change for changes in found.values() for change in changes]
    beyond = sum(change > 1 for change in every)
    worst = ", ".join(f"{name} {max(changes):.2g}" for name, changes in found.items())
    series = tuple(ranked(name, changes) for name, changes in found.items())
    text = f"{share_text(beyond, len(every), 'moves change the network')}; largest change in rounding bounds: {worst}"
    return Evidence(largest(every), text, len(every), beyond, series)


def _rescaled(network: mf.ParticleNetwork, generator: torch.Generator) -> mf.ParticleNetwork:
    """z_j -> c_j z_j, u_j -> u_j / c_j for one layer."""
    factors = torch.exp(2 * torch.rand(network.widths[0], generator=generator, dtype=torch.float64) - 1).to(
        network.readout
    )
    kernels = [network.kernels[0] * factors[:, None, None, None]]
    biases = [None if b is None else b * factors for b in network.biases]
    return mf.ParticleNetwork(network.architecture, network.masses, kernels, network.readout / factors[None, :], biases)


def _least(problem: mf.Problem, network: mf.ParticleNetwork) -> float:
    """The penalties of a balanced network less 2 sqrt(lambda_1 lambda_u) sum p |z| |u|, in rounding bounds of J."""
    penalty, terms = problem.penalty, problem.terms(network)
    sizes = network.kernels[0].flatten(1).norm(dim=1) * network.readout.norm(dim=0)
    least = 2 * (penalty.input * penalty.readout) ** 0.5 * float(network.masses[0] @ sizes)
    return abs(float(terms.input + terms.readout) - least) / value_error(problem, network)


def _rescalings(setting: Setting, activation: str) -> Evidence:
    """The output under rescaling, and J balanced by `measures.balance` before and after: it depends on p |z| |u| alone,
    and its penalties are 2 sqrt(lambda_1 lambda_u) sum p |z| |u|.
    """
    changes = []
    for instance in range(setting.instances(24, 240)):
        generator = setting.generator(91, instance)
        problem = random_problem(generator, 1, activation=activation, device=setting.device)
        network = random_network(problem, WIDTHS[0], generator)
        moved = _rescaled(network, generator)
        balanced = [measures.balance(each, problem.penalty.input, problem.penalty.readout) for each in (network, moved)]
        changes.append(max(_output_change(problem, network, moved), _change(problem, *balanced)))
        if activation == "relu":
            changes.append(_least(problem, balanced[0]))
    return _evidence({"rescaling": changes})


CLAIMS = (
    Claim(
        name="invariances.particles",
        statement="Permuting particles, splitting one into clones that share its mass, and merging clones, also when "
        "what they send on has drifted around its mass average, change neither F nor J.",
        source="docs/theory.md, section 6",
        statistic="largest change of output or value over random networks, in rounding bounds",
        threshold=1.0,
        derivation="running error bounds of both networks",
        limits="Clones are equal at one moment; a flow keeps them equal, noise does not.",
        measure=lambda setting: _changes(setting, MOVES),
        controls={
            "a clone with the whole mass, renormalised": lambda setting: _changes(setting, {"copying": _copied_whole})
        },
        axes=Axes("network, sorted by its change", "change / rounding bound", "y", 1.0),
    ),
    Claim(
        name="invariances.scale",
        statement="One ReLU layer: scaling z up and u down changes neither F nor the balanced J, which sees p |z| |u| "
        "only.",
        source="docs/theory.md, section 4.4; Bach 2017, section 2",
        statistic="largest change of the output or of the balanced value, in rounding bounds",
        threshold=1.0,
        derivation="running error bounds of both networks",
        limits="Positive homogeneity only: tanh and softplus have no such invariance, nor have deeper layers with a "
        "source penalty.",
        measure=lambda setting: _rescalings(setting, "relu"),
        controls={
            "tanh": lambda setting: _rescalings(setting, "tanh"),
            "softplus": lambda setting: _rescalings(setting, "softplus"),
        },
        axes=Axes("network, sorted by its change", "change / rounding bound", "y", 1.0),
    ),
)
