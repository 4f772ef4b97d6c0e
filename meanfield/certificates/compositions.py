"""Features of the last layer with the kernels of all layers that realise them, many at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial, reduce
from math import prod

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from meanfield import limits, measures
from meanfield.architecture import Architecture, Conv
from meanfield.network import ParticleNetwork
from meanfield.penalties import input_norms
from meanfield.problem import GRAPH, Problem

LEAST_SHARE = 1e-6  # atoms lighter than this share of a feature's heaviest are left out


@dataclass(frozen=True, eq=False)
class Compositions:
    """R features of the last layer, each with the kernels of all layers that realise it.

    kernels[0] (R, m_1, C_0, kh, kw) first-layer kernels z; kernels[l] (R, m_{l+1}, m_l, kh, kw) flows a, m_L = 1;
    biases[l] (R, m_{l+1}) or None.
    """

    architecture: Architecture
    kernels: tuple[Tensor, ...]
    biases: tuple[Tensor | None, ...]

    def __len__(self) -> int:
        return len(self.kernels[0])

    def tensors(self) -> list[Tensor]:
        return [*self.kernels, *(b for b in self.biases if b is not None)]

    def __getitem__(self, chosen: Tensor | slice) -> Compositions:
        return replace(
            self,
            kernels=tuple(k[chosen] for k in self.kernels),
            biases=tuple(None if b is None else b[chosen] for b in self.biases),
        )

    def preactivations(self, inputs: Tensor) -> Tensor:
        """g of every feature, (N, R, H', W')."""
        arch = self.architecture
        first, bias = self.kernels[0].flatten(0, 1) / arch.input_shape[0], self.biases[0]
        g = arch.layers[0].convolve(inputs, first, None if bias is None else bias.flatten())
        for index in range(1, arch.depth):
            signal = arch.layers[index - 1].activate(g).unflatten(1, (len(self), -1))
            g = convolve_each(arch.layers[index], signal, self.kernels[index])
            bias = self.biases[index]
            g = (g if bias is None else g + bias[None, :, :, None, None]).flatten(1, 2)
        return g

    def responses(self, problem: Problem, output: Tensor) -> Tensor:
        """|q|^2 of every feature, (R,); in blocks of features and images, which a gradient computes anew."""
        groups = list(self.groups())
        return torch.cat([self[few]._responses(problem, output, len(groups) == 1) for few in groups])

    def _responses(self, problem: Problem, output: Tensor, whole: bool) -> Tensor:
        blocks, read = list(self.blocks(len(problem.inputs))), self._read
        whole = whole and len(blocks) == 1
        if torch.is_grad_enabled() and not whole:
            read = partial(checkpoint, self._read, use_reentrant=False, preserve_rng_state=False)
        q: Tensor = reduce(torch.add, (read(problem.inputs[block], output[block]) for block in blocks))
        return q.flatten(1).square().sum(1)

    def _read(self, inputs: Tensor, output: Tensor) -> Tensor:
        """What these images add to q, (R, K) or (R, K, positions)."""
        arch = self.architecture
        read = arch.readout_features(arch.layers[-1].activate(self.preactivations(inputs)))
        return torch.einsum("nk,nr...->rk...", output, read)

    def groups(self) -> Iterator[slice]:
        """The features in groups of which one image fits the memory of a block."""
        return limits.blocks(len(self), self._bytes)

    def blocks(self, count: int) -> Iterator[slice]:
        """The images in blocks that all features fit the memory of a block on."""
        return limits.blocks(count, max(1, len(self)) * self._bytes)

    @property
    def _bytes(self) -> int:
        """What a feature takes of an image, with its shifts and the graph of both."""
        widths, arch = [kernels.shape[1] for kernels in self.kernels], self.architecture
        layers = zip(widths[1:], arch.layers[1:], arch.geometry[1:])
        shifts = sum(width * conv.offsets * prod(size.input) for width, conv, size in layers)
        return self.kernels[0].element_size() * (arch.entries(widths, GRAPH) + 2 * GRAPH * shifts)

    def costs(self, problem: Problem, mu: Sequence[float | Tensor]) -> Tensor:
        """gamma_L of this realisation, (R,): no less than that of the feature."""
        penalty, norms = problem.penalty, self._input_norms()
        gamma = penalty.input * norms.square()
        for kernels, price in zip(self.kernels[1:], mu):
            tiny = torch.finfo(gamma.dtype).tiny  # the root has no gradient at zero
            prices = penalty.outer.price((price + gamma).clamp_min(tiny), penalty.source)
            gamma = (flows(problem, kernels) * prices[:, None]).sum(2)
        return gamma[:, 0]

    def _input_norms(self) -> Tensor:
        """|(z, b)| (R, m_1)."""
        bias = self.biases[0]
        return input_norms(self.kernels[0].flatten(0, 1), None if bias is None else bias.flatten()).view(
            self.kernels[0].shape[:2]
        )

    def projected(self, problem: Problem) -> Compositions:
        """Scaled down to the problem's bounds."""
        kernels, biases, penalty = list(self.kernels), list(self.biases), problem.penalty
        if penalty.input_bound is not None:
            shrink = (penalty.input_bound / self._input_norms()).clamp_max(1)
            kernels[0] = kernels[0] * shrink[:, :, None, None, None]
            biases[0] = None if biases[0] is None else biases[0] * shrink
        if penalty.amplitude_bound is not None:
            for index in range(1, len(kernels)):
                amounts = flows(problem, kernels[index]).sum(2)
                kernels[index] = (
                    kernels[index] * (penalty.amplitude_bound / amounts).clamp_max(1)[:, :, None, None, None]
                )
                bias = biases[index]
                biases[index] = None if bias is None else bias.clamp(-penalty.amplitude_bound, penalty.amplitude_bound)
        return replace(self, kernels=tuple(kernels), biases=tuple(biases))

    def network(self, problem: Problem) -> ParticleNetwork:
        """A network with these features in its last layer, uniform masses and no readout; atoms without flow are
        dropped.
        """
        pieces = [self._piece(problem, index) for index in range(len(self))]
        widths = [sum(each) for each in zip(*(piece[2] for piece in pieces))]
        masses = [problem.inputs.new_full((count,), 1 / count) for count in widths]
        kernels = [torch.cat([piece[0][0] for piece in pieces])]
        for layer in range(1, len(self.kernels)):
            blocks = [piece[0][layer] for piece in pieces]
            kernels.append(block_diagonal(blocks) * len(masses[layer - 1]))  # w = a / p of the source
        biases = [
            None if b is None else torch.cat([piece[1][layer] for piece in pieces])
            for layer, b in enumerate(self.biases)
        ]
        readout = problem.inputs.new_zeros(self.architecture.readout_shape(len(self)))
        return ParticleNetwork(self.architecture, masses, kernels, readout, biases)

    def _piece(self, problem: Problem, index: int) -> tuple[list[Tensor], list[Tensor], list[int]]:
        """Kernels, biases and widths of one feature without the sources that nothing flows out of."""
        kernels = [k[index] for k in self.kernels]
        biases = [kernels[0].new_zeros(0) if b is None else b[index] for b in self.biases]
        for layer in range(len(kernels) - 1, 0, -1):
            outflow = problem.penalty.norms(kernels[layer]).sum(0)
            keep = torch.nonzero(outflow >= LEAST_SHARE * outflow.max()).flatten()
            kernels[layer], kernels[layer - 1] = kernels[layer][:, keep], kernels[layer - 1][keep]
            biases[layer - 1] = biases[layer - 1][keep] if len(biases[layer - 1]) else biases[layer - 1]
        return kernels, biases, [len(k) for k in kernels]


