"""Measure what a point of a loss surface costs beside functional_call and the package loss-landscapes."""
