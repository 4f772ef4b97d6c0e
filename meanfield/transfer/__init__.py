"""What of a training survives another beginning: displacements, the law of a start, a prediction that draws none."""

from meanfield.transfer.displacement import Displacement, Norm
from meanfield.transfer.prediction import Moments, moments, predict
from meanfield.transfer.start_law import StartLaw

__all__ = ["Displacement", "Moments", "Norm", "StartLaw", "moments", "predict"]
