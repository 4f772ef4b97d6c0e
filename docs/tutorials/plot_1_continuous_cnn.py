"""
A continuous CNN in ten minutes
===============================

A layer of infinite width is a probability measure over features. Here it is held as particles with masses, trained by
a particle flow, and finished by a convex program whose duality gap says how far the answer is from the best there is
for these features.
"""

import matplotlib.pyplot as plt

import meanfield as mf

# %%
# A problem is images, an architecture and an objective J: the mean loss and three penalties.

digits = mf.data.load("digits", classes=(3, 5), samples=24, pool=2)
print(digits.summary)

layer = mf.Conv(kernel_size=3, padding=1, activation="tanh")
architecture = mf.Architecture(digits.input_shape, layers=(layer, layer), readout="average", outputs=1)
penalty = mf.Penalty(source=3e-4, readout=3e-3, input=3e-4)
problem = mf.Problem(architecture, digits.inputs, digits.targets("squared"), loss="squared", penalty=penalty)

# %%
# `mf.solve` alternates: the flow moves features and masses, the program then finds the best masses of these features.
# The gap is a proof about these features. The message says what ended the alternation: here the limit of rounds, which
# is short so that this page is quick; with more of them J falls further.

solution = mf.solve(problem, widths=(16, 8), seed=0, rounds=3, flow_steps=150)
print(f"J = {solution.value:.5f}, no other populations of these features are better by more than {solution.gap:.1e}")
print(solution.message)

# %%
# Left: what flow and program of each round leave. Right: the masses that the program gave the features of both layers.
# Those of zero mass are gone.

rounds = [row["round"] for row in solution.history]
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
left.plot(rounds, [row["flow_value"] for row in solution.history], "o-", label="after the flow")
left.plot(rounds, [row["value"] for row in solution.history], "s-", label="after the program")
left.set(xlabel="round", ylabel="J", xticks=rounds)
left.legend()
for index, masses in enumerate(solution.network.masses, start=1):
    right.plot(masses.sort(descending=True).values, "o-", label=f"layer {index}")
right.set(xlabel="features, the heaviest first", ylabel="mass")
right.legend()

# %%
# Are images that it has not seen told apart? `rest` holds them.

predicted = problem.loss.predict(solution.network(digits.rest.inputs))
print(f"{(predicted == digits.rest.indices).double().mean():.1%} of {len(digits.rest)} images held out are right")
plt.show()
