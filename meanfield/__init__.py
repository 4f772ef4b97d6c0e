"""Continuous-limit convolutional networks: particle measures, their convex program, certified optima."""

from meanfield import certificates, data, finite, measures, solvers
from meanfield.architecture import Architecture, Conv
from meanfield.main_job import solve
from meanfield.network import ParticleNetwork
from meanfield.penalties import Penalty
from meanfield.problem import Problem
from meanfield.program import ConvexProgram
from meanfield.repopulation import ProgramPoint
from meanfield.solution import Solution

__version__ = "0.1.0"

__all__ = [
    "Architecture",
    "Conv",
    "ConvexProgram",
    "ParticleNetwork",
    "Penalty",
    "Problem",
    "ProgramPoint",
    "Solution",
    "certificates",
    "data",
    "finite",
    "measures",
    "solve",
    "solvers",
]
