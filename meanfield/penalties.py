"""The penalties and bounds of the objective, and the scalar root behind all their proximal maps.

A kernel's norm is a sum over *atoms*: with the l2 norm a kernel is one atom, with the l1 norm every entry is one.  Both
norms then share every formula: the norm is the sum of atom magnitudes, its dual norm their maximum, and a proximal map
shrinks atoms without turning them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from meanfield.validation import nonnegative, one_of, positive

KERNEL_NORMS = ("l2", "l1")
ROOT_STEPS = 100


@dataclass(frozen=True, kw_only=True)
class Penalty:
    """Strengths lambda_s (source), lambda_u (readout), lambda_1 (input), the kernel norm and the optional bounds.

    source:  lambda_s sum_i p_i (sum_j |w_ij| p_j)^2 for every pair of layers, the inner sum over the TARGET layer
    readout: lambda_u sum_j p_j |u_j|^2
    input:   lambda_1 sum_i p_i |(z_i, b_i)|^2 on layer 1
    amplitude_bound B: sum_i |w_ij| p_i <= B and |b_j| <= B for every feature j of layers >= 2
    input_bound B_1: |(z_i, b_i)| <= B_1 on layer 1
    """

    source: float = 3e-4
    readout: float = 3e-3
    input: float = 3e-4
    kernel_norm: str = "l2"
    amplitude_bound: float | None = None
    input_bound: float | None = None

    def __post_init__(self) -> None:
        for name in ("source", "readout", "input"):
            object.__setattr__(self, name, nonnegative(getattr(self, name), name))
        for name in ("amplitude_bound", "input_bound"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, positive(getattr(self, name), name))
        one_of(self.kernel_norm, KERNEL_NORMS, "kernel_norm")

    def atoms(self, kernels: Tensor) -> Tensor:
        """Atom magnitudes, (targets, sources, kh, kw) -> (targets, sources, 1 for l2 or kh kw for l1)."""
        flat = kernels.flatten(2)
        return torch.linalg.vector_norm(flat, dim=2, keepdim=True) if self.kernel_norm == "l2" else flat.abs()

    def norms(self, kernels: Tensor) -> Tensor:
        """|w_ij|, (targets, sources)."""
        return self.atoms(kernels).sum(2)

    def dual_norms(self, kernels: Tensor) -> Tensor:
        """|b_ij|*, (targets, sources)."""
        return self.atoms(kernels).amax(2)

    def shrink(self, kernels: Tensor, thresholds: Tensor) -> Tensor:
        """Atoms x -> (1 - threshold / |x|)_+ x; thresholds broadcast against (targets, sources, atoms)."""
        atoms = self.atoms(kernels)
        factors = torch.where(atoms > thresholds, 1 - thresholds / atoms, 0.0)
        return (kernels.flatten(2) * factors).reshape(kernels.shape)


def input_norms(kernels: Tensor, bias: Tensor | None) -> Tensor:
    """|(z_i, b_i)| of the first layer, (M_1,)."""
    flat = kernels.flatten(1) if bias is None else torch.cat([kernels.flatten(1), bias[:, None]], 1)
    return torch.linalg.vector_norm(flat, dim=1)


def perspective(amounts: Tensor, masses: Tensor) -> Tensor:
    """p r(s / p) for r(t) = t^2: s^2 / p, with 0 where s = p = 0 and +inf where s > 0 = p."""
    positive_mass = masses > 0
    safe = torch.where(positive_mass, masses, 1.0)
    return torch.where(positive_mass, amounts.square() / safe, torch.where(amounts > 0, torch.inf, 0.0))


def shrinkage_root(
    magnitudes: Tensor,
    slopes: Tensor | float,
    weights: Tensor | float,
    dims: tuple[int, ...],
    *,
    level: Tensor | float = 0.0,
    mass: Tensor | float = 0.0,
    curvature: Tensor | float = 0.0,
) -> Tensor:
    """The root r >= 0 of  sum_dims weights (magnitudes - slopes r)_+  =  level + r (mass + curvature r^2)_+.

    The left side falls in r and the right side does not, so the root is unique where one of them moves; 0 is returned
    where the left side is not above the right one at r = 0.  `slopes`, `weights`, `level`, `mass` and `curvature` are
    non-negative, except that `level` and `mass` may be negative; they broadcast with keepdim over `dims`.
    Newton's method, kept inside a bracket.  Returns r with the reduced dimensions kept, size 1.
    """
    def excess(r: Tensor) -> tuple[Tensor, Tensor]:
        inside = magnitudes > slopes * r
        left = torch.where(inside, weights * (magnitudes - slopes * r), 0.0).sum(dims, keepdim=True)
        fall = torch.where(inside, weights * slopes + 0 * magnitudes, 0.0).sum(dims, keepdim=True)
        grown = mass + curvature * r.square()
        right = level + r * grown.clamp_min(0)
        rise = torch.where(grown > 0, mass + 3 * curvature * r.square(), 0.0)
        return right - left, rise + fall

    like = magnitudes.sum(dims, keepdim=True)
    level, mass, curvature = (torch.as_tensor(x, dtype=like.dtype, device=like.device) + 0 * like for x in (level, mass, curvature))
    low = torch.where((mass < 0) & (curvature > 0), (-mass / curvature.clamp_min(1e-300)).clamp_min(0).sqrt(), 0.0)
    r = low.clone()
    high = torch.full_like(low, torch.inf)
    eps = torch.finfo(like.dtype).eps
    for _ in range(ROOT_STEPS):
        value, slope = excess(r)
        high = torch.where(value >= 0, torch.minimum(high, r), high)
        low = torch.where(value < 0, torch.maximum(low, r), low)
        newton = r - value / torch.where(slope > 0, slope, torch.inf)
        middle = torch.where(torch.isfinite(high), 0.5 * (low + high), 2 * r + 1)
        new = torch.where((newton >= low) & (newton <= high), newton, middle)
        settled = (value.abs() <= 4 * eps * (level.abs() + slope * r.abs())) | ((new - r).abs() <= 2 * eps * r.abs())
        if bool((settled | (value >= 0) & (r == 0)).all()):
            return r
        r = torch.where(settled, r, new)
    return r


def row_prox(
    kernels: Tensor, masses: Tensor, penalty: Penalty, strength: float, kernel_weight: float, mass_weight: float
) -> tuple[Tensor, Tensor]:
    """Proximal map of strength sum_i (sum_j |W_ij|)^2 / p_i + indicator(p >= 0), jointly in (W, p).

    kernels (targets, sources, kh, kw), masses (sources,); the metric is kernel_weight/2 |W - .|^2 +
    mass_weight/2 |p - .|^2.  With r = (sum_j |W_ij|) / p_i the solution is a shrinkage of W by 2 strength r /
    kernel_weight and p = (masses + strength r^2 / mass_weight)_+, where r is one scalar root per row.
    """
    if strength == 0:
        return kernels, masses.clamp_min(0)
    slope, curvature = 2 * strength / kernel_weight, strength / mass_weight
    center = masses[None, :, None]
    r = shrinkage_root(penalty.atoms(kernels), slope, 1.0, (0, 2), mass=center, curvature=curvature)
    grown = (masses + curvature * r.flatten().square()).clamp_min(0)
    shrunk = penalty.shrink(kernels, slope * r)
    return torch.where(grown[None, :, None, None] > 0, shrunk, 0.0), grown


def cone_projection(
    kernels: Tensor, masses: Tensor, penalty: Penalty, bound: float, kernel_weight: float, mass_weight: float
) -> tuple[Tensor, Tensor]:
    """Projection on {sum_i |W_ij| <= bound p_j} in the metric of `row_prox`; kernels (targets, sources, ...), masses (targets,)."""
    center = masses[:, None, None]
    slope = bound * kernel_weight / mass_weight
    theta = shrinkage_root(
        penalty.atoms(kernels), 1.0, 1.0, (1, 2), level=bound * center, mass=torch.full_like(center, bound * slope)
    )
    return penalty.shrink(kernels, theta), (masses + slope * theta.flatten()).clamp_min(0)
