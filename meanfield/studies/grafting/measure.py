"""Do networks from different starts learn the same features?  Grafts between trained classifiers, and what controls do.

Each measurement is a function of a cell (see `meanfield.bench.sweep`) and of the store of trained networks.  After Gu
et al.
2020, section 5; definitions of all arms in docs/grafting.md.
"""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Sequence
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn

from meanfield.bench.classifiers import Classifier, Images, layers_of
from meanfield.bench.distances import FeatureMeasure, debiased_cka, median_distance, mmd, moments, sliced_wasserstein
from meanfield.bench.sweep import Cell, Row
from meanfield.finite import evaluate
from meanfield.grafting import Graft, Junction, layer_errors
from meanfield.grafting.cut import Below
from meanfield.grafting.errors import Discrepancy
from meanfield.network import along_axis

PROBES, PROJECTIONS = 100, 200
BATCH = 250  # images


def train(cell: Cell, store: str) -> list[Row]:
    """Train one classifier into the store: a row per epoch, the last one with its held-out scores."""
    classifier = Classifier.from_dict(cell)
    found, images = classifier.train(store), classifier.images()
    score = evaluate(found.network, images.held_out, images.held_out_labels)
    named = {
        "seed": classifier.seed,
        "width": classifier.width,
        "penalty": classifier.penalty,
        "strength": classifier.strength,
    }
    kept = [{name: record[name] for name in ("epoch", "loss", "regulariser", "accuracy")} for record in found.history]
    return [{**named, "labels": classifier.labels, **record} for record in kept[:-1]] + [
        {
            **named,
            "labels": classifier.labels,
            **kept[-1],
            "held_out_accuracy": score.accuracy,
            "held_out_loss": score.loss,
        }
    ]


def pair(cell: Cell, store: str) -> list[Row]:
    """Grafts of one donor (`lower`) on one host (`upper`): the rows of `profile`.

    cell: lower, upper (fields of a Classifier), lower_epoch, upper_epoch, methods, connections ("same": every layer
    but the first with itself; "across": every convolution but the first with every later one; or a list of layers),
    rotated (the features of the donor turned by a random rotation), names (columns to be copied).
    """
    lower, upper, images = _ends(cell, store)
    seed = cell["lower"]["seed"]
    named = {
        **cell["names"],
        "lower_seed": seed,
        "upper_seed": cell["upper"]["seed"],
        "lower_epoch": cell["lower_epoch"],
    }
    named["upper_epoch"] = cell["upper_epoch"]
    connections = _connections(upper, cell["connections"])
    donors = (
        [(rotated(lower, each[0], seed), [each]) for each in connections] if cell["rotated"] else [(lower, connections)]
    )
    rows = [row for donor, places in donors for row in profile(donor, upper, images, places, cell["methods"])]
    return [{**named, **row} for row in rows]


def profile(
    lower: nn.Module,
    upper: nn.Module,
    images: Images,
    connections: Sequence[tuple[str, str]],
    methods: Sequence[str] = ("least_squares",),
) -> list[Row]:
    """Grafts of any two modules at each (lower_layer, layer), a row per connection and method.

    fit_error over the training images; error at the connection, output_error at the last linear layer and error_LAYER
    at each one between, over held-out images; accuracy and loss there of the graft and of both parents; mmd,
    sliced_wasserstein (in units of the root mean square of the host's), cka and moments of the features that enter the
    connection.
    """
    parents = {
        f"{end}_{figure}": value
        for end, each in (("upper", upper), ("lower", lower))
        for figure, value in _score(each, images).items()
    }
    names, rows = [name for name, module in upper.named_modules() if isinstance(module, (nn.Conv2d, nn.Linear))], []
    for lower_layer, layer in connections:
        junction = Junction.observe(lower, upper, layer, images.inputs, lower_layer=lower_layer)
        place = {
            "lower_layer": lower_layer,
            "layer": layer,
            "position": names.index(layer) + 1 if layer in names else None,
        }
        compared = _compared(junction, images.held_out[:PROBES])
        for method in methods:
            rows.append(
                {**place, "method": method, **_figures(junction.graft(method), upper, images), **parents, **compared}
            )
    return rows


def procedures(cell: Cell, store: str) -> list[Row]:
    """Least squares against the authors' procedure on one pair, a row per layer: errors, accuracies and CPU seconds of
    both.
    """
    lower, upper, images = _ends(cell, store)
    rows = []
    for _, layer in _connections(upper, cell["connections"]):
        for method in ("least_squares", "adam"):
            began = time.process_time()
            found = Junction.observe(lower, upper, layer, images.inputs).graft(method, seed=cell["lower"]["seed"])
            spent = time.process_time() - began
            rows.append(
                {
                    **cell["names"],
                    "layer": layer,
                    "method": method,
                    **_figures(found, upper, images),
                    "cpu_seconds": spent,
                }
            )
    return rows


