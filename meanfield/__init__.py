from meanfield import certificates, losses, measures, penalties, solvers
from meanfield.architecture import Architecture, Conv
from meanfield.network import ParticleNetwork
from meanfield.penalties import Penalty
from meanfield.problem import Problem
from meanfield.program import ConvexProgram
