"""Trained networks made one: matched and averaged, side by side, and reduced to fewer channels without labels."""

from meanfield.fusion.channels import Channels
from meanfield.fusion.fuse import METHODS, fuse
from meanfield.fusion.matching import matched
from meanfield.fusion.reduction import reduce
from meanfield.fusion.union import Ensemble

__all__ = ["METHODS", "Channels", "Ensemble", "fuse", "matched", "reduce"]
