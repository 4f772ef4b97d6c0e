"""Neural feature repopulation: network <-> variables of the convex program, exact both ways.

Fang et al. 2019, section 4; Gu et al. 2020, section 4: populations p, kernels W_ij = w_ij p_i p_j, readout
U_j = u_j p_j and biases B_j = b_j p_j of layers >= 2.  Where masses are positive `to_network` inverts `to_program`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from meanfield.network import ParticleNetwork, along_axis
from meanfield.validation import instance


@dataclass(frozen=True, eq=False)
class ProgramPoint:
    """A point of the convex program.  kernels[0] belongs to layer 2: the first layer's kernels are frozen features.

    masses[l] (M_l,), kernels[l-1] (M_l, M_{l-1}, kh, kw) for l = 1..L-1 counted from 0, readout as in
    `ParticleNetwork`, biases[l-1] (M_l,) or None.
    """

    masses: tuple[Tensor, ...]
    kernels: tuple[Tensor, ...]
    readout: Tensor
    biases: tuple[Tensor | None, ...]

    def __post_init__(self) -> None:
        instance(self.readout, "readout", Tensor)
        for name, tensors in (("masses", self.masses), ("kernels", self.kernels), ("biases", self.biases)):
            for index, tensor in enumerate(instance(tensors, name, Sequence)):
                instance(tensor, f"{name}[{index}]", (Tensor, type(None)) if name == "biases" else Tensor)

    def __repr__(self) -> str:
        return f"ProgramPoint(widths={tuple(len(p) for p in self.masses)}, dtype={self.readout.dtype})"

    def map(self, function: Callable[[Tensor], Tensor]) -> ProgramPoint:
        """The point with `function` applied to every tensor."""
        return ProgramPoint(
            tuple(map(function, self.masses)),
            tuple(map(function, self.kernels)),
            function(self.readout),
            tuple(None if b is None else function(b) for b in self.biases),
        )

    def tensors(self) -> list[Tensor]:
        """Every variable: masses, kernels, readout, biases."""
        return [*self.masses, *self.kernels, self.readout, *(b for b in self.biases if b is not None)]

    def vector(self) -> Tensor:
        """All variables as one vector (d,), in the order of `tensors`."""
        return torch.cat([tensor.flatten() for tensor in self.tensors()])

    def at(self, vector: Tensor) -> ProgramPoint:
        """The point of the same shapes whose variables are those of `vector`."""
        own = self.tensors()
        parts = [
            part.reshape(tensor.shape) for part, tensor in zip(vector.split([tensor.numel() for tensor in own]), own)
        ]
        layers, inner = len(self.masses), len(self.kernels)
        rest = parts[layers + inner + 1 :]
        biases = tuple(None if b is None else rest.pop(0) for b in self.biases)
        return ProgramPoint(tuple(parts[:layers]), tuple(parts[layers : layers + inner]), parts[layers + inner], biases)

    def combine(self, other: ProgramPoint, t: float) -> ProgramPoint:
        """(1 - t) self + t other: the straight line along which the program is convex."""
        mix = lambda a, b: (1 - t) * a + t * b  # noqa: E731
        return ProgramPoint(
            tuple(map(mix, self.masses, other.masses)),
            tuple(map(mix, self.kernels, other.kernels)),
            mix(self.readout, other.readout),
            tuple(None if a is None or b is None else mix(a, b) for a, b in zip(self.biases, other.biases)),
        )


def to_program(network: ParticleNetwork) -> ProgramPoint:
    """The program variables of a network: the same value, the same features (exact)."""
    p = network.masses
    kernels = tuple(
        w * target[:, None, None, None] * source[None, :, None, None]
        for w, target, source in zip(network.kernels[1:], p[1:], p[:-1])
    )
    biases = tuple(None if b is None else b * target for b, target in zip(network.biases[1:], p[1:]))
    return ProgramPoint(p, kernels, network.readout * along_axis(p[-1], network.readout, 1), biases)


def to_network(point: ProgramPoint, frozen: ParticleNetwork) -> ParticleNetwork:
    """The network of a point, over the particles of positive mass; first-layer kernels come from the frozen network."""
    keep = [torch.nonzero(p > 0).flatten() for p in point.masses]
    p = [masses[k] / masses[k].sum() for masses, k in zip(point.masses, keep)]
    kernels = [frozen.kernels[0][keep[0]]]
    for W, target, source, rows, columns in zip(point.kernels, p[1:], p[:-1], keep[1:], keep[:-1]):
        kernels.append(W[rows][:, columns] / (target[:, None, None, None] * source[None, :, None, None]))
    biases = [None if frozen.biases[0] is None else frozen.biases[0][keep[0]]]
    biases += [None if b is None else b[rows] / target for b, target, rows in zip(point.biases, p[1:], keep[1:])]
    readout = point.readout[:, keep[-1]] / along_axis(p[-1], point.readout, 1)
    return ParticleNetwork(frozen.architecture, p, kernels, readout, biases)


def joined(kernels: Tensor, bias: Tensor | None) -> Tensor:
    """(W_j, B_j) as rows (M_l, columns): the kernels source by source, then the bias."""
    rows = kernels.flatten(1)
    return rows if bias is None else torch.cat([rows, bias[:, None]], 1)


def parted(rows: Tensor, shape: torch.Size) -> tuple[Tensor, Tensor | None]:
    """Kernels of the given shape and bias of rows (M_l, columns): what `joined` joined."""
    size = shape[1:].numel()
    return rows[:, :size].reshape(shape), rows[:, -1] if rows.shape[1] > size else None
