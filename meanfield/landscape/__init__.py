"""Loss landscapes: planes through a network, surfaces with an error, sharpness, joins and trajectories."""

from meanfield.landscape.directions import Plane, plane
from meanfield.landscape.sharpness import Sharpness, sharpness

__all__ = ["Plane", "Sharpness", "plane", "sharpness"]
