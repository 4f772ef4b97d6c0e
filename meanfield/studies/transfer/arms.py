"""The arms of a transfer: what is made of a displacement, and the controls beside it.

With theta_0 the start, theta_T the trained network, Delta = theta_T - theta_0 and theta_0' another start of the same
law.  Noise is Gaussian, tensor by tensor of the norm that is named, and in place of what is drawn at a start: weights.
Scales and shifts of batch norm are as in the fresh arm, its statistics those of the training images everywhere.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from meanfield import transfer
from meanfield.bench.classifiers import Classifier
from meanfield.finite.statistics import recompute
from meanfield.landscape.directions import generator_of
from meanfield.starts import normal
from meanfield.subject import Parameters, Subject, moved
from meanfield.transfer import Displacement, StartLaw
from meanfield.validation import Misuse

PREDICTED = ("mlp", "cnn")  # chains, for which `transfer.predict` is
STARTS = 10_000  # seeds of fresh starts of a training, beside those of all trainings


@dataclass(frozen=True, eq=False)
class Trained:
    """A training: theta_0 as a network, Delta, and the classifier that both are of."""

    classifier: Classifier
    start: nn.Module
    displacement: Displacement

    @classmethod
    def of(cls, classifier: Classifier, store: str) -> Trained:
        start = classifier.start().to(classifier.device).eval()
        return cls(classifier, start, Displacement.between(start, classifier.at(classifier.epochs, store)))

    @cached_property
    def law(self) -> StartLaw:
        """Of its start, for networks that `finite` starts by He's rule throughout."""
        return StartLaw.he(self.start).scaled(self.classifier.scale)

    @cached_property
    def drawn(self) -> set[str]:
        """Names of the parameters that a start draws."""
        return {name for name, tensor in self.before.items() if tensor.ndim > 1}

    @property
    def before(self) -> Parameters:
        """theta_0."""
        return self.displacement.subject.parameters

    @cached_property
    def after(self) -> Parameters:
        """theta_T."""
        return moved(self.before, self.displacement.delta, 1)

    @property
    def ratio(self) -> float:
        """|theta_0| / |Delta| of all weights that a start draws."""
        squares = [
            sum(float(each[name].double().square().sum()) for name in self.drawn)
            for each in (self.before, self.displacement.delta)
        ]
        return (squares[0] / squares[1]) ** 0.5

    def predicted(self, alpha: float, images: Tensor, labels: Tensor) -> float | None:
        """The expected accuracy of theta_0' + alpha Delta, no start drawn; None of networks without a prediction."""
        if self.classifier.network not in PREDICTED:
            return None
        return transfer.moments(self.displacement, self.law, images, alpha).accuracy(labels)

    def seed(self, number: int) -> int:
        """Of its draw 0, 1, ...: none of a training."""
        return STARTS * (self.classifier.seed + 1) + number

    def fresh(self, number: int) -> Parameters:
        """theta_0', of the law of the starts."""
        start = self.classifier.variant(seed=self.seed(number)).start()
        return Subject(start.to(self.classifier.device)).parameters

    def at(self, parameters: Parameters) -> nn.Module:
        """The network there, its statistics of batch norm those of the training images."""
        network: nn.Module = self.displacement.subject.at(parameters)
        recompute(network, [self.classifier.images().inputs])
        return network

    def shuffled(self, generator: torch.Generator, consistent: bool) -> Parameters | None:
        """Delta dealt anew; None where particles cannot be told apart, see `Displacement.shuffled`."""
        try:
            return self.displacement.shuffled(generator, consistent).delta
        except Misuse:
            return None


@dataclass(frozen=True, eq=False)
class Draw:
    """What an arm has beside the training: a fresh start, a seed, the weights of another training, and the displacement
    of one on permuted labels.
    """

    fresh: Parameters
    seed: int
    other: Parameters
    permuted: Parameters

    @classmethod
    def of(cls, trained: Trained, number: int, other: Trained | None = None, permuted: Trained | None = None) -> Draw:
        weights = {} if other is None else other.after
        delta = {} if permuted is None else permuted.displacement.delta
        return cls(trained.fresh(number), trained.seed(number), weights, delta)

    @property
    def generator(self) -> torch.Generator:
        """From its beginning: over alpha the noise is one direction."""
        return generator_of(self.seed)


