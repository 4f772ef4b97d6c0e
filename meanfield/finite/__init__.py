from meanfield.finite.network import FiniteCNN, sample

__all__ = ["FiniteCNN", "sample"]
