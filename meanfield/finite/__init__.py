"""Networks of finite width as modules of torch: sampled from measures or trained from starts; their tangent kernel."""

from meanfield.finite import kernel
from meanfield.finite.feedback import fed_back, feedback_aligned
from meanfield.finite.fitting import Fitted, Score, Step, evaluate, fit
from meanfield.finite.network import FiniteCNN, sample, sequential
from meanfield.finite.plain import cnn, mlp
from meanfield.finite.recipes import AUTHORS_DROPOUT, L2_STRENGTHS, L12_STRENGTHS, Recipe, l12, regulariser
from meanfield.finite.replay import Replayed, replay
from meanfield.finite.scaling import Scaling
from meanfield.finite.training import Training, log_spaced_times, train
from meanfield.finite.vgg import residual, vgg

__all__ = [
    "AUTHORS_DROPOUT",
    "L2_STRENGTHS",
    "L12_STRENGTHS",
    "FiniteCNN",
    "Fitted",
    "Recipe",
    "Replayed",
    "Scaling",
    "Score",
    "Step",
    "Training",
    "cnn",
    "evaluate",
    "fed_back",
    "feedback_aligned",
    "fit",
    "kernel",
    "l12",
    "log_spaced_times",
    "mlp",
    "regulariser",
    "replay",
    "residual",
    "sample",
    "sequential",
    "train",
    "vgg",
]