Arm = Callable[[Trained, Draw, float], Parameters | None]


def own(trained: Trained, draw: Draw, alpha: float) -> Parameters:
    """theta_0 + alpha Delta."""
    return moved(trained.before, trained.displacement.delta, alpha)


def fresh(trained: Trained, draw: Draw, alpha: float) -> Parameters:
    """theta_0' + alpha Delta."""
    return moved(draw.fresh, trained.displacement.delta, alpha)


def zero(trained: Trained, draw: Draw, alpha: float) -> Parameters:
    """alpha Delta."""
    nothing = {name: torch.zeros_like(each) if name in trained.drawn else each for name, each in draw.fresh.items()}
    return moved(nothing, trained.displacement.delta, alpha)


def scaled(trained: Trained, draw: Draw, alpha: float) -> Parameters:
    """alpha theta_T."""
    return {name: alpha * tensor for name, tensor in trained.after.items()}


def literal(trained: Trained, draw: Draw, alpha: float) -> Parameters:
    """alpha theta_T + noise of the norm |theta_0' - alpha theta_0|: what the sum is taken for where that difference
    counts as noise.
    """
    difference = moved(draw.fresh, trained.before, -alpha)
    return moved(_noise(trained, difference, draw.generator), trained.after, alpha)


def noise_as_start(trained: Trained, draw: Draw, alpha: float) -> Parameters:
    """Noise of the norm |theta_0'|, + alpha Delta."""
    return moved(_noise(trained, draw.fresh, draw.generator), trained.displacement.delta, alpha)


def noise_as_displacement(trained: Trained, draw: Draw, alpha: float) -> Parameters:
    """theta_0' + alpha times noise of the norm |Delta|."""
    return moved(draw.fresh, _noise(trained, trained.displacement.delta, draw.generator), alpha)


def shuffled(trained: Trained, draw: Draw, alpha: float) -> Parameters | None:
    """theta_0 + alpha Delta, Delta dealt anew among the particles, layers in step."""
    delta = trained.shuffled(draw.generator, True)
    return None if delta is None else moved(trained.before, delta, alpha)


def shuffled_apart(trained: Trained, draw: Draw, alpha: float) -> Parameters | None:
    """theta_0 + alpha Delta, Delta dealt anew in every layer by itself."""
    delta = trained.shuffled(draw.generator, False)
    return None if delta is None else moved(trained.before, delta, alpha)


def of_permuted_labels(trained: Trained, draw: Draw, alpha: float) -> Parameters:
    """theta_0' + alpha Delta of a training on permuted labels."""
    return moved(draw.fresh, draw.permuted, alpha)


def added_back(trained: Trained, draw: Draw, alpha: float) -> Parameters:
    """theta_0' + (theta_0 + alpha Delta): the original start put back."""
    start = {name: each + trained.before[name] if name in trained.drawn else each for name, each in draw.fresh.items()}
    return moved(start, trained.displacement.delta, alpha)


def combined(trained: Trained, draw: Draw, alpha: float) -> Parameters:
    """theta_T + alpha times the weights of another trained network."""
    return moved(trained.after, draw.other, alpha)


ARMS: dict[str, Arm] = {
    "own start": own,
    "fresh start": fresh,
    "zero start": zero,
    "trained, scaled": scaled,
    "literal noise": literal,
    "noise as start": noise_as_start,
    "noise as displacement": noise_as_displacement,
    "shuffled": shuffled,
    "layers shuffled apart": shuffled_apart,
    "permuted labels": of_permuted_labels,
    "start added back": added_back,
    "two trained": combined,
}
FIXED = ("own start", "zero start", "trained, scaled", "two trained")  # nothing is drawn


def _noise(trained: Trained, like: Parameters, generator: torch.Generator) -> Parameters:
    """Gaussian, of the norms of the tensors `like`; in place of what a start draws alone."""
    return {name: _of_norm(tensor, generator) if name in trained.drawn else tensor for name, tensor in like.items()}


def _of_norm(like: Tensor, generator: torch.Generator) -> Tensor:
    drawn = normal(like.shape, generator, like)
    return drawn * (like.norm() / drawn.norm())
