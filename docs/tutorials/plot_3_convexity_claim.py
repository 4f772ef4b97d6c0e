"""
Test a convexity claim of your own, and break it
================================================

A claim of convexity is tested three ways: straight lines between points, the smallest eigenvalue of the Hessian, and an
adversary that climbs towards a witness against it. A test that cannot fail says nothing, so the same three are asked
about a neighbour of the claim that is false.
"""

import matplotlib.pyplot as plt
import torch

from meanfield.studies import convexity

# %%
# The claim: the source penalty, in populations p and repopulated kernels W, is convex. With two sources and two targets
# it is the sum over sources of (sum_j abs(W_ij))^2 / p_i. The neighbour is weight decay, W_ij^2 / (p_i p'_j) summed
# over the pairs. A point is one vector: four entries of W, two masses p of sources, two masses p' of targets.


def source_penalty(x):
    W, p = x[:4].reshape(2, 2), x[4:6]
    return (W.abs().sum(1).square() / p).sum()


def weight_decay(x):
    W, p, targets = x[:4].reshape(2, 2), x[4:6], x[6:]
    return (W.square() / (p[:, None] * targets)).sum()


def point(generator):
    W = torch.randn(4, generator=generator, dtype=torch.float64)
    p = torch.rand(2, 2, generator=generator, dtype=torch.float64) + 0.05
    return torch.cat([W, (p / p.sum(1, keepdim=True)).flatten()])


# %%
# Points are drawn where the claim is made: masses are positive and sum to one, and so they do along straight lines.
# The eigenvalue is over all directions. A claim on less (of symmetric matrices, say) needs `equalities=`, a function
# that is zero there; without it a true claim looks false.

points = torch.stack([point(torch.Generator().manual_seed(seed)) for seed in range(12)])
figure, axes = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
for axis, claim in zip(axes, (source_penalty, weight_decay)):
    lines = convexity.segments(claim, points)
    bent = convexity.curvature(claim, points[0])
    found = convexity.falsify(claim, point, budget=1000)
    print(f"{claim.__name__}: convex on all lines {lines.convex}")
    print(f"  smallest eigenvalue {bent.smallest:.2g}, negative {bent.negative}; witness found {found.falsified}")
    worst = found.witness
    times = torch.linspace(0, 1, 101, dtype=torch.float64)
    along = torch.stack([claim((1 - t) * worst.start + t * worst.end) for t in times])
    axis.plot(times, along - (1 - times) * along[0] - times * along[-1])
    axis.axhline(0, color="black", linestyle="--")
    axis.set(title=claim.__name__.replace("_", " "), xlabel="t, along the worst line found", ylabel="above the chord")
plt.show()

# %%
# Random lines miss what is wrong with weight decay; the eigenvalue and the adversary see it. A convex function stays
# below zero in the picture. Rounding moves an eigenvalue of zero by some 1e-14, which `bent.negative` allows for.
