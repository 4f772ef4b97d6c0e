"""Training of any classifier module by a recipe: batches, augmentation, checkpoints, resuming."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from meanfield import limits, validation
from meanfield.finite.heads import Heads
from meanfield.finite.recipes import Recipe, increasing_epochs, known, regulariser
from meanfield.finite.terms import Batch, Term
from meanfield.losses import Loss
from meanfield.storage.states import StateFile, ended
from meanfield.storage.tensors import digest
from meanfield.validation import Misuse

CROP_DIVISOR = 8  # a crop moves by up to side // 8 pixels: the usual 4 at 32x32
STATUS_TEXTS = {
    "completed": "all epochs were taken",
    "interrupted": "stopped by the user; the network of the last whole epoch is kept",
    "max_seconds": "stopped at the time limit; the network of the last whole epoch is kept",
    "diverged": "the next epoch left the finite numbers, its network is dropped; lower learning_rate or strength, or "
    "raise warm_up",
}


class Score(NamedTuple):
    """Share of images classified correctly and mean loss, the cross-entropy unless another one was asked for."""

    accuracy: float
    loss: float


class Step(NamedTuple):
    """What one step of SGD was taken on: images and labels as they went in, its learning rate, and the network after
    it, in training mode.
    """

    images: Tensor
    labels: Tensor
    rate: float
    network: nn.Module


@dataclass(frozen=True, eq=False)
class Fitted:
    """A trained classifier.

    network: after the last whole epoch, in eval mode.  history: one dict per epoch: epoch (1 for the first), loss (mean
    over the pass, in training mode), regulariser (after the epoch, not times strength), accuracy (of the
    pass), learning_rate (of the last step), seconds (so far).  epochs: whole epochs taken.  status: a key of
    STATUS_TEXTS.  checkpoints: epoch -> the state_dict after it, 0 for the start, see `at`.
    """

    network: nn.Module = field(repr=False)
    history: list[dict[str, Any]] = field(repr=False)
    epochs: int
    seconds: float
    status: str
    message: str
    checkpoints: dict[int, dict[str, Tensor]] = field(default_factory=dict, repr=False)

    def at(self, epoch: int) -> nn.Module:
        """The network at a checkpoint, a copy of its own, in eval mode."""
        if epoch not in self.checkpoints:
            raise Misuse(
                "epoch", epoch, f"was not kept: choose one of {sorted(self.checkpoints)} or name it in checkpoints="
            )
        network = copy.deepcopy(self.network)
        network.load_state_dict(self.checkpoints[epoch])
        return network.eval()


@torch.inference_mode(False)
def fit(
    network: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    recipe: Recipe,
    seed: int = 0,
    *,
    heads: Sequence[Sequence[int]] | None = None,
    terms: Sequence[Term] = (),
    trained: Sequence[str] | None = None,
    checkpoints: Sequence[int] = (),
    state: str | Path | None = None,
    callback: Callable[[dict[str, Any]], None] | None = None,
    follow: Callable[[Step], None] | None = None,
) -> Fitted:
    """Train a copy of a classifier on images (N, ...) and labels (N,), integers from 0; its output is (N, classes).

    The copy takes dtype and device of the inputs; parameters that need no gradient stay as they are.  Batches, dropout
    and augmentation depend on `seed` alone, and the global random numbers are left as they were.
    heads: disjoint groups of outputs, by default one of all: loss and accuracy of an image are those of the outputs in
        the group of its class, and the others get no gradient from it.
    terms: added to the mean loss of every step, see `terms.Term`; the records of the history are without them.
    trained: names of the modules that are trained, by default all.  The rest stays as it is, parameters, statistics of
        batch norm and all, and works as in eval mode.
    checkpoints: increasing epochs after which the state is kept, 0 for the start.
    state: file (.safetensors) to which the whole state of the run is written after every epoch.  A call with the same
        arguments continues from it and ends, on the same machine and as many threads, with the same bits as a run
        without a pause (seconds excepted).  It is removed when the run ends by itself, and refused (ValueError) where
        it is damaged or of other arguments or data.
    callback: called with every record of the history, after the state is written.
    follow: called after every step; it must leave the network as it is.

    Divergence (a loss, parameter or buffer that is not finite) and an interrupt from the keyboard end the run with a
    status.
    """
    if not isinstance(recipe, Recipe):
        raise TypeError(f"recipe must be a Recipe, not {type(recipe).__name__}")
    _check_data(network, inputs, labels)
    if recipe.augment and inputs.ndim != 4:
        raise ValueError(f"augment=True needs inputs of shape (N, C, H, W), not {tuple(inputs.shape)}")
    kept = increasing_epochs(checkpoints, "checkpoints", 0)
    if kept and kept[-1] > recipe.epochs:
        raise Misuse("checkpoints", kept, f"go beyond the {recipe.epochs} epochs of the recipe")
    how = _How(
        recipe, validation.integer(seed, "seed", minimum=0), heads, tuple(terms), _names(network, trained), kept, follow
    )
    run = _Run(network, inputs, labels, how)
    file = None if state is None else StateFile(state, run.settings)
    run.restore(None if file is None else file.load())
    return run.result(ended(file, lambda: _train(run, file, callback)))


@torch.no_grad()
def evaluate(
    network: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    batch_size: int = 500,
    loss: str | Loss = "cross_entropy",
    heads: Sequence[Sequence[int]] | None = None,
) -> Score:
    """Accuracy and mean loss (as of a `Recipe`) in eval mode on images (N, ...) and labels (N,), within
    heads as in `fit`; the network's modes are put back.
    """
    size = validation.integer(batch_size, "batch_size")
    _check_data(network, inputs, labels)
    _check_kind(network, inputs)
    known(loss)
    decided, total, hits = _heads(network, inputs, labels, heads), 0.0, 0
    with _evaluating(network):
        for images, classes in zip(inputs.split(size), labels.split(size)):
            output = network(images)
            total += float(decided.loss(loss, output, classes, "sum"))
            hits += int(decided.hits(output, classes))
    return Score(hits / len(inputs), total / len(inputs))


@contextlib.contextmanager
def _evaluating(network: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in network.modules()}
    network.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _check_data(network: nn.Module, inputs: Tensor, labels: Tensor) -> None:
    validation.instance(network, "network", nn.Module)
    for name, tensor in (("inputs", inputs), ("labels", labels)):
        validation.instance(tensor, name, Tensor)
    if not inputs.is_floating_point() or inputs.ndim < 2 or len(inputs) == 0:
        raise ValueError(
            f"inputs has dtype {inputs.dtype} and shape {tuple(inputs.shape)}; expected floating-point images (N, "
            "...), N >= 1"
        )
    if labels.dtype != torch.int64:
        raise ValueError(
            f"labels has dtype {labels.dtype}; expected torch.int64, the index of the class of every image"
        )
    validation.shaped(labels, (len(inputs),), "labels")
    if labels.device != inputs.device:
        raise ValueError(f"labels are on {labels.device}, inputs on {inputs.device}; move one with .to(...)")


def _check_kind(network: nn.Module, inputs: Tensor) -> None:
    first = next(network.parameters(), inputs)
    if first.dtype != inputs.dtype or first.device != inputs.device:
        raise ValueError(
            f"inputs are {inputs.dtype} on {inputs.device}, the network is {first.dtype} on {first.device}; convert "
            "one with .to(...)"
        )


def _heads(network: nn.Module, inputs: Tensor, labels: Tensor, groups: Sequence[Sequence[int]] | None) -> Heads:
    """Compare the labels with the output for one image: on a GPU a label out of bounds would end the process."""
    with torch.no_grad(), _evaluating(network):
        shape = tuple(network(inputs[:1]).shape)
    if len(shape) != 2:
        raise ValueError(f"network gives an output of shape {shape} for one image; expected (1, classes)")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= shape[1]:
        raise ValueError(
            f"labels reach from {low} to {high}; the network has {shape[1]} outputs, so they must lie in "
            f"0..{shape[1] - 1}"
        )
    heads = Heads(groups, shape[1], inputs.device)
    heads.check(labels)
    return heads


def _names(network: nn.Module, trained: Sequence[str] | None) -> tuple[str, ...]:
    """Of the modules that are trained; "" is the whole network."""
    if trained is None:
        return ("",)
    modules = dict(network.named_modules())
    if isinstance(trained, str) or not all(name in modules for name in trained):
        raise Misuse("trained", trained, f"must be a sequence of names of modules: {', '.join(filter(None, modules))}")
    return tuple(trained)


class _How(NamedTuple):
    """The arguments of `fit` but for network and data."""

    recipe: Recipe
    seed: int
    heads: Sequence[Sequence[int]] | None
    terms: tuple[Term, ...]
    trained: tuple[str, ...]
    checkpoints: tuple[int, ...]
    follow: Callable[[Step], None] | None


class _Run:
    """A network in training with all that its course depends on, its last whole epoch, the history
    and the checkpoints.
    """

    def __init__(self, network: nn.Module, inputs: Tensor, labels: Tensor, how: _How) -> None:
        self.network = copy.deepcopy(network).to(inputs)
        self.heads = _heads(self.network, inputs, labels, how.heads)
        self.inputs, self.labels, self.how, self.recipe = inputs, labels, how, how.recipe
        self.trained = [self.network.get_submodule(name) for name in how.trained]
        free = {parameter: None for module in self.trained for parameter in module.parameters()}
        self.free = [parameter for parameter in free if parameter.requires_grad]  # each once, in order
        if not self.free:
            raise ValueError("network has no parameter that needs a gradient, so there is nothing to train")
        still = {each: None for each in self.network.parameters() if each.requires_grad and each not in free}
        self.still = [each.requires_grad_(False) for each in still]  # until the end
        self.optimiser = optimiser_of(self.free, self.recipe)
        self.generator = torch.Generator().manual_seed(how.seed)
        self.history: list[dict[str, Any]] = []
        self.checkpoints: dict[int, dict[str, Tensor]] = {}
        self.began = time.perf_counter()
        self.last = _clones(self.network)
        self.settings = self._described()
        self._keep()

    def _described(self) -> dict[str, Any]:
        """Everything that decides the run."""
        free = set(self.free)
        frozen = [name for name, parameter in self.network.named_parameters() if parameter not in free]
        # the start does not show a dropout or a stride
        layers = hashlib.sha256(repr(self.network).encode()).hexdigest()
        named = {"network": layers, "start": digest(self.last.values()), "frozen": frozen}
        data = {"data": digest((self.inputs, self.labels)), "device": self.inputs.device.type}
        added = {"heads": self.heads.groups, "terms": [dict(term.settings) for term in self.how.terms]}
        ends = {"trained": self.how.trained, "seed": self.how.seed, "checkpoints": self.how.checkpoints}
        return {**named, **data, **asdict(self.recipe), **added, **ends}

    def train(self) -> None:
        """Training mode of what is trained, eval mode of the rest."""
        self.network.eval()
        for module in self.trained:
            module.train()

    @property
    def epochs(self) -> int:
        return len(self.history)

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.began

    def finish_epoch(self, figures: dict[str, float]) -> dict[str, Any]:
        """Take the network as that of a whole epoch; returns the record."""
        self.last = _clones(self.network)
        with torch.no_grad():
            penalty = float(regulariser(self.network, self.recipe.penalty))
        rate = self.optimiser.param_groups[0]["lr"]
        record = {
            "epoch": self.epochs + 1,
            "loss": figures["loss"],
            "regulariser": penalty,
            "accuracy": figures["accuracy"],
        }
        self.history.append({**record, "learning_rate": rate, "seconds": self.seconds})
        self._keep()
        return self.history[-1]

    def _keep(self) -> None:
        if self.epochs in self.how.checkpoints:
            # of its own: a safetensors file refuses shared memory
            self.checkpoints[self.epochs] = _clones(self.network)

    def result(self, status: str) -> Fitted:
        """The last whole epoch, which an interrupt or a divergence may have left behind."""
        self.network.load_state_dict(self.last)
        self.network.zero_grad(set_to_none=True)
        for parameter in self.still:
            parameter.requires_grad_()
        message = f"{self.epochs} of {self.recipe.epochs} epochs: {STATUS_TEXTS[status]}"
        return Fitted(self.network.eval(), self.history, self.epochs, self.seconds, status, message, self.checkpoints)

    def state(self) -> dict[str, Any]:
        """What `restore` continues from."""
        return {
            "network": self.last,
            "checkpoints": {str(epoch): kept for epoch, kept in self.checkpoints.items()},
            "optimiser": self.optimiser.state_dict()["state"],
            "generator": self.generator.get_state(),
            "history": self.history,
            "seconds": self.seconds,
        }

    def restore(self, state: dict[str, Any] | None) -> None:
        """Continue from what `state` returned; from the start if None."""
        if state is None:
            return
        self.network.load_state_dict(state["network"])
        self.last, self.history = _clones(self.network), state["history"]
        device = self.inputs.device
        self.checkpoints = {
            int(epoch): {name: tensor.to(device) for name, tensor in kept.items()}
            for epoch, kept in state["checkpoints"].items()
        }
        moments = {int(index): entry for index, entry in state["optimiser"].items()}
        self.optimiser.load_state_dict(self.optimiser.state_dict() | {"state": moments})
        self.generator.set_state(state["generator"])
        self.began -= state["seconds"]


def optimiser_of(parameters: Sequence[Tensor], recipe: Recipe) -> torch.optim.SGD:
    momentum = recipe.momentum
    return torch.optim.SGD(parameters, lr=recipe.learning_rate, momentum=momentum, nesterov=momentum > 0)


def _clones(network: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in network.state_dict().items()}


def _train(run: _Run, file: StateFile | None, callback: Callable[[dict[str, Any]], None] | None) -> str:
    """All epochs that are left; returns the status."""
    while run.epochs < run.recipe.epochs:
        figures = _pass(run)
        # looked at once an epoch: a look at every step would wait for the device
        if not math.isfinite(figures["loss"]) or not _all_finite(run.network):
            return "diverged"
        record = run.finish_epoch(figures)
        if file is not None and run.epochs < run.recipe.epochs:
            file.save(run.state())
        if callback is not None:
            callback(record)
    return "completed"


def _pass(run: _Run) -> dict[str, float]:
    """One epoch of steps; mean loss and accuracy over its images."""
    run.train()
    count, size = len(run.inputs), run.recipe.batch_size
    order = torch.randperm(count, generator=run.generator)
    batches = order.split(size)
    loss, hits = run.inputs.new_zeros((), dtype=torch.float64), run.labels.new_zeros(())
    with _own_random_numbers(run.generator, run.inputs.device):
        for index, indices in enumerate(batches):
            limits.look()
            rate = run.recipe.rate_at(run.epochs * len(batches) + index, len(batches))
            found = _step(run, indices.to(run.inputs.device), rate)
            loss, hits = loss + found[0], hits + found[1]
    return {"loss": float(loss) / count, "accuracy": int(hits) / count}


def _step(run: _Run, indices: Tensor, rate: float) -> tuple[Tensor, Tensor]:
    """One step of SGD; summed loss and number of hits of the batch, from before it."""
    recipe, images, labels = run.recipe, run.inputs[indices], run.labels[indices]
    images = augmented(images, run.generator) if recipe.augment else images
    output = run.network(images)
    loss = run.heads.loss(recipe.loss, output, labels)
    objective = loss + recipe.strength * regulariser(run.network, recipe.penalty) if recipe.strength else loss
    for term in run.how.terms:
        objective = objective + term(run.network, Batch(images, labels, output))
    run.optimiser.param_groups[0]["lr"] = rate
    run.optimiser.zero_grad(set_to_none=True)
    objective.backward()
    run.optimiser.step()
    if run.how.follow is not None:
        run.how.follow(Step(images, labels, rate, run.network))
    return loss.detach().double() * len(labels), run.heads.hits(output.detach(), labels)


@contextlib.contextmanager
def _own_random_numbers(generator: torch.Generator, device: torch.device) -> Iterator[None]:
    """Seed the global random numbers, from which dropout draws, by `generator`, and put them back at the end."""
    seed = int(torch.randint(2**62, (), generator=generator))
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would also seed devices that were not forked
        if devices:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


def augmented(images: Tensor, generator: torch.Generator) -> Tensor:
    """Images (N, C, H, W), each padded by zeros, cropped to H x W at a random place and mirrored with probability 1/2.

    The padding is H // 8 rows and W // 8 columns on either side.
    """
    count, _, height, width = images.shape
    down, right = height // CROP_DIVISOR, width // CROP_DIVISOR
    tops = torch.randint(2 * down + 1, (count, 1), generator=generator)
    lefts = torch.randint(2 * right + 1, (count, 1), generator=generator)
    mirrored = torch.randint(2, (count, 1), generator=generator).bool()
    rows, columns = tops + torch.arange(height), lefts + torch.arange(width)
    columns = torch.where(mirrored, columns.flip(1), columns)
    padded = functional.pad(images, (right, right, down, down))
    # the three index tensors broadcast to (N, H, W), which goes before the channels
    chosen = (torch.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :])
    return padded.movedim(1, -1)[tuple(index.to(images.device) for index in chosen)].movedim(-1, 1).contiguous()


def _all_finite(network: nn.Module) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in network.state_dict().values())
