"""Particle measures: split, merge, mixture, selection and extension of particles."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from meanfield import validation
from meanfield.network import MASS_TOLERANCE, ParticleNetwork, along_axis
from meanfield.penalties import input_norms
from meanfield.signatures import Natural, Nonnegative, Positive, checked
from meanfield.starts import normal
from meanfield.validation import Misuse


@checked
def select(network: ParticleNetwork, keep: Sequence[Tensor]) -> ParticleNetwork:
    """The particles with the given indices, layer by layer; masses are taken as they are, not renormalised."""
    _check_indices(network, keep, "keep")
    masses = [p[k] for p, k in zip(network.masses, keep)]
    kernels = [network.kernels[0][keep[0]]]
    kernels += [w[k][:, s] for w, k, s in zip(network.kernels[1:], keep[1:], keep[:-1])]
    biases = [None if b is None else b[k] for b, k in zip(network.biases, keep)]
    return ParticleNetwork.unchecked(network.architecture, masses, kernels, network.readout[:, keep[-1]], biases)


@checked
def permute(network: ParticleNetwork, orders: Sequence[Tensor]) -> ParticleNetwork:
    """The same measures with their particles listed in another order."""
    _check_indices(network, orders, "orders")
    return select(network, orders)


@checked
def drop_massless(network: ParticleNetwork) -> ParticleNetwork:
    """Without the particles of zero mass, which carry no flow: output and value stay."""
    return select(network, [torch.nonzero(p > 0).flatten() for p in network.masses])


@checked
def split(network: ParticleNetwork, layer: Natural, particle: Natural, shares: Tensor) -> ParticleNetwork:
    """Replace one particle by clones with the given shares of its mass (positive, summing to one)."""
    validation.finite(shares, "shares")
    if shares.ndim != 1 or bool((shares <= 0).any()) or abs(float(shares.sum()) - 1) > MASS_TOLERANCE[network.dtype]:
        raise Misuse("shares", shares.tolist(), "must be positive and sum to 1")
    _check_particle(network, layer, particle)
    shares = shares.to(network.readout)
    keep = [torch.arange(width, device=network.device) for width in network.widths]
    clones = torch.full((len(shares),), particle, device=network.device)
    keep[layer] = torch.cat([keep[layer][:particle], clones, keep[layer][particle + 1 :]])
    cloned = select(network, keep)
    masses = list(cloned.masses)
    masses[layer] = masses[layer].clone()
    masses[layer][particle : particle + len(shares)] *= shares
    return ParticleNetwork(network.architecture, masses, cloned.kernels, cloned.readout, cloned.biases)


@checked
def merge(network: ParticleNetwork, layer: Natural, particles: Sequence[int]) -> ParticleNetwork:
    """Replace particles by one: their masses add up; kernels and readout are mass averages.

    For equal particles (clones) neither the output nor the value changes.  Outgoing kernels of clones may differ: only
    their mass average acts.
    """
    if not isinstance(particles, Sequence) or len(particles) < 2 or len(set(particles)) < len(particles):
        raise Misuse("particles", particles, "must name at least two different particles, each once")
    for particle in particles:
        _check_particle(network, layer, validation.integer(particle, "particles", 0))
    chosen = torch.as_tensor(list(particles), device=network.device)
    shares = network.masses[layer][chosen]
    if float(shares.sum()) <= 0:
        raise Misuse("particles", list(particles), "have no mass to merge")
    shares = shares / shares.sum()
    average = torch.eye(network.widths[layer], dtype=network.dtype, device=network.device)
    average[chosen[0]] = 0
    average[chosen[0], chosen] = shares
    kernels, biases, readout = list(network.kernels), list(network.biases), network.readout
    kernels[layer] = torch.einsum("ab,bchw->achw", average, kernels[layer])
    bias = biases[layer]
    biases[layer] = None if bias is None else average @ bias
    if layer + 1 < network.architecture.depth:
        kernels[layer + 1] = torch.einsum("ab,cbhw->cahw", average, kernels[layer + 1])
    else:
        readout = torch.einsum("ab,kb...->ka...", average, readout)
    masses = list(network.masses)
    masses[layer] = masses[layer].clone()
    masses[layer][chosen[0]] = network.masses[layer][chosen].sum()
    merged = ParticleNetwork.unchecked(network.architecture, masses, kernels, readout, biases)
    keep = [torch.arange(width, device=network.device) for width in network.widths]
    keep[layer] = keep[layer][~torch.isin(keep[layer], chosen[1:])]
    return select(merged, keep)


def _check_indices(network: ParticleNetwork, chosen: Sequence[Tensor], argument: str) -> None:
    depth = network.architecture.depth
    listed = isinstance(chosen, Sequence) and all(isinstance(each, Tensor) for each in chosen)
    if not listed or len(chosen) != depth:
        raise TypeError(f"{argument} must be a sequence of {depth} tensors, the indices of every layer's particles")


def _check_particle(network: ParticleNetwork, layer: int, particle: int) -> None:
    if not 0 <= layer < network.architecture.depth or not 0 <= particle < network.widths[layer]:
        raise ValueError(f"layer={layer}, particle={particle} is not a particle of widths {network.widths}")


def _check_alike(first: ParticleNetwork, second: ParticleNetwork, arguments: str = "first and second") -> None:
    if first.architecture != second.architecture:
        raise ValueError(f"{arguments} must have the same architecture")
    if (first.dtype, first.device) != (second.dtype, second.device):
        raise ValueError(
            f"{arguments} are {first.dtype} on {first.device} and {second.dtype} on {second.device}; convert one with "
            ".to(...)"
        )


@checked
def mixture(first: ParticleNetwork, second: ParticleNetwork, t: float) -> ParticleNetwork:
    """(1 - t) first + t second, 0 < t < 1: the straight line of the convex program between two networks of any widths.

    The union of the particles with masses (1-t) p_A and t p_B and block-diagonal kernels w_A/(1-t), w_B/t has the
    output (1-t) F_A + t F_B and a value J <= (1-t) J_A + t J_B.
    """
    if not 0 < t < 1:
        raise Misuse("t", t, "must lie strictly between 0 and 1")
    _check_alike(first, second)
    masses = [torch.cat([(1 - t) * a, t * b]) for a, b in zip(first.masses, second.masses)]
    kernels = [torch.cat([first.kernels[0], second.kernels[0]])]
    for a, b in zip(first.kernels[1:], second.kernels[1:]):
        upper = torch.cat([a / (1 - t), a.new_zeros(a.shape[0], b.shape[1], *a.shape[2:])], 1)
        lower = torch.cat([b.new_zeros(b.shape[0], a.shape[1], *b.shape[2:]), b / t], 1)
        kernels.append(torch.cat([upper, lower]))
    biases = [None if a is None or b is None else torch.cat([a, b]) for a, b in zip(first.biases, second.biases)]
    readout = torch.cat([first.readout, second.readout], 1)
    return ParticleNetwork(first.architecture, masses, kernels, readout, biases)


@checked
def balance(network: ParticleNetwork, input_strength: Positive, readout_strength: Positive) -> ParticleNetwork:
    """The same output at the least lambda_1 int |(z, b)|^2 + lambda_u int |u|^2, for one positively homogeneous layer.

    A particle matters by t = p |(z, b)| |u| only.  With T = sum t the least is 2 sqrt(lambda_1 lambda_u) T, at masses
    t / T and squared norms sqrt(lambda_u / lambda_1) T and sqrt(lambda_1 / lambda_u) T (section 4 of Bach, JMLR 2017).
    Particles without response are dropped; a network without any is returned as it is.
    """
    if network.architecture.depth > 1:
        raise ValueError(f"network has {network.architecture.depth} layers; only one layer can be balanced")
    norms, sizes = (
        input_norms(network.kernels[0], network.biases[0]),
        network.readout.movedim(1, 0).flatten(1).norm(dim=1),
    )
    amounts = network.masses[0] * norms * sizes
    if not bool((amounts > 0).any()):
        return network
    live = select(network, [torch.nonzero(amounts > 0).flatten()])
    norms, sizes, amounts = (each[amounts > 0] for each in (norms, sizes, amounts))
    total, ratio = amounts.sum(), (readout_strength / input_strength) ** 0.25
    masses, stretch, squeeze = amounts / total, ratio * total.sqrt() / norms, total.sqrt() / ratio / sizes
    bias, readout = live.biases[0], live.readout * along_axis(squeeze, live.readout, 1)
    kernels = live.kernels[0] * stretch[:, None, None, None]
    return ParticleNetwork(
        network.architecture, [masses / masses.sum()], [kernels], readout, [None if bias is None else bias * stretch]
    )


@checked
def adjoin(network: ParticleNetwork, others: ParticleNetwork) -> ParticleNetwork:
    """The network with the particles of `others` beside its own at zero mass: the end t = 0 of their `mixture`.

    Output and value stay.  Zero mass carries no flow, so that what the others are is for a program to remember.
    """
    _check_alike(network, others, "network and others")
    union = mixture(network, others, 0.5)
    masses = [torch.cat([p, torch.zeros_like(q)]) for p, q in zip(network.masses, others.masses)]
    kernels = [union.kernels[0], *(w / 2 for w in union.kernels[1:])]
    return ParticleNetwork(network.architecture, masses, kernels, union.readout, union.biases)


@checked
def interpolate(first: ParticleNetwork, second: ParticleNetwork, t: float) -> ParticleNetwork:
    """The straight line in weights between two networks of equal widths: what the theory does NOT make convex."""
    _check_alike(first, second)
    if first.widths != second.widths:
        raise ValueError(
            f"widths differ, {first.widths} and {second.widths}: weights can only be averaged at equal widths"
        )
    blend = [a + t * (b - a) for a, b in zip(first.tensors(), second.tensors())]
    return with_tensors(first, blend)


@checked
def with_tensors(network: ParticleNetwork, tensors: Sequence[Tensor]) -> ParticleNetwork:
    """The network with its tensors replaced, in the order of `ParticleNetwork.tensors`."""
    depth, remaining = network.architecture.depth, list(tensors)
    masses, kernels, readout, rest = (
        remaining[:depth],
        remaining[depth : 2 * depth],
        remaining[2 * depth],
        remaining[2 * depth + 1 :],
    )
    biases = [None if bias is None else rest.pop(0) for bias in network.biases]
    return ParticleNetwork.unchecked(network.architecture, masses, kernels, readout, biases)


@checked
def extend(
    network: ParticleNetwork, copies: Sequence[int], noise: Nonnegative, generator: torch.Generator
) -> ParticleNetwork:
    """Add, at zero mass, perturbed clones of the heaviest particles: copies[l] of them in layer l.

    A clone's incoming kernel (and bias) is its parent's plus Gaussian noise of `noise` times the parent's root mean
    square.  Zero mass leaves output and value as they are; the clones are candidates for the next convex program.
    """
    keep, fresh = [], []
    for masses, count in zip(network.masses, validation.widths(copies, network.architecture.depth, "copies", 0)):
        heavy = masses.argsort(descending=True)[: min(count, int((masses > 0).sum()))]
        keep.append(torch.cat([torch.arange(len(masses), device=network.device), heavy]))
        fresh.append(torch.arange(len(masses), len(masses) + len(heavy), device=network.device))
    grown = select(network, keep)
    masses = [p.index_fill(0, new, 0.0) for p, new in zip(grown.masses, fresh)]
    kernels = [_perturb(w, new, noise, generator) for w, new in zip(grown.kernels, fresh)]
    biases = [None if b is None else _perturb(b, new, noise, generator) for b, new in zip(grown.biases, fresh)]
    return ParticleNetwork.unchecked(network.architecture, masses, kernels, grown.readout, biases)


def _perturb(tensor: Tensor, rows: Tensor, noise: float, generator: torch.Generator) -> Tensor:
    chosen = tensor[rows]
    scale = noise * chosen.flatten(1).square().mean(1).sqrt() if tensor.ndim > 1 else noise * chosen.abs()
    draw = normal(chosen.shape, generator, tensor)
    return tensor.index_copy(0, rows, chosen + draw * along_axis(scale, tensor, 0))
