"""Problems of tests/data with the optima that an independently written cvxpy formulation has (README.md)."""

import json
from pathlib import Path

import numpy as np
import torch

import meanfield as mf

DATA = Path(__file__).parent / "data"
TRUTH = {"relu_squared": (0.4602987431011591, 1e-6), "tanh_softmax_l1": (1.08029868, 5e-6)}


def stored_case(name):
    """The network, its problem and the stored settings."""
    arrays, settings_ = np.load(DATA / f"{name}.npz"), json.loads((DATA / f"{name}.json").read_text())
    tensors = {key: torch.as_tensor(arrays[key]) for key in arrays.files}
    depth = sum(key.startswith("kernel") for key in tensors)
    kernels = [tensors[f"kernel{layer}"] for layer in range(depth)]
    layers = tuple(
        mf.Conv(tuple(w.shape[2:]), settings_["padding"], stride, settings_["activation"])
        for w, stride in zip(kernels, settings_["strides"])
    )
    arch = mf.Architecture(tuple(arrays["inputs"].shape[1:]), layers, settings_["readout"], settings_["K"])
    penalty = mf.Penalty(
        source=settings_["lam_source"],
        readout=settings_["lam_readout"],
        input=settings_["lam_input"],
        kernel_norm=settings_["kernel_norm"],
        amplitude_bound=settings_["bound"],
    )
    network = mf.ParticleNetwork(arch, [tensors[f"mass{layer}"] for layer in range(depth)], kernels, tensors["readout"])
    return mf.Problem(arch, tensors["inputs"], tensors["targets"], settings_["loss"], penalty), network, settings_
