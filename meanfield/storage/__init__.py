"""Files that are whole or not at all: `files` one by one, `tensors` and `networks` with their checksums, `results` a
folder at a time, `locks` one command to a folder.
"""

from meanfield.storage.files import to_json, write_atomically
from meanfield.storage.networks import load_network, save_network
from meanfield.storage.tensors import TENSORS, load_tensors, save_tensors

__all__ = ["TENSORS", "load_network", "load_tensors", "save_network", "save_tensors", "to_json", "write_atomically"]
