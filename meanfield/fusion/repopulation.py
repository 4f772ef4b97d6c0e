"""Which particles the convex program would keep: it gives the features that it can do without no mass."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from meanfield.convex.program import ConvexProgram
from meanfield.network import ParticleNetwork
from meanfield.penalties import Penalty
from meanfield.problem import Problem
from meanfield.solvers import splitting

GAP = 1e-3  # relative: masses are compared, not used
ITERATIONS = 2000


def masses(network: ParticleNetwork, images: Tensor, penalty: Penalty | None) -> tuple[Tensor, ...]:
    """The masses (M_l,), float64, of the network's frozen features where the convex program has its minimum, the
    network's own outputs on the images its targets (squared loss): repopulation (Fang et al. 2019, section 4) without
    labels.

    Mass is a price as well as a weight: with penalties on sources or inputs a feature that does nothing may hold some,
    so that others have less.  A warning where the program is not solved: the masses then say little.
    """
    # in float32 the rank of features that nearly depend on each other is not found, and some programs are not solved
    network, images = network.to(dtype=torch.float64), images.double()
    with torch.enable_grad():  # which the caller's no_grad would keep from the solver
        problem = Problem(network.architecture, images, network(images).detach(), "squared", penalty)
        solution = splitting.solve(ConvexProgram.freeze(problem, network), GAP, max_iterations=ITERATIONS)
    if solution.status != "optimal":
        warnings.warn(f"particles are kept by masses of a program that is not solved: {solution.message}", stacklevel=2)
    return solution.point.masses
