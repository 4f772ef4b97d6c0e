"""Trained classifiers in plain values: which images, which network, which recipe, which seed; trained once, kept in a
store.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from meanfield import data
from meanfield.activations import ACTIVATIONS
from meanfield.bench import provenance, reading
from meanfield.bench.options import OBJECTIVE, Data, Device, Dtype, Pool, Settings, at_least, choice, option
from meanfield.bench.stored import Stored
from meanfield.bench.sweep import Cell
from meanfield.finite import AUTHORS_DROPOUT, Fitted, Recipe, cnn, fit, mlp, residual, vgg
from meanfield.finite.recipes import LOSSES, PENALTIES, increasing_epochs
from meanfield.validation import Misuse, nonnegative, positive

VGGS = ("vgg8", "vgg11", "vgg13", "vgg16")
RESIDUALS: dict[str, dict[str, Any]] = {
    "residual": {"batch_norm": False},
    "residual_bn": {"batch_norm": True},
    "resnet18": {"batch_norm": True, "blocks": (2, 2, 2, 2)},  # of width 64
}
NETWORKS = ("mlp", "cnn", *VGGS, *RESIDUALS)
PRESETS = ("default", "authors")
MILESTONES = (2 / 3, 13 / 15)  # of the default recipe, as shares of its epochs
LABELS = ("true", "permuted")
KIND = "meanfield classifier 1"  # of a file of the store

WeightPenalty = Annotated[
    str, option(f"{', '.join(PENALTIES)}: penalty on the weights of every layer.", OBJECTIVE), choice(PENALTIES)
]


@dataclass(frozen=True, kw_only=True)
class Classifier(Settings):
    """A network, its images and its training.  Plain values throughout, as in a Task.

    data, pool: as in `data.load`, all classes.  samples: images to train on; the rest is held out.  split: seed by
        which they are drawn, None for the first ones in file order (CIFAR's own division into training and test
        images).
    network, width: "mlp" (two hidden layers of `width` units), "cnn", "vgg11" and so on, "residual" or, with batch
        norm, "residual_bn" and the deeper "resnet18", see `finite`.  activation: of all layers.  scale: factor of the
        weights of the start.  penalty, strength, loss: as in Recipe.  learning_rate: None is the preset's.
    labels: "true", or "permuted" among the training images (the permutation drawn from the seed).
    seed: of the start, the batches and the permutation.
    preset: "default" (Recipe's defaults, milestones at 2/3 and 13/15 of the epochs) or "authors" (Recipe.authors for
        `epochs` epochs; of a VGG also dropout 1/2 and the plain He start).
    checkpoints: epochs whose networks are kept, 0 the start.
    """

    data: Data = "digits"
    pool: Pool = 1
    samples: Annotated[int, at_least(2)] = 1437
    split: Annotated[int | None, at_least(0)] = 0
    network: Annotated[str, choice(NETWORKS)] = "vgg11"
    width: Annotated[int, at_least(1)] = 8
    activation: Annotated[str, choice(ACTIVATIONS)] = "relu"
    scale: Annotated[float, positive] = 1.0
    loss: Annotated[str, choice(LOSSES)] = "cross_entropy"
    penalty: WeightPenalty = "l12"
    strength: Annotated[float, nonnegative] = 1.0
    learning_rate: Annotated[float | None, positive] = None
    labels: Annotated[str, choice(LABELS)] = "true"
    seed: Annotated[int, at_least(0)] = 0
    epochs: Annotated[int, at_least(1)] = 30
    preset: Annotated[str, choice(PRESETS)] = "default"
    checkpoints: Annotated[tuple[int, ...], partial(increasing_epochs, minimum=0)] = (0, 30)
    dtype: Dtype = "float32"
    device: Device = "cpu"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.checkpoints or self.checkpoints[-1] > self.epochs:
            raise Misuse("checkpoints", self.checkpoints, f"must be increasing epochs up to epochs={self.epochs}")
        _ = self.recipe  # refuses a strength without a penalty

    @property
    def recipe(self) -> Recipe:
        changes: dict[str, Any] = {"epochs": self.epochs, "loss": self.loss}
        if self.learning_rate is not None:
            changes["learning_rate"] = self.learning_rate
        if self.preset == "authors":
            return replace(Recipe.authors(self.penalty, self.strength), **changes)
        milestones = tuple(round(share * self.epochs) for share in MILESTONES) if self.epochs >= 5 else ()
        return Recipe(milestones=milestones, penalty=self.penalty, strength=self.strength, **changes)

    def images(self) -> Images:
        return _images(self.data, self.pool, self.samples, self.split, self.dtype, self.device, data.stamp(self.data))

    def training_labels(self) -> Tensor:
        """What the training images are trained on, (N,): their own labels, or these permuted."""
        labels = self.images().labels
        if self.labels == "true":
            return labels
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(self.seed))
        return labels[order.to(labels.device)]

    def start(self) -> nn.Module:
        """The network before training."""
        network = self._drawn()
        with torch.no_grad():
            for tensor in network.parameters():
                if tensor.ndim > 1 and self.scale != 1:
                    tensor *= self.scale
        return network

    def _drawn(self) -> nn.Module:
        """As `finite` starts it."""
        images, generator = self.images(), torch.Generator().manual_seed(self.seed)
        place = (tuple(images.inputs.shape[1:]), images.classes)
        common: dict[str, Any] = {
            "activation": self.activation,
            "generator": generator,
            "dtype": getattr(torch, self.dtype),
        }
        if self.network == "mlp":
            return mlp(*place, hidden=(self.width, self.width), **common)
        if self.network == "cnn":
            return cnn(*place, width=self.width, **common)
        if self.network in RESIDUALS:
            return residual(*place, width=self.width, **RESIDUALS[self.network], **common)
        plain = self.preset == "authors"
        return vgg(
            int(self.network.removeprefix("vgg")),
            *place,
            width=self.width,
            dropout=AUTHORS_DROPOUT if plain else 0.0,
            fan_in="kernel" if plain else "inside",
            **common,
        )

    def train(self, store: str | Path) -> Fitted:
        """Train, and write the checkpoints into the directory `store`; a run that was killed goes on after its last
        whole epoch.

        Files are named by all settings, the images, the whole library and torch's version: a change of any of them
        trains anew.
        """
        stored, inputs, labels = self._stored(store), self.images().inputs, self.training_labels()
        options: dict[str, Any] = {"checkpoints": self.checkpoints}
        found = stored.resumed(
            lambda state: fit(self.start(), inputs, labels, self.recipe, self.seed, state=state, **options)
        )
        if found.status == "interrupted":
            raise KeyboardInterrupt
        if found.status != "completed":
            raise ValueError(
                f"{self.network} does not train at strength={self.strength:g} of penalty={self.penalty!r}: "
                f"{found.message}"
            )
        stored.write(_flat(found.checkpoints))
        return found

    def at(self, epoch: int, store: str | Path) -> nn.Module:
        """The network at one of its checkpoints, in evaluation mode, from the store or trained now.

        A file that is damaged, or holds another network than its name says, is named in a warning, and the network
        trained anew.
        """
        if epoch not in self.checkpoints:
            raise Misuse("epoch", epoch, f"is not one of checkpoints={self.checkpoints}")
        network = self.start()
        if epoch:
            kept = self._stored(store).read()
            if kept is None:
                kept = _flat(self.train(store).checkpoints)
            network.load_state_dict(
                {name.split("/", 1)[1]: tensor for name, tensor in kept.items() if name.startswith(f"{epoch}/")}
            )
        return network.to(self.device).eval()

    def _stored(self, store: str | Path) -> Stored:
        return Stored(store, KIND, self.decided())

    def decided(self) -> dict[str, Any]:
        """Everything that decides the weights, of JSON kinds."""
        named = {**self.to_dict(), "images": self.images().digest}
        return {**named, "library": provenance.library(), "versions": provenance.versions(provenance.NUMERICAL)}


@dataclass(frozen=True, eq=False)
class Images:
    """Training images (N, C, H, W) and class indices (N,), the same held out, a digest of all of them, and what was
    read in a line.
    """

    inputs: Tensor
    labels: Tensor
    held_out: Tensor
    held_out_labels: Tensor
    classes: int
    digest: str
    summary: str


@lru_cache(maxsize=2)
def _images(name: str, pool: int, samples: int, split: int | None, dtype: str, device: str, stamp: int) -> Images:
    selected = reading.images(name, samples=samples, pool=pool, seed=split)
    if selected.rest is None:
        raise Misuse("samples", samples, f"are all images of {selected.name}; leave some to be held out")
    training, held_out = selected.split()
    parts = (training.inputs, training.indices, held_out.inputs, held_out.indices)
    digest = sha256(b"".join(each.numpy().tobytes() for each in parts)).hexdigest()[:16]
    inputs, labels, others, marks = (each.to(device) for each in parts)
    kind = getattr(torch, dtype)
    return Images(inputs.to(kind), labels, others.to(kind), marks, len(training.classes), digest, selected.summary)


def _flat(checkpoints: dict[int, dict[str, Tensor]]) -> dict[str, Tensor]:
    return {f"{epoch}/{name}": tensor for epoch, kept in checkpoints.items() for name, tensor in kept.items()}


def networks_of(cells: Sequence[Cell]) -> list[Cell]:
    """The networks (fields of a Classifier) that cells name in "networks", each once, in the order of first need."""
    return list({str(each): each for cell in cells for each in cell.get("networks", ())}.values())


def layers_of(network: nn.Module) -> Sequence[str]:
    """Names of the connecting layers of a VGG: convolutions and fully connected layers, in their order."""
    return [name for name, module in network.named_children() if isinstance(module, (nn.Conv2d, nn.Linear))]
