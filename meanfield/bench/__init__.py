"""What every study stands on: sweeps of cells, tasks and classifiers in plain values, distances,
rates; knows no study.
"""
