"""Recipes of training: SGD with momentum, warm-up, milestones, the l_{1,2} regulariser."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from meanfield import losses, validation
from meanfield.signatures import checked
from meanfield.validation import Misuse

PENALTIES = ("none", "l12", "l2")
L12_STRENGTHS = (0.5, 1.0, 2.0, 4.0, 8.0, 10.0)  # those of the grafting experiment of Gu et al. 2020
L2_STRENGTHS = tuple(5e-4 * factor for factor in (1, 4, 16, 24, 28))
AUTHORS_DROPOUT = 0.5  # of their networks, before every fully connected layer
AUTHORS_RATE = 0.01
AUTHORS_STRONG_RATES = (0.002, 0.001)  # at the last two strengths of either penalty


def squared(outputs: Tensor, labels: Tensor, reduction: str = "mean") -> Tensor:
    """1/2 |F - e_c|^2 of outputs F (N, K) at classes c (N,), image by image, (N,): their mean, sum, or with
    "none" themselves, as torch's own losses have it.
    """
    targets = functional.one_hot(labels, outputs.shape[1]).to(outputs)
    return _reduced(losses.SquaredLoss().value(outputs, targets), reduction)


# outputs (N, K), classes (N,), reduction="mean"; the losses of a problem take targets, see `of_classes`
LOSSES: dict[str, Callable[..., Tensor]] = {"cross_entropy": functional.cross_entropy, "squared": squared}


def known(loss: Any, argument: str = "loss") -> Any:
    """A name of LOSSES, or an object of `losses.Loss`; Misuse otherwise."""
    return loss if isinstance(loss, losses.Loss) else validation.one_of(loss, argument, LOSSES)


def of_classes(loss: str | losses.Loss) -> Callable[..., Tensor]:
    """A loss as a function of outputs (N, K) and classes (N,), with reduction "mean", "sum" or "none"."""
    if isinstance(loss, str):
        return LOSSES[loss]

    def found(outputs: Tensor, labels: Tensor, reduction: str = "mean") -> Tensor:
        count = outputs.shape[1]
        if loss.outputs_for(count) != count:
            remedy = f"reads {count} classes from {loss.outputs_for(count)} output, and the network has {count}"
            raise Misuse("loss", loss.name, remedy)
        targets = loss.encode(labels, count)
        targets = targets.to(outputs) if targets.is_floating_point() else targets
        return _reduced(loss.value(outputs, targets), reduction)

    return found


def _reduced(values: Tensor, reduction: str) -> Tensor:
    return {"mean": Tensor.mean, "sum": Tensor.sum, "none": Tensor.clone}[reduction](values)


@checked
def l12(weight: Tensor) -> Tensor:
    """The l_{1,2} regulariser of Gu et al. 2020, 0-dimensional, of a weight (c_out, c_in, ...) in torch's layout.

    mean over c_in of (mean over c_out and kernel offsets of sqrt(c_in) |w|)^2

    For a kernel of k^2 offsets this is 1 / (c_in k^4) times the source penalty of strength 1 with the kernel norm l1 of
    the same layer in the mean-field scaling: that has uniform masses and kernels w_mf = c_in w, hence
    sum_i p_i (sum_j p_j |w_mf,ji|_1)^2 = 1/c_in sum_i (c_in k^2 mean_(j, offsets) |w_ji|)^2 = c_in k^4 l12(w).
    """
    if weight.ndim < 2:
        raise ValueError(f"weight has shape {tuple(weight.shape)}; expected (c_out, c_in, ...)")
    per_source = weight.abs().mean([axis for axis in range(weight.ndim) if axis != 1])
    return per_source.square().sum()  # sqrt(c_in)^2 cancels the 1 / c_in of the outer mean


@checked
def regulariser(network: nn.Module, kind: str) -> Tensor:
    """Sum of a penalty over the weights of the network, the parameters of at least two dimensions; 0-dimensional.

    kind: "l12" (see `l12`), "l2" (half the sum of squares, so that its strength is a weight decay) or "none" (zero).
    """
    validation.one_of(kind, "kind", PENALTIES)
    weights = [parameter for parameter in network.parameters() if parameter.ndim > 1]
    if kind == "none" or not weights:
        like = next(network.parameters(), torch.zeros(()))
        return like.new_zeros(())
    return torch.stack([l12(weight) if kind == "l12" else 0.5 * weight.square().sum() for weight in weights]).sum()


@dataclass(frozen=True)
class Recipe:
    """How `fit` trains a classifier; plain values: Recipe(**json.loads(json.dumps(dataclasses.asdict(recipe)))) ==
    recipe.

    The defaults are for small grey images: VGG-11 of width 8 reaches 95% on held-out 8x8 digits, with l12 of strength
    0.5 to 2 too.

    epochs: passes over the images.  batch_size: images per step; the last batch of an epoch may be smaller.
    learning_rate: of SGD; momentum is Nesterov's, 0 for none.  See `rate_at` for milestones, decay and warm_up.
    penalty, strength: strength times `regulariser` of this kind is added to the mean loss of the batch.
    loss: "cross_entropy", or "squared": half the squared distance from 1 at the own class and 0 at the others;
        or an object of `losses.Loss`, which is no plain value and stays in its process.
    augment: every image is padded by zeros, cropped to its size at a random place and mirrored left to right with
        probability 1/2, anew in every epoch; the padding is side // 8, 4 pixels at 32x32.
    """

    epochs: int = 30
    batch_size: int = 64
    learning_rate: float = 0.01
    momentum: float = 0.9
    milestones: tuple[int, ...] = (20, 26)
    decay: float = 0.2
    warm_up: int = 1
    penalty: str = "none"
    strength: float = 0.0
    augment: bool = False
    loss: Any = "cross_entropy"

    def __post_init__(self) -> None:
        for name, minimum in (("epochs", 1), ("batch_size", 1), ("warm_up", 0)):
            object.__setattr__(self, name, validation.integer(getattr(self, name), name, minimum))
        for name, check in (
            ("learning_rate", validation.positive),
            ("decay", validation.positive),
            ("strength", validation.nonnegative),
        ):
            object.__setattr__(self, name, check(getattr(self, name), name))
        object.__setattr__(self, "milestones", increasing_epochs(self.milestones, "milestones", 1))
        if validation.nonnegative(self.momentum, "momentum") >= 1:
            raise Misuse("momentum", self.momentum, "must be at least 0 and less than 1")
        object.__setattr__(self, "momentum", float(self.momentum))
        if validation.one_of(self.penalty, "penalty", PENALTIES) == "none" and self.strength:
            raise Misuse("strength", self.strength, "needs a penalty: 'l12' or 'l2', not 'none'")
        object.__setattr__(self, "augment", validation.boolean(self.augment, "augment"))
        known(self.loss)

    @classmethod
    def authors(cls, penalty: str = "none", strength: float = 0.0) -> Recipe:
        """The recipe of the grafting experiment of Gu et al. 2020 on CIFAR, as their code has it; dropout,
        AUTHORS_DROPOUT, is the network's.

        The learning rate is 0.01, but 0.002 and 0.001 from the last two of L12_STRENGTHS or L2_STRENGTHS on.
        """
        rate, strength = AUTHORS_RATE, validation.nonnegative(strength, "strength")
        ladder = {"l12": L12_STRENGTHS, "l2": L2_STRENGTHS}.get(penalty, ())
        for first, lower in zip(ladder[-2:], AUTHORS_STRONG_RATES):
            rate = lower if strength >= first else rate
        schedule: dict[str, Any] = {"epochs": 200, "milestones": (60, 120, 180), "decay": 0.2, "warm_up": 1}
        return cls(
            **schedule,
            batch_size=64,
            learning_rate=rate,
            momentum=0.9,
            penalty=penalty,
            strength=strength,
            augment=True,
        )

    def rate_at(self, step: int, steps_per_epoch: int) -> float:
        """Learning rate of step 0, 1, ...: learning_rate times decay for every milestone (an epoch count from the
        start) that has passed.

        During the first warm_up epochs it rises linearly, from the first step's 1 / (warm_up steps_per_epoch) of it to
        the whole.  Milestones from `epochs` on have no effect.
        """
        passed = sum(step >= milestone * steps_per_epoch for milestone in self.milestones)
        rising = self.warm_up * steps_per_epoch
        return self.learning_rate * self.decay**passed * min(1.0, (step + 1) / max(rising, 1))


def increasing_epochs(value: Any, argument: str, minimum: int) -> tuple[int, ...]:
    """Increasing epochs."""
    if isinstance(value, (str, bytes)) or not isinstance(value, Iterable):
        raise Misuse(argument, value, "must be a sequence of epochs")
    found = tuple(validation.integer(entry, argument, minimum) for entry in value)
    if any(later <= earlier for earlier, later in itertools.pairwise(found)):
        raise Misuse(argument, found, "must be increasing epochs")
    return found
