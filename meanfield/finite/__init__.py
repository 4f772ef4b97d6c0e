from meanfield.finite import kernel
from meanfield.finite.fitting import Fitted, Score, evaluate, fit
from meanfield.finite.network import FiniteCNN, sample, sequential
from meanfield.finite.plain import cnn, mlp
from meanfield.finite.recipes import AUTHORS_DROPOUT, L2_STRENGTHS, L12_STRENGTHS, Recipe, l12, regulariser
from meanfield.finite.training import Training, log_spaced_times, train
from meanfield.finite.vgg import residual, vgg

__all__ = [
    "AUTHORS_DROPOUT",
    "L2_STRENGTHS",
    "L12_STRENGTHS",
    "FiniteCNN",
    "Fitted",
    "Recipe",
    "Score",
    "Training",
    "cnn",
    "evaluate",
    "fit",
    "kernel",
    "l12",
    "log_spaced_times",
    "mlp",
    "regulariser",
    "residual",
    "sample",
    "sequential",
    "train",
    "vgg",
]
