"""Image data sets, shipped inside packages or read from a user's .npz file, folder of images or CIFAR files."""

from meanfield.data.dataset import Dataset, load
from meanfield.data.readers import stamp
from meanfield.data.source import DataWarning

__all__ = ["DataWarning", "Dataset", "load", "stamp"]