def convolve_each(conv: Conv, signal: Tensor, kernels: Tensor) -> Tensor:
    """Every feature's own convolution, (N, R, m, H, W), (R, m', m, kh, kw) -> (N, R, m', H', W').

    One batched product over sources, then a sum of shifts: several times faster than a grouped convolution.
    """
    count, features, _, height, width = signal.shape
    weights = kernels.flatten(3).transpose(2, 3).flatten(1, 2)  # (R, m' S, m)
    moved = weights @ signal.transpose(0, 1).transpose(1, 2).flatten(2)  # (R, m' S, N H W)
    moved = moved.view(features, kernels.shape[1], conv.offsets, count, height, width)
    (up, left), (down, right) = conv.padding, conv.stride  # type: ignore[misc]
    moved = torch.nn.functional.pad(moved, (left, left, up, up))
    rows, columns = conv.sizes(height, width, where="the layer")[0]
    shifts = [
        moved[
            :,
            :,
            y * conv.kernel[1] + x,
            :,
            y : y + (rows - 1) * down + 1 : down,
            x : x + (columns - 1) * right + 1 : right,
        ]
        for y in range(conv.kernel[0])
        for x in range(conv.kernel[1])
    ]
    return torch.stack(shifts).sum(0).movedim(2, 0)


def flows(problem: Problem, kernels: Tensor) -> Tensor:
    """|a_ij| (R, targets, sources)."""
    return problem.penalty.norms(kernels.flatten(0, 1)).view(kernels.shape[:3])


