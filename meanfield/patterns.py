"""Activation patterns of ReLU features: all sign patterns of A z over kernels z, for kernels of two or three entries."""
