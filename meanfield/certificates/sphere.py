"""Maxima of ReLU responses over the unit sphere of kernels: exact for two or three entries, bounded for more."""
