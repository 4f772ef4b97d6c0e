"""Kernels of the first layer and what they see, as vectors with their bias; weights of positions in the readout."""

from __future__ import annotations

import torch
from torch import Tensor

from meanfield.architecture import Architecture
from meanfield.network import ParticleNetwork
from meanfield.problem import Problem


def patches(problem: Problem) -> Tensor:
    """<z, patch> is the preactivation of a kernel: (N, P_1, d), divided by the channels, with 1 for a bias."""
    conv = problem.architecture.layers[0]
    found = conv.patches(problem.inputs) / problem.architecture.input_shape[0]
    return torch.cat([found, torch.ones_like(found[..., :1])], 2) if conv.bias else found


def kernels(network: ParticleNetwork) -> Tensor:
    """Those of the first layer, with their biases, (M, d)."""
    own, bias = network.kernels[0].flatten(1), network.biases[0]
    return own if bias is None else torch.cat([own, bias[:, None]], 1)


def position_weights(arch: Architecture) -> Tensor:
    """Weight of every position of the last layer before pooling in the average readout, (P,)."""
    features = torch.zeros(1, 1, *arch.geometry[-1].output, dtype=torch.float64, requires_grad=True)
    pooled = arch.layers[-1].pool(features)
    return torch.autograd.grad(arch.readout_features(pooled).sum(), features)[0].flatten()
