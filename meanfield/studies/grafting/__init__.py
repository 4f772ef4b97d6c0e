"""Measure whether networks from different starts learn the same features."""

COMMAND = "graft"
