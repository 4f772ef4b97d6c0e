"""Studies: each module is one question about the theory, asked with numbers."""

from meanfield.studies import convexity

__all__ = ["convexity"]
