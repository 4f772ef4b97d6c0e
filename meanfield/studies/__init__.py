"""Studies: each module is one question about the theory, asked with numbers."""

from meanfield.studies import convexity, coordinates, trajectories, widths

__all__ = ["convexity", "coordinates", "trajectories", "widths"]
