"""Measure what grafts on VGG-16 cost beside the matrix products that they need."""
