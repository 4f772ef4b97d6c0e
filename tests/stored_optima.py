"""Problems whose optimum is known: those of tests/data, from an independently written cvxpy formulation (README.md),
and one ReLU layer, whose optimum over all measures is a finite cone program over 174 activation patterns.
"""

import json
from pathlib import Path

import numpy as np
import torch

import meanfield as mf

DATA = Path(__file__).parent / "data"
TRUTH = {"relu_squared": (0.4602987431011591, 1e-6), "tanh_softmax_l1": (1.08029868, 5e-6)}
EXACT_ONE_LAYER = 0.32012158137


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


def one_layer_problem():
    digits = mf.data.load("digits", classes=(3, 5), samples=12, pool=2)
    arch = mf.Architecture(digits.input_shape, (mf.Conv((1, 2), activation="relu"),))
    return mf.Problem(arch, digits.inputs, digits.targets("squared"), penalty=mf.Penalty(input=2e-3, readout=2e-3))
