"""Loss landscapes: planes through a network, surfaces with an error, sharpness, joins and trajectories."""

from meanfield.landscape.balance import balanced
from meanfield.landscape.directions import Plane, plane
from meanfield.landscape.planes import line, principal, triangle
from meanfield.landscape.sharpness import Sharpness, sharpness
from meanfield.landscape.surface import Surface, surface

__all__ = [
    "Plane",
    "Sharpness",
    "Surface",
    "balanced",
    "line",
    "plane",
    "principal",
    "sharpness",
    "surface",
    "triangle",
]
