"""Anderson acceleration of a fixed-point iteration, on the device: nothing here waits for a number
to reach the host.
"""

from __future__ import annotations

import torch
from torch import Tensor

MEMORY, PERIOD, SHRINK, REACH, RIDGE = 20, 5, 1.0, 10.0, 1e-10


class Anderson:
    """Safeguarded Anderson acceleration, type II: every PERIOD steps, the best affine combination of the last MEMORY
    ones.

    Walker & Ni 2011, eq. (2.2).  A jump counts only if the step taken from it is at most SHRINK times as long as the
    last one before it, else the iteration goes on from where it jumped (the safeguard of Zhang, O'Donoghue & Boyd 2020,
    with the steps of the map itself, which never grow, as its measure).  While the state drifts in steps of equal
    length, all combinations are as good as each other: hence a jump goes at most REACH times as far as the steps
    in memory went together.
    """

    def __init__(self) -> None:
        self.changes = self.images = self.gram = self.lengths = torch.empty(0)
        self.forget()

    def forget(self) -> None:
        """The map has changed: earlier steps say nothing about it."""
        self.steps, self.before = 0, None

    def advance(self, state: Tensor, change: Tensor, metric: Tensor) -> Tensor:
        """The next state after `state`, (n,), where the map moves it by `change`; lengths are
        those of metric * change.
        """
        scaled = metric * change
        length = torch.linalg.vector_norm(scaled)
        image = state + change
        if self.before is not None:  # this step was taken from a jump
            kept = length <= SHRINK * self.before[2]
            image, scaled, length = (torch.where(kept, *pair) for pair in zip((image, scaled, length), self.before))
        self._remember(image, scaled, length)
        jump = self.steps % PERIOD == 0
        self.before = (image, scaled, length) if jump else None
        return self._combination(image, metric) if jump else image

    def _remember(self, image: Tensor, change: Tensor, length: Tensor) -> None:
        """Keep by how much image and change differ from those of the step before; of the first step nothing is used."""
        if self.images.shape != (MEMORY, len(image)):
            self.images, self.changes = image.new_empty(MEMORY, len(image)), image.new_empty(MEMORY, len(image))
            self.gram, self.lengths = image.new_empty(MEMORY, MEMORY), image.new_empty(MEMORY)
        here = self.steps % MEMORY
        if self.steps:
            torch.sub(image, self.last[0], out=self.images[here])
            torch.sub(change, self.last[1], out=self.changes[here])
        else:
            self.images[here], self.changes[here] = 0.0, 0.0
        self.lengths[here] = length
        self.last = image, change
        self.steps += 1

    def _combination(self, image: Tensor, metric: Tensor) -> Tensor:
        """sum a_k image_k with sum a_k = 1 and least |sum a_k change_k|, slightly regularised.

        Each image_k - image is minus the sum of the differences that came after it, and so are the changes: their
        inner products follow from those of the differences, of which only the last PERIOD are new.
        """
        count, last = min(self.steps, MEMORY), (self.steps - 1) % MEMORY
        new = slice(last + 1 - PERIOD, last + 1)  # PERIOD divides MEMORY
        self.gram[new, :count] = self.changes[new] @ self.changes[:count].T
        self.gram[:count, new] = self.gram[new, :count].T
        ages = (last - torch.arange(count, device=image.device)) % MEMORY
        later = (ages < ages[:, None]).to(image.dtype)  # (k, m): m came after k
        gram = later @ self.gram[:count, :count] @ later.T
        eps, tiny = torch.finfo(gram.dtype).eps, torch.finfo(gram.dtype).tiny
        ridge = max(RIDGE, 10 * eps) * gram.diagonal().mean() + tiny
        shares = torch.linalg.solve_ex(
            gram + ridge * torch.eye(count, dtype=gram.dtype, device=gram.device),
            later @ (self.changes[:count] @ self.last[1]),
        )[0]
        jump = -((shares @ later) @ self.images[:count])
        jump = torch.where(jump.isfinite(), jump, 0.0)  # of a singular system
        travelled = self.lengths[:count].sum()
        reach = REACH * travelled / torch.linalg.vector_norm(metric * jump).clamp_min(tiny)
        return image + reach.clamp_max(1) * jump
