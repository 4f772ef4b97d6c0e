"""The convex world: populations of frozen features, their program, its constraints and the way there and back."""

from meanfield.convex.program import ConvexProgram
from meanfield.convex.repopulation import ProgramPoint

__all__ = ["ConvexProgram", "ProgramPoint"]
