"""Loss landscapes: planes through a network, surfaces with an error, sharpness, joins and trajectories."""

from meanfield.landscape.balance import balanced
from meanfield.landscape.directions import Plane, plane
from meanfield.landscape.planes import line, principal, triangle

__all__ = ["Plane", "balanced", "line", "plane", "principal", "triangle"]
