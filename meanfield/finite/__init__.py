from meanfield.finite import kernel
from meanfield.finite.network import FiniteCNN, sample
from meanfield.finite.training import Training, log_spaced_times, train

__all__ = ["FiniteCNN", "Training", "kernel", "log_spaced_times", "sample", "train"]
