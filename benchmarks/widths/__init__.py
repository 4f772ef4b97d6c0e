"""Measure what a training step costs beside plain torch, and a sweep beside its cells."""
