"""The convex programs that the benchmarks share: digits 3 against 5 and the frozen features of standard normal kernels.

3x3 kernels, padding 1, tanh, average readout, squared loss, source and input penalty 3e-4, readout penalty 3e-3,
uniform masses; kernels of both layers and the readout are standard normal draws from the seed.  With an amplitude bound
they are moved inside it and flow for a few steps: at random features the source penalty keeps amplitudes below it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

import meanfield as mf
from meanfield import data
from meanfield.bench.options import Settings
from meanfield.problem import project_bounds
from meanfield.starts import normal

FULL_SIDE = 8
FLOW_STEPS = 30  # of a case with a bound, which is then active on the features that hold the mass
PENALTY = mf.Penalty(source=3e-4, readout=3e-3, input=3e-4)


@dataclass(frozen=True)
class Case(Settings):
    """Size of a program: `images` digits of side x side pixels and the particles of the two layers.

    tightness: the amplitude bound, as a share of the largest amplitude of the random network; None: no bound.
    """

    images: int
    side: int
    widths: tuple[int, int]
    seed: int = 0
    tightness: float | None = None

    @property
    def name(self) -> str:
        bound = "" if self.tightness is None else f", amplitude bound {self.tightness:g}"
        return f"N={self.images}, {self.side}x{self.side}, widths {self.widths[0]}/{self.widths[1]}{bound}"

    @property
    def constraints(self) -> int:
        """Rows of the constraint A W_j = p_j g_j, per feature."""
        return self.images * self.side**2

    @property
    def columns(self) -> int:
        """Unknowns W_j of that constraint, per feature."""
        return 9 * self.widths[0]


TINY = Case(6, 4, (6, 4))
SMALL = Case(16, 4, (64, 32))
BOUNDED = replace(SMALL, tightness=0.3)
NEXT = Case(16, 4, (128, 64))
STANDARD = Case(32, 4, (128, 64))
LARGE = Case(64, 8, (1024, 128))


def program(case: Case) -> mf.ConvexProgram:
    """The convex program of a case, on the CPU."""
    return mf.ConvexProgram.freeze(*setting(case))


def setting(case: Case, dtype: torch.dtype = torch.float64) -> tuple[mf.Problem, mf.ParticleNetwork]:
    """The problem of a case and the network whose features are to be frozen, on the CPU."""
    layer = mf.Conv(3, padding=1, activation="tanh")
    architecture = mf.Architecture((1, case.side, case.side), (layer, layer), readout="average")
    inputs, targets = digits(case.images, case.side)
    problem = mf.Problem(architecture, inputs.to(dtype), targets.to(dtype), "squared", PENALTY)
    network = normal_network(architecture, case.widths, problem.inputs, case.seed)
    if case.tightness is not None:
        reached = float(network.amplitudes(1, PENALTY.norms(network.kernels[1])).max())
        bounded = replace(PENALTY, amplitude_bound=case.tightness * reached)
        problem = mf.Problem(architecture, problem.inputs, problem.targets, "squared", bounded)
        network = mf.solvers.flow.solve(problem, project_bounds(problem, network), steps=FLOW_STEPS).network
    return problem, network


def all_classes(name: str, images: int, width: int) -> tuple[mf.Problem, mf.ParticleNetwork]:
    """Images of all classes of a data set at full size, softmax, and a random network of two layers with 2x2 average
    pooling, on the CPU.
    """
    layer = mf.Conv(3, padding=1, activation="tanh", pooling="average")
    chosen = data.load(name, samples=images)
    architecture = mf.Architecture(chosen.input_shape, (layer, layer), outputs=chosen.outputs_for("softmax"))
    problem = mf.Problem(architecture, chosen.inputs, chosen.targets("softmax"), "softmax", PENALTY)
    return problem, normal_network(architecture, (width, width), problem.inputs, 0)


def normal_network(
    architecture: mf.Architecture, widths: tuple[int, int], like: Tensor, seed: int
) -> mf.ParticleNetwork:
    """Uniform masses, kernels and readout standard normal."""
    generator = torch.Generator().manual_seed(seed)
    masses = [like.new_full((width,), 1 / width) for width in widths]
    kernels = [normal(shape, generator, like) for shape in architecture.kernel_shapes(widths)]
    readout = normal(architecture.readout_shape(widths[-1]), generator, like)
    return mf.ParticleNetwork(architecture, masses, kernels, readout)


def digits(images: int, side: int) -> tuple[Tensor, Tensor]:
    """The first digits 3 and 5 and their labels -1, 1; pooled where `side` divides 8, else
    interpolated to side x side.
    """
    chosen = data.load("digits", classes=(3, 5), samples=images, pool=FULL_SIDE // side if FULL_SIDE % side == 0 else 1)
    inputs = chosen.inputs
    if inputs.shape[-1] != side:
        inputs = torch.nn.functional.interpolate(inputs, size=(side, side), mode="bilinear", align_corners=False)
    return inputs, chosen.targets("squared")
