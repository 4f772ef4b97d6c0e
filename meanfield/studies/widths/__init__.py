"""Measure how finite networks approach the continuous one."""
