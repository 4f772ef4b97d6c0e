"""Running error bounds: how far float arithmetic can move what a network computes (Higham 2002, section 3.3).

A claim that something is exact or non-negative is tested against these, not against a tolerance somebody liked.
"""

from __future__ import annotations

import torch
from torch import Tensor

from meanfield.network import ParticleNetwork
from meanfield.problem import Problem

# Lipschitz constants of the activations
EXTRA = 8  # roundings outside the sums: products of masses, activation, pooling


def in_units(difference: Tensor, allowed: Tensor) -> float:
    """The largest |difference| in units of what is allowed, 0 where nothing differs: a layer may see padding alone."""
    return float(torch.where(difference == 0, 0.0, difference.abs() / allowed).max())


def output_error(network: ParticleNetwork, inputs: Tensor) -> Tensor:
    """Bound of |computed F - F| in every entry (N, K), first order in eps."""
    eps = torch.finfo(inputs.dtype).eps
    responses = network.responses(inputs)
    channels = inputs.shape[1]
    scales = (inputs.new_full((channels,), 1 / channels), *network.masses[:-1])
    signals = [inputs, *responses.features]
    error = torch.zeros_like(inputs)
    for layer, kernel, bias, scale, signal in zip(
        network.architecture.layers, network.kernels, network.biases, scales, signals
    ):
        terms = kernel.shape[1] * layer.offsets + EXTRA
        weights = (kernel * scale[None, :, None, None]).abs()
        moved = layer.convolve(error + terms * eps * signal.abs(), weights, None if bias is None else eps * bias.abs())
        steepest = layer.h.derivative_bound
        if steepest is None:
            raise ValueError(f"no bound of the derivative of {layer.h.name} is declared, and none of its rounding")
        error = _spread(layer, steepest * moved)
    last = signals[-1]
    terms = network.readout.shape[1] * last[0, 0].numel() + EXTRA
    absolute = network.map(torch.abs)
    return absolute.read(error + terms * eps * last.abs())


def _spread(layer, error: Tensor) -> Tensor:
    """The error of a pooled feature: at most the largest in its window, plus the rounding of a mean."""
    if layer.pooling == "none":
        return error
    return torch.nn.functional.max_pool2d(error, layer.pool_size)


def value_error(problem: Problem, network: ParticleNetwork) -> float:
    """Bound of |computed J - J|: through F, and from the sums of the non-negative penalties."""
    eps = torch.finfo(problem.inputs.dtype).eps
    loss = loss_change(problem, network.responses(problem.inputs).output, output_error(network, problem.inputs))
    terms = sum(tensor.numel() for tensor in network.tensors()) + len(problem.inputs)
    return loss + (terms + EXTRA) * eps * float(problem.terms(network).total())


def loss_change(problem: Problem, output: Tensor, error: Tensor) -> float:
    """Bound of how far the mean loss moves where outputs (N, K) move by at most `error` (N, K)."""
    steepest = problem.loss.gradient(output, problem.targets).abs()
    return float((error * (steepest + error)).sum(1).mean())  # the curvature of every loss is at most 1


def loss_error(problem: Problem, output: Tensor) -> float:
    """Bound of the rounding of the mean loss at given outputs (N, K): of sums, and of exponents and logarithms."""
    eps, loss = torch.finfo(output.dtype).eps, problem.loss.value(output, problem.targets)
    return eps * float((output.numel() + EXTRA) * loss.abs().mean() + EXTRA * output.abs().amax(1).mean())
