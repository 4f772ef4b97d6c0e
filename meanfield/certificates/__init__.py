"""Judges any answer from outside its solver, in float64.

duality: dual value, duality gap and violation of a point of the convex program, on its support.
search: lower bounds over all measures, features that no support holds yet included.
proving: lower bounds over all measures that are proven, for one_layer of ReLU or two_layers of tanh and its like.
sphere: exact and rigorous maxima behind those bounds for one ReLU layer.
concave: the maximum of a concave function of one number.
"""

from meanfield.certificates.duality import Certificate, Multipliers, certify, dual_value, stationary_multipliers
from meanfield.certificates.proof import ProvenBound
from meanfield.certificates.proving import no_method, prove
from meanfield.certificates.search import UnseenFeatures, search_features

__all__ = [
    "Certificate",
    "Multipliers",
    "ProvenBound",
    "UnseenFeatures",
    "certify",
    "dual_value",
    "no_method",
    "prove",
    "search_features",
    "stationary_multipliers",
]
