"""Loss landscapes: planes through a network, surfaces with an error, sharpness, joins and trajectories."""

from meanfield.landscape.directions import Plane, plane

__all__ = ["Plane", "plane"]
