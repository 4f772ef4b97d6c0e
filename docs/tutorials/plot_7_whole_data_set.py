"""
A whole data set, on one or several devices
===========================================

Memory does not grow with the number of images but for the images themselves. This script is the same on a laptop, on a
GPU and on several of them::

    python plot_7_whole_data_set.py
    torchrun --nproc-per-node 2 plot_7_whole_data_set.py
"""

import matplotlib.pyplot as plt
import torch

import meanfield as mf
from meanfield import ranks, starts
from meanfield.solvers import alternating

# %%
# All ten digits, 1,600 images, the rest held out; `mf.data.load` takes a folder of images per class or an .npz as well.
# Nothing below names a device again: it follows the images.

device = "cuda" if torch.cuda.is_available() else "cpu"
digits = mf.data.load("digits", samples=1600)
layers = (mf.Conv(3, padding=1, activation="tanh", pooling="average"),) * 2
architecture = mf.Architecture(digits.input_shape, layers, readout="flatten", outputs=10)
penalty = mf.Penalty(source=3e-5, readout=1.2e-4, input=3e-5)
problem = mf.Problem(architecture, digits.inputs, digits.targets("softmax"), "softmax", penalty).to(device=device)
start = starts.draw(problem, (24, 16), torch.Generator().manual_seed(0), "low_rank")

# %%
# Inside `together` every process holds its share of the images; without torchrun there is one, which holds them all.
# The flow takes minibatches; J, the gap and what is reported are those of all images. With `max_memory="2GiB"` a run
# that will need more is refused before it starts; with `state=` it goes on after a kill, to the same bits.

seen = []
with ranks.together() as group:
    solution = alternating.solve(
        problem.sharded(group), start, rounds=1, flow_steps=200, batch_size=100, callback=seen.append
    )

if ranks.first():  # all processes have the same answer
    print(f"J = {solution.value:.4f}, relative gap {solution.relative_gap:.1e}: {group.count} process, {device}")
    for name, images in (("training", digits), ("held-out", digits.rest)):
        outputs = solution.network(images.inputs.to(device)).cpu()
        print(f"{(outputs.argmax(1) == images.indices).double().mean():.1%} of {len(images)} {name} images right")

# %%
# J of all images, while the flow looks at a hundred at a time.

steps = [row for row in seen if "value" in row and "step" in row]
figure, axis = plt.subplots(figsize=(7, 3.5), layout="constrained")
axis.plot([row["images"] for row in steps], [row["value"] for row in steps], "o-", label="flow")
axis.axhline(solution.value, color="black", linestyle="--", label="after the program")
axis.set(xlabel="images seen", ylabel="J of all images")
axis.legend()
plt.show()
