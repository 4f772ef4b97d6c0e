"""
A loss of your own, from formula to certificate
===============================================

A loss of one variable needs its formula alone: the conjugate and the proximal map that certificates and the solver want
are found numerically. What is wrong with a loss is said before it does harm.
"""

import matplotlib.pyplot as plt
import torch

import meanfield as mf
from meanfield import losses

# %%
# The pinball loss of a quantile: below the target an error costs t, above it 1 - t.


def quantile(t):
    def value(F, y):
        return torch.maximum(t * (y - F), (t - 1) * (y - F))

    return losses.ScalarLoss(value, lambda F, y: 1 - t - (y > F).to(F), name=f"quantile({t})")


# What it returns is by how much each line was off at random points. A loss of other targets than real numbers, such as
# counts, is checked on them: `losses.check(loss, counts)`.

print(losses.check(quantile(0.3)))

# %%
# A slope with the wrong sign is named.

try:
    losses.check(losses.ScalarLoss(lambda F, y: (F - y).square(), lambda F, y: 2 * (y - F), name="wrong"))
except ValueError as refusal:
    print(refusal)

# %%
# Quantile regression by a continuous network of random features: the convex program, to a gap that certifies it.
# `mf.solve` takes the loss as well, and moves the features. The penalty pulls outputs to zero, and shares from t.

digits = mf.data.load("digits", classes=(3, 5), samples=40, pool=2)
architecture = mf.Architecture(digits.input_shape, (mf.Conv(3, padding=1, activation="tanh"),) * 2)
noisy = digits.targets("squared") + torch.randn(40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
figure, axis = plt.subplots(figsize=(7, 3.5), layout="constrained")
for t in (0.1, 0.5, 0.9):
    problem = mf.Problem(architecture, digits.inputs, noisy, quantile(t), mf.Penalty(readout=1e-3))
    start = mf.starts.draw(problem, (8, 6), torch.Generator().manual_seed(1), "low_rank")
    solution = mf.solvers.splitting.solve(mf.ConvexProgram.freeze(problem, start), 1e-6)
    outputs = solution.network(digits.inputs)[:, 0]
    below = float((noisy <= outputs).double().mean())
    print(f"t = {t}: J = {solution.value:.4f}, gap {solution.gap:.0e}, {below:.0%} of the targets below")
    axis.plot(outputs[noisy.argsort()], "o-", ms=3, label=f"quantile {t}")
axis.plot(noisy.sort().values, "k.", label="targets")
axis.set(xlabel="images, by target", ylabel="output")
axis.legend()
plt.show()
