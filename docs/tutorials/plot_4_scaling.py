"""
The width scaling of your own parameterisation
==============================================

How should multipliers, starts and learning rates change with the width of a network? An *abc-parameterisation* answers
with three powers of the width per kind of layer. Here you write one down, predict how far features and output move in
the first step of SGD, and measure whether they do, with intervals.
"""

import matplotlib.pyplot as plt

from meanfield.finite import Scaling
from meanfield.studies.widths.parameterisation import measure_scaling

# %%
# **Write it down.** Numbers are powers of the width m. Multipliers stay 1 and the start is He's, as everywhere by
# default; only the learning rates are ours: they fall like 1/m in every layer. `rates` is what the power multiplies,
# small here, because the prediction is of first order in it.
RATES = {"sgd": 1e-4, "adam": 1e-4}
falling = {"input": -1, "hidden": -1, "readout": -1}
lazy = Scaling(learning_rate=falling, rates=RATES, name="He's start, rates 1/m")

# %%
# **Predict.** With a readout of size m^r at the start (He: r = -1/2), the gradient of the output in a pre-activation is
# of order m^r. A kernel of layer 1 moves its pre-activation by its rate times m^r. A later one sums over m features:
# one power more; what it inherits from layer 1 counts where it is larger. The output sums over m as well: what the
# readout moved, and the features that moved, times the readout. (Derivation: theory, section 10.)


def predicted(r, rate):
    first = rate["input"] + r
    second = max(first, 1 + rate["hidden"] + r)
    return {"1": first, "2": second, "output": max(1 + rate["readout"], 1 + r + second)}


# %%
# **Measure.** Two tanh layers on eight digits of 2x2 pixels, ten starts at each of four widths.
found = measure_scaling(lazy)
for layer, slope in found.slopes.items():
    print(f"{layer:>6}: predicted {predicted(-0.5, falling)[layer]:+.1f}, measured {slope}")

# %%
# The output moves at every width, the features ever less: wide networks of this kind learn with the features of their
# start. **Change it** so that everything moves: a smaller readout at the start, and rates layer by layer.
rates = {"input": 1, "hidden": 0, "readout": -1}
feature = Scaling(initial={"readout": -1}, learning_rate=rates, rates=RATES, name="small readout, rates by layer")
cases = [(found, predicted(-0.5, falling)), (measure_scaling(feature), predicted(-1, rates))]
figure, axes = plt.subplots(1, 2, figsize=(9, 3.5), sharey=True, layout="constrained")
for panel, (measured, known) in zip(axes, cases):
    for place, (layer, slope) in enumerate(measured.slopes.items()):
        panel.vlines(place, slope.low, slope.high, lw=6, alpha=0.4, label="95% interval" if place == 0 else None)
        panel.plot(place, known[layer], "kx", ms=9, label="predicted" if place == 0 else None)
    panel.set(title=measured.scaling.name, xticks=range(3), xticklabels=["layer 1", "layer 2", "output"])
    panel.legend()
axes[0].set_ylabel("slope of the change over the width")
plt.show()