def joined(parts: Sequence[Compositions]) -> tuple[tuple[Tensor, ...], tuple[Tensor | None, ...]]:
    kernels = tuple(torch.cat(each) for each in zip(*(part.kernels for part in parts)))
    biases = tuple(None if each[0] is None else torch.cat(each) for each in zip(*(part.biases for part in parts)))
    return kernels, biases


def with_tensors(like: Compositions, tensors: Sequence[Tensor]) -> Compositions:
    rest = list(tensors[len(like.kernels) :])
    return replace(
        like,
        kernels=tuple(tensors[: len(like.kernels)]),
        biases=tuple(None if b is None else rest.pop(0) for b in like.biases),
    )


def zeros_like(problem: Problem, number: int) -> Compositions:
    arch = problem.architecture
    kernels = tuple(problem.inputs.new_zeros(number, *shape) for shape in arch.kernel_shapes([1] * arch.depth))
    return Compositions(
        arch, kernels, tuple(k.new_zeros(k.shape[:2]) if layer.bias else None for layer, k in zip(arch.layers, kernels))
    )


def block_diagonal(blocks: Sequence[Tensor]) -> Tensor:
    """Kernels (targets, sources, kh, kw) on the diagonal of one."""
    rows, columns = sum(len(b) for b in blocks), sum(b.shape[1] for b in blocks)
    whole = blocks[0].new_zeros(rows, columns, *blocks[0].shape[2:])
    row = column = 0
    for block in blocks:
        whole[row : row + block.shape[0], column : column + block.shape[1]] = block
        row, column = row + block.shape[0], column + block.shape[1]
    return whole


@dataclass(frozen=True, eq=False)
class OwnFeatures:
    """The features of the last layer of a network that have mass, M of them, on ALL its particles.

    `Compositions` gives every feature sources of its own: M times the network.  Here all share them.
    """

    network: ParticleNetwork

    def responses(self, problem: Problem, output: Tensor) -> Tensor:
        """|q|^2 of every feature, (M,); in blocks of images."""
        inputs = problem.inputs
        each = inputs.element_size() * problem.architecture.entries(self.network.widths)
        parts = (self._read(inputs[block], output[block]) for block in limits.blocks(len(inputs), each))
        return reduce(torch.add, parts).flatten(1).square().sum(1)[self.network.masses[-1] > 0]

    def _read(self, inputs: Tensor, output: Tensor) -> Tensor:
        """What these images add to q, (M, K) or (M, K, positions)."""
        read = self.network.architecture.readout_features(self.network.responses(inputs).features[-1])
        return torch.einsum("nk,nj...->jk...", output, read)

    def costs(self, problem: Problem, mu: Sequence[float | Tensor]) -> Tensor:
        """gamma_L of these realisations, (M,): sums of the flow w p of every source at its price."""
        penalty, network = problem.penalty, self.network
        gamma = penalty.input * input_norms(network.kernels[0], network.biases[0]).square()
        for kernels, masses, price in zip(network.kernels[1:], network.masses, mu):
            gamma = penalty.norms(kernels) @ (masses * penalty.outer.price(price + gamma, penalty.source))
        return gamma[network.masses[-1] > 0]


def own_features(problem: Problem, network: ParticleNetwork, width: int) -> Compositions:
    """The network's features of the last layer, realised by its own particles, the `width` heaviest of each layer."""
    heavy = [p.argsort(descending=True)[:width] for p in network.masses[:-1]]
    heavy.append(torch.nonzero(network.masses[-1] > 0).flatten())
    few = measures.select(network, heavy)
    count = len(heavy[-1])
    kernels, biases = [], []
    for layer, (w, b) in enumerate(zip(few.kernels, few.biases)):
        last, first = layer == len(few.kernels) - 1, layer == 0
        flow = w if first else w * few.masses[layer - 1][None, :, None, None]
        padded = w.new_zeros(len(w) if last else width, w.shape[1] if first else width, *w.shape[2:])
        padded[: len(w), : w.shape[1]] = flow
        kernels.append(padded[:, None] if last else padded.expand(count, *padded.shape))
        if b is None:
            biases.append(None)
        else:
            wide = b.new_zeros(len(b) if last else width)
            wide[: len(b)] = b
            biases.append(wide[:, None] if last else wide.expand(count, -1))
    return Compositions(network.architecture, tuple(kernels), tuple(biases))
