"""
A loss landscape with an error bar
==================================

A picture of a loss surface is an interpolation, and its error is rarely told. `landscape.surface` evaluates the loss at
a few hundred points, checks the polynomial through them where it errs most, and refines it until the error is below
what you asked for.
"""

import matplotlib.pyplot as plt
import torch

import meanfield as mf
from meanfield import landscape
from meanfield.finite import Recipe, cnn, fit

# %%
# A trained classifier; any torch module does, with any loss, on tensors or a DataLoader.

digits = mf.data.load("digits", samples=500)
images, labels = digits.inputs.float(), digits.labels
start = cnn(digits.input_shape, 10, width=8, generator=torch.Generator().manual_seed(0))
network = fit(start, images, labels, Recipe(epochs=20)).network

# %%
# A plane through it, filter by filter as long as the weights. The error is a share of the range of the loss.

plane = landscape.plane(network, seed=0, normalise="filter")
surface = landscape.surface(network, plane, images, labels, tolerance=0.01)
print(f"{surface}: {surface.message}")
print(f"largest error {surface.error:.2g}, {surface.error / surface.range:.2%} of the range")

# %%
# Turning a weight's scale without changing the function changes an unbalanced picture: `plane.warnings` would say so.
# On the right is one row of the surface, with the error as a band.

axis, values = surface.axis(101), surface.grid(101)
middle = values[50]
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained")
lines = left.contourf(axis, axis, values.T, levels=24, cmap="viridis")
figure.colorbar(lines, ax=left)
left.set(title="loss", xlabel="first direction", ylabel="second direction", aspect="equal")
right.plot(axis, middle, label="loss along the second direction")
right.fill_between(axis, middle - surface.error, middle + surface.error, alpha=0.3, label="estimated error")
right.set(xlabel="second direction", ylabel="loss")
right.legend()

# %%
# A random slice hides the steep directions. How many times its mean curvature is the largest eigenvalue?

found = landscape.sharpness(network, images, labels, measures=("top", "trace"))
count = sum(each.numel() for each in network.parameters())
print(f"largest eigenvalue {found.top}, mean over all {count} directions {found.trace.value / count:.2g}")
plt.show()
