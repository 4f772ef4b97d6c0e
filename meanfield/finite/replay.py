"""A training repeated from another start, step by step: the steps as they were, or errors through the source's weights.

Source and follower go side by side, on the same batches, so that no step has to be stored.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated

import torch
from torch import Tensor, nn
from torch.func import functional_call

from meanfield.finite.feedback import KINDS, fed_back
from meanfield.finite.fitting import Fitted, Step, fit, optimiser_of
from meanfield.finite.recipes import Recipe, of_classes, regulariser
from meanfield.signatures import Seed, checked
from meanfield.validation import Misuse, choice

LOOPS = ("open", "closed")


@dataclass(frozen=True, eq=False)
class Replayed:
    """network: the follower after the last step, in evaluation mode.  source: the training it followed.

    agreement: name of a parameter -> share of its entries, over all steps, that the follower moved as its own gradient
    would have: sign(step) = -sign(gradient of its own loss), entries where either is zero left out.  One half is
    chance; nan where nothing was left.
    """

    network: nn.Module
    source: Fitted
    agreement: dict[str, float] = field(repr=False)


@checked
@torch.inference_mode(False)
def replay(
    source: nn.Module,
    other: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    recipe: Recipe,
    seed: Seed = 0,
    loop: Annotated[str, choice(LOOPS)] = "open",
) -> Replayed:
    """Train `source` by `fit`, and let `other`, another start of the same layers, follow at every step.

    loop: "open" adds the source's own step, whatever the follower's errors: at the end it is other + Delta, to
        rounding.  "closed" makes a step of the same recipe from the follower's own signals and output errors, which go
        backward through the source's weights of that moment.
    Both networks are copied.  Where they have batch norm, running statistics are the follower's own.
    """
    shapes = [{name: tuple(each.shape) for name, each in network.state_dict().items()} for network in (source, other)]
    for name in {**shapes[0], **shapes[1]}:
        here, there = (each.get(name, "missing") for each in shapes)
        if here != there:
            raise Misuse("other", name, f"is {there} there and {here} in source: give the same layers")
    follower = (_Open if loop == "open" else _Closed)(source, other, inputs, recipe)
    trained = fit(source, inputs, labels, recipe, seed, follow=follower.step)
    return Replayed(follower.network.eval(), trained, follower.agreement())


class _Follower:
    """A network that makes a step after every step of the source."""

    def __init__(self, source: nn.Module, other: nn.Module, like: Tensor, recipe: Recipe) -> None:
        self.before = _copies(copy.deepcopy(source).to(like))
        self.network, self.recipe = copy.deepcopy(other).to(like).train(), recipe
        self.free = {name: each for name, each in self.network.named_parameters() if each.requires_grad}
        self.agreeing = {name: torch.zeros(2, dtype=torch.float64) for name in self.free}

    def step(self, step: Step) -> None:
        devices = [step.images.device] if step.images.device.type == "cuda" else []
        with torch.random.fork_rng(devices):  # dropout here leaves that of the source as it is
            start, gradients = _copies(self.network), self.gradients(self.network, step)
            self.move(step)
        self.before = _copies(step.network)
        for name, parameter in self.free.items():
            signs = (parameter.detach() - start[name]).sign() * -gradients[name].sign()
            self.agreeing[name] += torch.stack([(signs > 0).sum(), (signs != 0).sum()]).double().cpu()

    def move(self, step: Step) -> None:
        raise NotImplementedError

    def gradients(self, forward: Callable[[Tensor], Tensor], step: Step) -> dict[str, Tensor]:
        """Of the follower's own objective on the batch, with its parameters in `forward`."""
        loss = of_classes(self.recipe.loss)(forward(step.images), step.labels)
        if self.recipe.strength:
            loss = loss + self.recipe.strength * regulariser(self.network, self.recipe.penalty)
        return dict(zip(self.free, torch.autograd.grad(loss, list(self.free.values()))))

    def agreement(self) -> dict[str, float]:
        return {name: float(hits / count) for name, (hits, count) in self.agreeing.items()}


class _Open(_Follower):
    @torch.no_grad()
    def move(self, step: Step) -> None:
        after = dict(step.network.named_parameters())
        for name, parameter in self.free.items():
            parameter += after[name] - self.before[name]


class _Closed(_Follower):
    def __init__(self, source: nn.Module, other: nn.Module, like: Tensor, recipe: Recipe) -> None:
        super().__init__(source, other, like, recipe)
        self.fed = fed_back(self.network, self.sources())
        self.optimiser = optimiser_of(list(self.free.values()), recipe)

    def sources(self) -> dict[str, Tensor]:
        """The source's, before its step, by the name of the layer."""
        named = self.network.named_modules()
        return {name: self.before[f"{name}.weight".lstrip(".")] for name, module in named if type(module) in KINDS}

    def move(self, step: Step) -> None:
        for name, weight in self.sources().items():
            self.fed.get_submodule(name).get_buffer("feedback").copy_(weight)
        mine: dict[str, Tensor] = dict(self.network.named_parameters())
        for name, gradient in self.gradients(lambda images: functional_call(self.fed, mine, (images,)), step).items():
            self.free[name].grad = gradient
        self.optimiser.param_groups[0]["lr"] = step.rate
        self.optimiser.step()


def _copies(network: nn.Module) -> dict[str, Tensor]:
    return {name: each.detach().clone() for name, each in network.named_parameters()}
