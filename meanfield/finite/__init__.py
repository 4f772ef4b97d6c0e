from meanfield.finite.network import FiniteCNN, sample
from meanfield.finite.training import Training, train

__all__ = ["FiniteCNN", "Training", "sample", "train"]
