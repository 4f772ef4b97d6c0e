"""
Graft two networks
==================

Do two networks that were trained from different starts learn the same features? Put the lower layers of one, the donor,
under the upper layers of the other, the host, fit only the layer that joins them, and see what the host loses. The
control is a donor that was never trained.
"""

import matplotlib.pyplot as plt
import torch

import meanfield as mf
from meanfield.finite import Recipe, cnn, evaluate, fit

# %%
# Two small classifiers of handwritten digits, and one that stays as it was drawn.

digits = mf.data.load("digits", classes=range(10), samples=1000)
images, labels = digits.inputs.float(), digits.labels
held_out, truth = digits.rest.inputs.float(), digits.rest.labels


def start(seed):
    return cnn(digits.input_shape, 10, width=8, generator=torch.Generator().manual_seed(seed))


host, donor = (fit(start(seed), images, labels, Recipe(epochs=15), seed=seed).network for seed in (0, 1))
untrained = start(2)
print(host)

# %%
# `graft` takes the name of the layer at which the networks are joined. `method="transport"` uses the host's own kernel,
# pulled through an optimal transport plan between the two sets of channels, in place of a least-squares fit.

lower, rows = evaluate(host, held_out, truth).accuracy, {}
for name, network in (("trained", donor), ("untrained", untrained)):
    for layer in ("conv2", "linear1"):
        for method in ("least_squares", "transport"):
            found = mf.grafting.graft(network, host, layer, images, method=method)
            score = evaluate(found.network, held_out, truth).accuracy
            rows[name, layer, method] = score
            print(f"{name:9} donor, {layer:7} {method:13}: error {found.error:.3f}, {score:.1%} right")
print(f"the host itself: {lower:.1%}")

# %%
# Least squares compares the spaces that features span, transport their distributions. So few channels span the images
# themselves: least squares hardly needs a trained donor, transport does.

figure, axis = plt.subplots(figsize=(7, 3.5), layout="constrained")
for offset, name in enumerate(("trained", "untrained")):
    cases = {key[1:]: value for key, value in rows.items() if key[0] == name}
    places = [index + 0.35 * offset for index in range(len(cases))]
    axis.bar(places, list(cases.values()), width=0.33, label=f"{name} donor")
axis.axhline(lower, color="black", linestyle="--", label="the host")
axis.set_xticks([index + 0.17 for index in range(4)], ["\n".join(case) for case in cases])
axis.set(ylabel="right of the held-out images", ylim=(0, 1.3))
axis.legend(loc="upper center", ncols=3)
plt.show()
