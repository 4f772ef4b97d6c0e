"""Solvers: each takes a network or a program and returns a Solution."""
