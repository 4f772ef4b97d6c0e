"""Loss landscapes: planes through a network, surfaces with an error, sharpness, joins and trajectories."""

from meanfield.landscape.balance import balanced
from meanfield.landscape.directions import Plane, plane
from meanfield.landscape.join import Joined, join
from meanfield.landscape.planes import eigenplane, line, principal, triangle
from meanfield.landscape.sharpness import Sharpness, sharpness
from meanfield.landscape.surface import Surface, surface
from meanfield.landscape.trajectory import Trajectory, trajectory

__all__ = [
    "Joined",
    "Plane",
    "Sharpness",
    "Surface",
    "Trajectory",
    "balanced",
    "eigenplane",
    "join",
    "line",
    "plane",
    "principal",
    "sharpness",
    "surface",
    "trajectory",
    "triangle",
]
