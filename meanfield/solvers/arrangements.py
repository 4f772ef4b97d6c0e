"""The exact optimum of one ReLU layer as a finite cone program over activation patterns."""

import cvxpy as cp  # noqa: F401
