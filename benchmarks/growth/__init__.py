"""Measure how the splitting's time per iteration grows with particles, images and positions."""
