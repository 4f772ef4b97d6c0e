"""
Transfer between starts
=======================

A training moves the parameters from a start to an end. Put that displacement on another start: what does the sum
compute? The library predicts the mean over all starts of a law without drawing one. Here it is compared with five that
are drawn.
"""

import matplotlib.pyplot as plt
import torch

import meanfield as mf
from meanfield import transfer
from meanfield.finite import Recipe, evaluate, fit, mlp

# %%
# One training of a fully connected classifier.

digits = mf.data.load("digits", samples=1000)
images, labels = digits.inputs.float(), digits.labels
held_out, truth = digits.rest.inputs.float(), digits.rest.labels
start = mlp(digits.input_shape, 10, hidden=(128,), generator=torch.Generator().manual_seed(0))
trained = fit(start, images, labels, Recipe(epochs=40)).network
moved = transfer.Displacement.between(start, trained)
law = transfer.StartLaw.he(start)
for name, norm in moved.norms().items():
    print(f"{name}: start {norm.start:.2f}, displacement {norm.displacement:.2f}")

# %%
# The displacement, times alpha, on five other starts of the same law; and what is predicted of all starts.

alphas = (0.5, 1.0, 2.0, 4.0, 8.0)
others = [law.draw(start, torch.Generator().manual_seed(seed)) for seed in range(1, 6)]
drawn, predicted = [], []
for alpha in alphas:
    networks = [moved.applied(other, alpha=alpha) for other in others]
    drawn.append([evaluate(network, held_out, truth).accuracy for network in networks])
    predicted.append(transfer.moments(moved, law, held_out, alpha).accuracy(truth))
    print(f"alpha {alpha}: drawn {sum(drawn[-1]) / 5:.1%}, predicted {predicted[-1]:.1%}")

# %%
# A small displacement drowns in the start. A large one leaves the start behind; what it then lacks of the dashed line
# is what it had fitted to its own start.

figure, axis = plt.subplots(figsize=(7, 3.5), layout="constrained")
for alpha, scores in zip(alphas, drawn):
    axis.plot([alpha] * len(scores), scores, "o", color="tab:blue", label="drawn" if alpha == alphas[0] else None)
axis.plot(alphas, predicted, "k-", label="predicted without a start")
axis.axhline(evaluate(trained, held_out, truth).accuracy, color="gray", linestyle="--", label="on its own start")
axis.set(xscale="log", xlabel="alpha", ylabel="right of the held-out images")
axis.set_xticks(alphas, alphas)
axis.minorticks_off()
axis.legend()
plt.show()
