"""The neural tangent kernel of finite networks (Jacot et al. 2018) and its limit of infinite width.

Theta(x, x') = <dF(x)/dtheta, dF(x')/dtheta>, the inner product over all parameters theta of a `FiniteCNN` with one
output: gradient flow on theta moves F(x) along Theta(x, x').  Near infinite width, "ntk" scaling, Theta is constant.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.utils.checkpoint import checkpoint

from meanfield import limits, validation
from meanfield.activations import ACTIVATIONS
from meanfield.architecture import Architecture
from meanfield.finite.network import FiniteCNN
from meanfield.signatures import checked

PARALLEL = 2.0**-44  # 1 - |cos a|: 2^8 roundings in sums of that many products
PAIR_ENTRIES = 2**17  # of pairs of patches at a time: 1 MiB, which stays in the cache (three times as fast as 32 MiB)


@checked
@torch.inference_mode(False)
def empirical(network: FiniteCNN, inputs: Tensor) -> Tensor:
    """Theta of a network with K = 1 on inputs (N, C_0, H, W) -> (N, N), symmetric and positive semidefinite.

    Any depth, scaling, activation and pooling.  At a kink h' is torch's choice, for ReLU 0.  Memory: N x (number of
    parameters) numbers, and a block of images' features and patches.
    The result carries no graph: derivatives of Theta itself are not taken.
    """
    _check_single_output(network.architecture)
    if (own := next(network.parameters()).dtype) != _images(network.architecture, inputs).dtype:
        raise ValueError(f"inputs are {inputs.dtype}, the network is {own}; convert one with .to(...)")
    each = inputs.element_size() * _entries_per_image(network)
    blocks = limits.blocks(len(inputs), each)
    jacobian = torch.cat([_gradients(network, inputs[block]) for block in blocks])  # (N, parameters)
    return jacobian @ jacobian.T


@checked
def infinite(architecture: Architecture, inputs: Tensor) -> Tensor:
    """E Theta at the He start of `FiniteCNN.random(..., scaling="ntk")`, one ReLU layer: (N, C_0, H, W) -> (N, N).

    This is the limit of `empirical` for m -> infinity and, as Theta of one layer is an average over channels drawn
    independently, its mean at every width m.

    Derivation.  With the patch z_p of position p (C_0 S entries), g_p = <w, z_p> / sqrt(C_0), and w of variance 2 / S,
    (g_p, g'_p') is Gaussian with covariance 2 <z_p, z'_p'> / (C_0 S).  Let a be the angle of the two patches.  Cho &
    Saul (2009), arc-cosine kernels of order 1 and 0:
        E h(g) h(g')   = |z| |z'| (sin a + (pi - a) cos a) / (pi C_0 S)      =: A(z, z')
        E h'(g) h'(g') = (pi - a) / (2 pi)                                   =: D(z, z')
    Readout u_j: s(m)^2 sum_j <f_j, f'_j> has the mean of <f, f'>.  Kernel w_j and bias b_j: s(m)^2 sum_j of E u^2, D
    and dg/dw dg'/dw + dg/db dg'/db = <z, z'> / C_0 + 1 (the 1 with bias only).  The readout has E u^2 = 1 ("average")
    or E u_q^2 = R ("flatten"), R its positions.  With average pooling over windows of A positions both average over the
    positions in windows; distinct entries of a flattened u are independent:
        Theta = sum over (p, p') of [A + E u^2 D (<z, z'> / C_0 + 1)] / (R A)^2,
    over all pairs of positions ("average"; Arora et al. 2019, CNTK with global average pooling) or over pairs in the
    same window ("flatten").

    Computed in float64, returned in the dtype of inputs.  Angles below sqrt(2 PARALLEL) = 3e-7, which rounding of the
    cosine hides, count as 0, and those as near pi as pi: exact for parallel patches, else 6e-8 of the value.
    Time: N^2 P^2 / 2 angles for "average", P the positions in windows.  Memory: the patches, and a few
    arrays of PAIR_ENTRIES pairs at a time.

    Differentiable in the inputs, in the same memory.  With a the angle of z and z', and e the unit vector along
    the part of z' that is orthogonal to z,
        dA/dz = (|z'| sin(a) z/|z| + (pi - a) z') / (pi C_0 S),   dD/dz = e / (2 pi |z|).
    D has a kink where two patches are parallel or opposite: the derivative is then taken as 0, the mean of those from
    two opposite sides, and the right one for a patch with itself.  At a blank patch nothing has a derivative: it is
    taken as 0, as h'(0).
    """
    _check_covered(architecture)
    groups = _pooled_patches(architecture, _images(architecture, inputs).double())  # (G, N, W, C_0 S)
    count, positions = len(inputs), groups.shape[0] * groups.shape[2]
    upper = (
        sum((_pair_sums(architecture, patches) for patches in groups), groups.new_zeros(count, count)) / positions**2
    )
    return (upper.triu() + upper.triu(1).T).to(inputs.dtype)


def _images(architecture: Architecture, inputs: Tensor) -> Tensor:
    """Inputs of which the kernel, in their dtype, is a number: as integers all of it could be 0."""
    validation.working(architecture.check_inputs(inputs).dtype, "inputs.dtype")
    return validation.finite(inputs, "inputs")


def _check_single_output(architecture: Architecture) -> None:
    if architecture.outputs != 1:
        raise ValueError(
            f"architecture has outputs={architecture.outputs}; the tangent kernel is that of one output, take outputs=1"
        )


def _check_covered(architecture: Architecture) -> None:
    _check_single_output(architecture)
    if architecture.depth != 1:
        raise ValueError(
            f"architecture has {architecture.depth} layers; the limit is in closed form for one layer, see "
            "kernel.empirical"
        )
    layer = architecture.layers[0]
    if layer.h.name != "relu":
        raise ValueError(
            f"layers[0] has activation={layer.h!r}; the limit is in closed form for 'relu', see kernel.empirical"
        )
    if layer.pooling == "max":
        raise ValueError(
            "layers[0] has pooling='max'; the limit is in closed form for 'none' and 'average', see kernel.empirical"
        )


def _entries_per_image(network: FiniteCNN) -> int:
    """Numbers per image in features, patches and gradients of all layers."""
    architecture = network.architecture
    sources = (architecture.input_shape[0], *network.widths[:-1])
    positions = [math.prod(shape.output) for shape in architecture.geometry]
    layers = zip(positions, network.widths, sources, architecture.layers)
    return sum(q * (3 * m + c * layer.offsets) + m * c * layer.offsets for q, m, c, layer in layers)


@torch.enable_grad()
def _gradients(network: FiniteCNN, inputs: Tensor) -> Tensor:
    """dF/dtheta of every image, (N, parameters)."""
    layers, factors = network.architecture.layers, network.forward_factors
    signals, preactivations, read = _forward(network, inputs)
    amounts = network.readout.detach() * factors[-1]
    # images do not act on one another, so that one backward pass of the sum gives dF(x_n)/dg(x_n) of every image
    responses = torch.autograd.grad((read.flatten(1) @ amounts.flatten()).sum(), preactivations)
    blocks = [factors[-1] * read.detach().flatten(1)]
    for layer, bias, signal, response, factor in zip(layers, network.biases, signals, responses, factors):
        delta = response.flatten(2)  # (N, M, P)
        blocks.append(factor * (delta @ layer.patches(signal.detach())).flatten(1))
        blocks += [] if bias is None else [delta.sum(2)]
    return torch.cat(blocks, 1)


def _forward(network: FiniteCNN, inputs: Tensor) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """What every layer reads, its pre-activations, and what the readout multiplies; a graph from the first g on."""
    signal, signals, preactivations = inputs.detach(), [], []
    factors = network.forward_factors
    for layer, kernel, bias, factor in zip(network.architecture.layers, network.kernels, network.biases, factors):
        weights = kernel.detach() * factor
        g = layer.convolve(signal, weights, None if bias is None else bias.detach())
        signals.append(signal)
        preactivations.append(g if g.requires_grad else g.requires_grad_())
        signal = layer.activate(g)
    return signals, preactivations, network.architecture.readout_features(signal)


def _pooled_patches(architecture: Architecture, inputs: Tensor) -> Tensor:
    """Patches in groups (G, N, W, C_0 S) whose pairs of positions the readout couples.

    "average": one group of all positions in windows.  "flatten": one group per window, a single position without
    pooling.
    """
    layer, shape = architecture.layers[0], architecture.geometry[0]
    (rows, columns), (height, width) = layer.pool_size if layer.pooling == "average" else (1, 1), shape.pooled  # type: ignore[misc]
    # incomplete windows drop out
    patches = layer.patches(inputs).unflatten(1, shape.output)[:, : height * rows, : width * columns]
    # (N, height, rows, width, columns, C_0 S)
    windows = patches.unflatten(2, (width, columns)).unflatten(1, (height, rows))
    groups = windows.permute(1, 3, 0, 2, 4, 5).flatten(3, 4).flatten(0, 1)  # (R, N, A, C_0 S)
    return groups if architecture.readout == "flatten" else groups.transpose(0, 1).flatten(1, 2)[None]


def _pair_sums(architecture: Architecture, patches: Tensor) -> Tensor:
    """sum over w, w' of A + E u^2 D (<z, z'> / C_0 + 1) for patches (N, W, C_0 S) -> (N, N),
    blocks above the diagonal.
    """
    result = patches.new_zeros(len(patches), len(patches))
    blocks = list(_blocks(*patches.shape[:2]))
    for (left, left_places), (right, right_places) in product(blocks, blocks):
        if left.start <= right.start:
            both = patches[left, left_places].flatten(0, 1), patches[right, right_places].flatten(0, 1)
            if patches.requires_grad:  # pairs are computed once more, and not kept, for the gradient
                pairs = checkpoint(_pair_kernel, architecture, *both, use_reentrant=False)
            else:
                pairs = _pair_kernel(architecture, *both)
            images = (len(result[left]), len(result[right]))
            result[left, right] += pairs.view(images[0], -1, images[1], pairs.shape[1] // images[1]).sum((1, 3))
    return result


def _blocks(images: int, places: int) -> Iterator[tuple[slice, slice]]:
    """Blocks of at most sqrt(PAIR_ENTRIES) patches: whole images, or places of one image where it has more."""
    side = math.isqrt(PAIR_ENTRIES)
    step = max(1, side // places)
    for start, place in product(range(0, images, step), range(0, places, side)):
        yield slice(start, start + step), slice(place, place + side)


def _pair_kernel(architecture: Architecture, left: Tensor, right: Tensor) -> Tensor:
    """A + E u^2 D (<z, z'> / C_0 + 1) for patches (p, C_0 S) and (q, C_0 S) -> (p, q)."""
    layer, channels = architecture.layers[0], architecture.input_shape[0]
    left_norms, right_norms = left.norm(dim=1), right.norm(dim=1)
    blank = (left_norms == 0)[:, None] | (right_norms == 0)
    norms = left_norms[:, None] * right_norms
    cosine = (left @ right.T / norms.masked_fill(blank, 1)).clamp(-1, 1)
    complement = _Complement.apply(cosine)
    features = norms * _First.apply(cosine) * (ACTIVATIONS["relu"].gain / (2 * math.pi * channels * layer.offsets))
    slopes = complement.masked_fill(blank, 0) / (2 * math.pi)  # a blank patch has g = 0, and the derivative 0 there
    amount = architecture.readout_positions if architecture.readout == "flatten" else 1
    return features + amount * slopes * (norms * cosine / channels + float(layer.bias))


class _Complement(Function):
    """pi - a of cos a, with derivative 0 where a is 0 or pi, as far as rounding can tell."""

    @staticmethod
    def forward(cosine: Tensor) -> Tensor:
        return math.pi - cosine.where(1 - cosine.abs() > PARALLEL, cosine.sign()).arccos()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        (cosine,), (slope,) = ctx.saved_tensors, grad_outputs
        apart = 1 - cosine.abs() > PARALLEL
        return torch.where(apart, slope / (1 - cosine.where(apart, 0.0).square()).sqrt(), 0.0)


class _First(Function):
    """sin a + (pi - a) cos a of cos a, with derivative pi - a."""

    @staticmethod
    def forward(cosine: Tensor) -> Tensor:
        return (1 - cosine.square()).sqrt() + (math.pi - cosine.arccos()) * cosine

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        return grad_outputs[0] * _Complement.apply(ctx.saved_tensors[0])
