"""The metric of the flow on the parameters of a ParticleNetwork (section 12 of the theory)."""

from __future__ import annotations

from meanfield.network import ParticleNetwork, along_axis
from meanfield.subject import Parameters
from meanfield.validation import Misuse


def inverse_root(network: ParticleNetwork) -> Parameters:
    """G^{-1/2}, an entry per parameter: p_i^{-1/2} for kernels of layer 1 and biases, (p_i p_j)^{-1/2} for kernels of
    later layers, p_j^{-1/2} for the readout.  Masses are kept.
    """
    for layer, masses in enumerate(network.masses):
        if not bool((masses > 0).all()):
            remedy = "is no metric: measures.drop_massless leaves such particles out"
            raise Misuse("metric", "flow", f"with masses of zero in layer {layer} {remedy}")
    roots = [masses.detach().rsqrt() for masses in network.masses]
    found: Parameters = {}
    for layer, kernel in enumerate(network.kernels):
        found[f"kernels.{layer}"] = along_axis(roots[layer], kernel, 0).expand_as(kernel)
        if layer:  # one root after the other: the product of two masses may underflow
            found[f"kernels.{layer}"] = found[f"kernels.{layer}"] * along_axis(roots[layer - 1], kernel, 1)
    found["readout"] = along_axis(roots[-1], network.readout, 1).expand_as(network.readout)
    biases = {f"biases.{layer}": roots[layer] for layer, bias in enumerate(network.biases) if bias is not None}
    return {**found, **biases}
