"""The mean loss of a network over images as a function of its parameters."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from meanfield.subject import Subject
from meanfield.validation import Misuse, WrongType

IMAGES = 256  # that pass through a network at a time, where they come in one tensor
Batch = tuple[Tensor, Tensor]
Loss = Callable[[Tensor, Tensor], Tensor]


class Score(NamedTuple):
    """Mean loss, and the share of images of which the largest output (of one output: its sign) is the target's; nan
    where targets are no classes.
    """

    loss: float
    accuracy: float


def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    """-log softmax of outputs (N, K) at classes (N,), image by image (N,)."""
    if outputs.ndim != 2:
        return functional.cross_entropy(outputs, targets.long(), reduction="none")
    # over the few classes of an image after another it takes five times as long
    return functional.nll_loss(torch.log_softmax(outputs.T.contiguous(), 0).T, targets.long(), reduction="none")


class Objective:
    """A network, images with targets, and a loss.

    images, targets: tensors of N rows each; or images is an iterable of batches (inputs, targets), such as a
        DataLoader, read once and kept, and targets is None.  What a loader draws is put back.
    loss: a function of outputs and targets of a batch that gives one value per image, (N,), or their mean, (); a mean
        over batches of unequal size is weighted by their sizes; a `losses.Loss` is one.  Default: the cross-entropy.

    Misuse where a pass gives no tensor or draws random numbers, and where the loss is a sum: tried on two images.
    """

    def __init__(self, subject: Subject, images: Any, targets: Any = None, loss: Loss | None = None) -> None:
        self.subject = subject
        self.batches = batches(images, targets)
        self.loss_of: Loss = cross_entropy if loss is None else loss
        if not callable(self.loss_of):
            raise WrongType("loss", type(loss).__name__, "a function of outputs and targets")
        if loss is None:
            _require_classes(self.batches)
        self.count = sum(len(inputs) for inputs, _ in self.batches)
        self._try(*(part[:2] for part in self.batches[0]))

    def __call__(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """The mean loss over all images, 0-dimensional, differentiable in the parameters."""
        return torch.stack([self.part(parameters, batch) for batch in self.batches]).sum()

    def part(self, parameters: Mapping[str, Tensor], batch: Batch) -> Tensor:
        """What a batch adds to the mean loss over all images."""
        inputs, targets = batch
        return mean(self.loss_of, self.subject(parameters, inputs), targets) * (len(inputs) / self.count)

    @torch.no_grad()
    def _try(self, inputs: Tensor, targets: Tensor) -> None:
        network, device = self.subject.network, inputs.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            before = _generators(device)
            outputs = self.subject(self.subject.parameters, inputs)
            if not all(map(torch.equal, before, _generators(device))):
                remedy = "draws random numbers in evaluation mode, and has no loss that depends on its parameters alone"
                raise Misuse("network", type(network).__name__, remedy)
            if not isinstance(outputs, Tensor):
                raise Misuse("network", type(outputs).__name__, "came back: it must give one tensor, a row per image")
            once = said(self.loss_of, outputs, targets)
            twice = said(self.loss_of, torch.cat([outputs, outputs]), torch.cat([targets, targets]))
        if once.ndim == 0 and bool(once.isfinite() & (once != 0) & torch.isclose(twice, 2 * once, rtol=1e-3, atol=0)):
            raise Misuse("loss", "a sum", "came back: give one value per image, or their mean")

    @torch.no_grad()
    def score(self, parameters: Mapping[str, Tensor]) -> Score:
        """Loss and accuracy, in one pass."""
        loss, right = 0.0, 0.0
        for inputs, targets in self.batches:
            outputs = self.subject(parameters, inputs)
            loss += float(mean(self.loss_of, outputs, targets)) * len(inputs)
            right += float(hits(outputs, targets).sum())
        return Score(loss / self.count, right / self.count)


def data_sets(images: Any, targets: Any = None, held_out: Any = None) -> dict[str, list[Batch]]:
    """Batches by name: those of `images` as "train", and of what is held out.

    held_out: (images, targets) or an iterable of batches, which is "held out" then, or a dict of either by names.
    """
    further = held_out if isinstance(held_out, Mapping) else {} if held_out is None else {"held out": held_out}
    if "train" in further:
        raise Misuse("held_out", "train", "is the name of the first images: give another one")
    return {"train": batches(images, targets)} | {str(name): batches(*_apart(each)) for name, each in further.items()}


def _apart(data: Any) -> tuple[Any, ...]:
    """Images and targets, where they come as two tensors; else batches."""
    return (
        tuple(data) if isinstance(data, (tuple, list)) and len(data) == 2 and isinstance(data[0], Tensor) else (data,)
    )


def scores(objectives: Mapping[str, Objective], parameters: Mapping[str, Tensor]) -> dict[str, float]:
    """ "train loss", "train accuracy" and so on, of every data set."""
    found = {name: objective.score(parameters) for name, objective in objectives.items()}
    return {f"{name} {figure}": value for name, score in found.items() for figure, value in score._asdict().items()}


def mean(loss: Loss, outputs: Tensor, targets: Tensor) -> Tensor:
    """The mean over a batch, 0-dimensional, of what a loss says: a value per image, or their mean."""
    found = said(loss, outputs, targets)
    return found if found.ndim == 0 else found.mean()


def said(loss: Loss, outputs: Tensor, targets: Tensor) -> Tensor:
    """What a loss says of a batch: a value per image, (N,), or their mean, ()."""
    found = loss(outputs, targets)
    if not isinstance(found, Tensor) or found.shape not in ((), (len(outputs),)):
        came = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise Misuse("loss", came, f"came back for {len(outputs)} images: give one value per image, or their mean")
    return found


def hits(outputs: Tensor, targets: Tensor) -> Tensor:
    """1 where the network is right, 0 where it is not, (N,); nan where targets are no classes."""
    if outputs.ndim == 2 and outputs.shape[1] > 1 and targets.ndim == 1 and not targets.is_floating_point():
        return (outputs.contiguous().argmax(1) == targets).double()
    nan = torch.full((len(outputs),), math.nan, dtype=torch.float64, device=outputs.device)
    if outputs[:1].numel() == 1 and targets.numel() == len(targets):
        right = outputs.flatten() * targets.flatten() > 0
        return torch.where((targets.abs() == 1).all(), right.double(), nan)  # the host reads nothing
    return nan


def batches(images: Any, targets: Any = None) -> list[Batch]:
    """Pairs (inputs, targets) of at most IMAGES images, or as they come; empty ones are left out."""
    if isinstance(images, Tensor):
        if not isinstance(targets, Tensor) or targets.ndim == 0 or len(targets) != len(images):
            came = f"{len(targets)} rows" if isinstance(targets, Tensor) and targets.ndim else type(targets).__name__
            raise Misuse("targets", came, f"must be a tensor of {len(images)} rows, one for every image")
        found = list(zip(images.split(IMAGES), targets.split(IMAGES)))
    elif isinstance(images, Iterable) and targets is None:
        with torch.random.fork_rng([]):  # a DataLoader draws a seed for its workers, also where it shuffles nothing
            found = [_pair(batch) for batch in images]
    else:
        kinds = "a tensor, with targets, or an iterable of batches (inputs, targets), without"
        raise WrongType("images", type(images).__name__, kinds)
    found = [(inputs, marks) for inputs, marks in found if len(inputs)]
    if not found:
        raise Misuse("images", "nothing", "must be at least one image")
    return found


def _pair(batch: Any) -> Batch:
    if not isinstance(batch, (tuple, list)) or len(batch) != 2 or not all(isinstance(each, Tensor) for each in batch):
        raise Misuse("images", type(batch).__name__, "must come in batches (inputs, targets), two tensors each")
    inputs, targets = batch
    if len(inputs) != len(targets):
        raise Misuse("images", (len(inputs), len(targets)), "are the numbers of inputs and targets of one batch")
    return inputs, targets


def _generators(device: torch.device) -> list[Tensor]:
    """The states of the global random numbers that a pass on a device may draw from."""
    return [torch.get_rng_state()] + ([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])


def _require_classes(found: list[Batch]) -> None:
    for _, targets in found:
        if targets.is_floating_point() or targets.ndim != 1:
            came = f"{targets.dtype} of shape {tuple(targets.shape)}"
            raise Misuse("targets", came, "must be class indices (N,) for the cross-entropy; or give loss=")
