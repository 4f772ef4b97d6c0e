"""Neural network grafting (Gu et al. 2020): exact connecting layers, transport between features, for any
torch.nn.Module.
"""

from meanfield.grafting.errors import layer_errors
from meanfield.grafting.graft import METHODS, Graft, Grafted, Junction, graft

__all__ = ["METHODS", "Graft", "Grafted", "Junction", "graft", "layer_errors"]
