"""
Is my trained network optimal?
==============================

A network trained elsewhere, in plain PyTorch, is read as particles, and asked how far it is from the best that its own
features allow: another population of the same features, found by a convex program, with a bound that no population can
beat.
"""

import matplotlib.pyplot as plt
import torch
from torch import nn

import meanfield as mf

# %%
# A plain training loop, with batch norm, a stride, pooling and biases.

digits = mf.data.load("digits", samples=300)
images, labels = digits.inputs.float(), digits.labels
torch.manual_seed(0)
network = nn.Sequential(
    *(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)),
    *(nn.Conv2d(8, 12, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(48, 10)),
)
optimiser = torch.optim.Adam(network.parameters(), lr=1e-2)
for _ in range(60):
    optimiser.zero_grad()
    nn.functional.cross_entropy(network(images), labels).backward()
    optimiser.step()
network.eval()

# %%
# Its outputs are those of the particles, to rounding. J needs a penalty, which this training did not have: yours
# (`penalty=mf.Penalty(...)`), or by default the one at which scaling the layers does not change J. The gap is for it
# alone. With `search=True` features that the network lacks are looked for as well, in about a minute.

particles = mf.ParticleNetwork.from_module(network, images[:1])
with torch.no_grad():
    print(f"largest difference of outputs {float((particles(images) - network(images)).abs().max()):.1e}")
audit = mf.audit(network, images, labels, loss="softmax")
print(audit)
falls = 1 - audit.repopulated.value / audit.value
print(f"without new features J could fall by at most {audit.relative_gap:.1%}, and falls by {falls:.1%}")

# %%
# Which channels the program would do without: their mass goes to others.

figure, axes = plt.subplots(1, 2, figsize=(8, 3), layout="constrained")
for axis, before, after, layer in zip(axes, audit.network.masses, audit.repopulated.network.masses, (1, 2)):
    axis.bar(range(len(before)), sorted(before.tolist(), reverse=True), color="lightgray", label="trained")
    axis.plot(range(len(after)), sorted(after.tolist(), reverse=True), "o-", label="repopulated")
    axis.set(title=f"layer {layer}", xlabel="features, heaviest first", ylabel="mass")
axes[0].legend()
plt.show()
