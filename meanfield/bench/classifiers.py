"""Trained classifiers in plain values: which images, which network, which recipe, which seed; trained once, kept in a
store.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from hashlib import sha256
from pathlib import Path
from typing import Annotated

import torch
from torch import Tensor, nn

from meanfield import data, storage
from meanfield.bench import provenance, reading
from meanfield.bench.options import OBJECTIVE, Data, Device, Dtype, Pool, Settings, at_least, choice, option
from meanfield.finite import AUTHORS_DROPOUT, Fitted, Recipe, fit, residual, vgg
from meanfield.finite.recipes import PENALTIES, increasing_epochs
from meanfield.validation import Misuse, nonnegative

VGGS = ("vgg8", "vgg11", "vgg13", "vgg16")
NETWORKS = (*VGGS, "residual")
PRESETS = ("default", "authors")
MILESTONES = (2 / 3, 13 / 15)  # of the default recipe, as shares of its epochs
LABELS = ("true", "permuted")

WeightPenalty = Annotated[
    str, option(f"{', '.join(PENALTIES)}: penalty on the weights of every layer.", OBJECTIVE), choice(PENALTIES)
]


@dataclass(frozen=True, kw_only=True)
class Classifier(Settings):
    """A network, its images and its training.  Plain values throughout, as in a Task.

    data, pool: as in `data.load`, all classes.  samples: images to train on; the rest is held out.  split: seed by
        which they are drawn, None for the first ones in file order (CIFAR's own division into training and test
        images).
    network, width: "vgg11" and so on (finite.vgg), or "residual".  penalty, strength: as in Recipe.
    labels: "true", or "permuted" among the training images (the permutation drawn from the seed).
    seed: of the start, the batches and the permutation.
    preset: "default" (Recipe's defaults, milestones at 2/3 and 13/15 of the epochs) or "authors" (Recipe.authors for
        `epochs` epochs, dropout 1/2, plain He start).
    checkpoints: epochs whose networks are kept, 0 the start.
    """

    data: Data = "digits"
    pool: Pool = 1
    samples: Annotated[int, at_least(2)] = 1437
    split: Annotated[int | None, at_least(0)] = 0
    network: Annotated[str, choice(NETWORKS)] = "vgg11"
    width: Annotated[int, at_least(1)] = 8
    penalty: WeightPenalty = "l12"
    strength: Annotated[float, nonnegative] = 1.0
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
        if self.preset == "authors":
            return replace(Recipe.authors(self.penalty, self.strength), epochs=self.epochs)
        milestones = tuple(round(share * self.epochs) for share in MILESTONES) if self.epochs >= 5 else ()
        return Recipe(epochs=self.epochs, milestones=milestones, penalty=self.penalty, strength=self.strength)

    def images(self) -> Images:
        return _images(self.data, self.pool, self.samples, self.split, self.dtype, self.device, data.stamp(self.data))

    def start(self) -> nn.Module:
        """The network before training."""
        images, generator = self.images(), torch.Generator().manual_seed(self.seed)
        shape, dtype = tuple(images.inputs.shape[1:]), getattr(torch, self.dtype)
        if self.network == "residual":
            return residual(shape, images.classes, width=self.width, generator=generator, dtype=dtype)
        plain = self.preset == "authors"
        return vgg(
            int(self.network.removeprefix("vgg")),
            shape,
            images.classes,
            width=self.width,
            dropout=AUTHORS_DROPOUT if plain else 0.0,
            fan_in="kernel" if plain else "inside",
            generator=generator,
            dtype=dtype,
        )

    def train(self, store: str | Path) -> Fitted:
        """Train, and write the checkpoints into the directory `store`; a run that was killed goes on after its last
        whole epoch.

        Files are named by all settings, the images, the whole library and torch's version: a change of any of them
        trains anew.
        """
        images, path = self.images(), self._path(store)
        path.parent.mkdir(parents=True, exist_ok=True)
        labels = images.labels
        if self.labels == "permuted":
            labels = labels[
                torch.randperm(len(labels), generator=torch.Generator().manual_seed(self.seed)).to(labels.device)
            ]
        state = path.with_name(f"{path.stem}.state{storage.TENSORS}")
        found = fit(
            self.start(), images.inputs, labels, self.recipe, self.seed, checkpoints=self.checkpoints, state=state
        )
        if found.status == "interrupted":
            raise KeyboardInterrupt
        if found.status != "completed":
            raise ValueError(
                f"{self.network} does not train at strength={self.strength:g} of penalty={self.penalty!r}: "
                f"{found.message}"
            )
        storage.save_tensors(
            {f"{epoch}/{name}": tensor for epoch, kept in found.checkpoints.items() for name, tensor in kept.items()},
            path,
        )
        return found

    def at(self, epoch: int, store: str | Path) -> nn.Module:
        """The network at one of its checkpoints, in evaluation mode, from the store or trained now."""
        if epoch not in self.checkpoints:
            raise Misuse("epoch", epoch, f"is not one of checkpoints={self.checkpoints}")
        network = self.start()
        if epoch:
            if not self._path(store).exists():
                self.train(store)
            kept = storage.load_tensors(self._path(store))
            network.load_state_dict(
                {name.split("/", 1)[1]: tensor for name, tensor in kept.items() if name.startswith(f"{epoch}/")}
            )
        return network.to(self.device).eval()

    def _path(self, store: str | Path) -> Path:
        named = {**self.to_dict(), "images": self.images().digest}
        named |= {"library": provenance.library(), "versions": provenance.versions(provenance.NUMERICAL)}
        return Path(store) / f"{sha256(json.dumps(named, sort_keys=True).encode()).hexdigest()[:24]}{storage.TENSORS}"


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


def layers_of(network: nn.Module) -> Sequence[str]:
    """Names of the connecting layers of a VGG: convolutions and fully connected layers, in their order."""
    return [name for name, module in network.named_children() if isinstance(module, (nn.Conv2d, nn.Linear))]
