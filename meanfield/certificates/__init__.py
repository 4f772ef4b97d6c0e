"""Judges any answer from outside its solver, in float64.

duality: dual value, duality gap and violation of a point of the convex program, on its support.
search: lower bounds over all measures, features that no support holds yet included.
sphere: exact and rigorous maxima behind those bounds for one ReLU layer.
concave: the maximum of a concave function of one number.
"""

from meanfield.certificates.duality import Certificate, Multipliers, certify, dual_value, stationary_multipliers
from meanfield.certificates.search import UnseenFeatures, search_features

__all__ = [
    "Certificate",
    "Multipliers",
    "UnseenFeatures",
    "certify",
    "dual_value",
    "search_features",
    "stationary_multipliers",
]