def classes(cell: Cell, store: str) -> list[Row]:
    """What the label alone says of the host: |g - E[g | class]|^2 / |g - mean g|^2 at each layer, held out.

    E[g | class], by class, channel and position, is the mean over training images: the best prediction of g by
    anything that knows the label and nothing else (nan where a class is held out only).  A graft with a smaller error
    knows more of the host's features than the class.
    """
    _, upper, images = _ends(cell, store)
    rows = []
    for _, layer in _connections(upper, cell["connections"]):
        error = _class_error(nn.Sequential(Below(upper, layer), upper.get_submodule(layer)), images)
        rows.append(
            {**cell["names"], "layer": layer, "position": layers_of(upper).index(layer) + 1, "class_error": error}
        )
    return rows


@torch.no_grad()
def _class_error(network: nn.Module, images: Images) -> float:
    sums, counts = None, torch.bincount(images.labels, minlength=images.classes).double()
    for inputs, labels in zip(images.inputs.split(BATCH), images.labels.split(BATCH)):
        found = network(inputs).double()
        sums = found.new_zeros(images.classes, *found.shape[1:]) if sums is None else sums
        sums.index_add_(0, labels, found)
    assert sums is not None
    means, left = sums / along_axis(counts, sums, 0), Discrepancy()
    for inputs, labels in zip(images.held_out.split(BATCH), images.held_out_labels.split(BATCH)):
        left.add(means[labels], network(inputs))
    return left.relative


def rotated(network: nn.Module, layer: str, seed: int) -> nn.Sequential:
    """What enters `layer` of an nn.Sequential turned by a random orthogonal matrix of its channels or units.

    The span of the features stays, their distribution does not: least squares must not notice, transport must.
    """
    children = dict(network.named_children())
    reader: Any = children[layer]
    channels, like = reader.weight.shape[1], reader.weight
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.linalg.qr(torch.randn(channels, channels, generator=generator, dtype=torch.float64)).Q.to(like)
    kernel = {"kernel_size": 1} if isinstance(reader, nn.Conv2d) else {}
    turn: Any = nn.utils.skip_init(type(reader), channels, channels, bias=False, **kernel)
    turn.to(like).load_state_dict({"weight": matrix.reshape(turn.weight.shape)})
    found: OrderedDict[str, nn.Module] = OrderedDict()
    for name, child in children.items():
        if name == layer:
            found["rotation"] = turn
        found[name] = child
    return nn.Sequential(found).eval()


def _ends(cell: Cell, store: str) -> tuple[nn.Module, nn.Module, Images]:
    donor, host = Classifier.from_dict(cell["lower"]), Classifier.from_dict(cell["upper"])
    return donor.at(cell["lower_epoch"], store), host.at(cell["upper_epoch"], store), host.images()


def _connections(network: nn.Module, which: Any) -> list[tuple[str, str]]:
    names = list(layers_of(network))
    if which == "across":
        convolutions = [name for name in names if isinstance(network.get_submodule(name), nn.Conv2d)]
        return [(first, second) for first, second in combinations(convolutions[1:], 2)]
    return [(name, name) for name in (names[1:] if which == "same" else which)]


def _score(network: nn.Module, images: Images) -> dict[str, float]:
    return evaluate(network, images.held_out, images.held_out_labels)._asdict()


def _figures(found: Graft, upper: nn.Module, images: Images) -> Row:
    errors = layer_errors(found, upper, images.held_out)
    later = {f"error_{name}": error for name, error in errors.items()}
    score = _score(found.network, images)
    return {
        **score,
        "fit_error": found.error,
        "error": errors[found.layer],
        "output_error": list(errors.values())[-1],
        **later,
    }


@torch.no_grad()
def _compared(junction: Junction, probes: Tensor) -> Row:
    """Distances of the features that enter the connection from those of the host, each channel (or unit) a feature.

    The donor's features are taken as the connection receives them, resampled where maps are of another size.
    """
    ours, theirs = (FeatureMeasure.uniform(cloud.double()) for cloud in junction.features(probes))
    ends = {"lower": moments(ours), "upper": moments(theirs)}
    found = {
        f"features_{end}_{figure}": value for end, each in ends.items() for figure, value in each._asdict().items()
    }
    scale = float(theirs.values.square().mean().sqrt())
    sliced = sliced_wasserstein(ours, theirs, generator=torch.Generator().manual_seed(0), projections=PROJECTIONS).value
    discrepancy = mmd(ours, theirs, [median_distance(theirs, theirs)]).values[0]
    found |= {
        "mmd": discrepancy,
        "sliced_wasserstein": sliced / scale if scale > 0 else math.nan,
        "cka": debiased_cka(ours, theirs),
    }
    return found
