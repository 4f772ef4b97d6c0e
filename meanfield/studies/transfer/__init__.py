"""Measure what of a training survives another start, a fusion, and another task."""
