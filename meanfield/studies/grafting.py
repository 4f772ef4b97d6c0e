"""Do networks from different starts learn the same features?  Grafts between trained classifiers, and what controls do.

Each measurement is a function of a cell (see `meanfield.sweep`) and of the store of trained networks.  After Gu et al.
2020, section 5; definitions of all arms in docs/grafting.md.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn

from meanfield.classifiers import Classifier, Images, layers_of
from meanfield.distances import FeatureMeasure, linear_cka, median_distance, mmd, moments, sliced_wasserstein
from meanfield.finite import evaluate
from meanfield.grafting import Graft, Junction, layer_errors
from meanfield.grafting.cut import Below
from meanfield.sweep import Cell, Row

PROBES, PROJECTIONS = 100, 200


def train(cell: Cell, store: str) -> list[Row]:
    """Train one classifier into the store: a row per epoch, the last one with its held-out scores."""
    classifier = Classifier.from_dict(cell)
    found, images = classifier.train(store), classifier.images()
    score = evaluate(found.network, images.held_out, images.held_out_labels)
    named = {"seed": classifier.seed, "width": classifier.width, "penalty": classifier.penalty, "strength": classifier.strength}
    kept = [{name: record[name] for name in ("epoch", "loss", "regulariser", "accuracy")} for record in found.history]
    return [{**named, "labels": classifier.labels, **record} for record in kept[:-1]] + [
        {**named, "labels": classifier.labels, **kept[-1], "held_out_accuracy": score.accuracy, "held_out_loss": score.loss}
    ]


def pair(cell: Cell, store: str) -> list[Row]:
    """Grafts of one donor (`lower`) on one host (`upper`), a row per connection and method.

    cell: lower, upper (fields of a Classifier), lower_epoch, upper_epoch, connections ("same": every layer but the first with
    itself; "across": every layer with every later one; or a list of layers), methods, rotated (features of the donor
    turned by a random rotation), and columns to be copied under `names`.

    A row: fit_error over the training images; error at the connection, output_error at the logits and error_LAYER at
    each layer between, over held-out images; accuracy and loss held out of the graft and of both parents; distances and
    moments of the features that enter the connection, on held-out probes.
    """
    donor, host = Classifier.from_dict(cell["lower"]), Classifier.from_dict(cell["upper"])
    images = host.images()
    lower, upper = donor.at(cell["lower_epoch"], store), host.at(cell["upper_epoch"], store)
    parents = {"upper": upper, "lower": lower}
    scores = {f"{name}_{figure}": value for name, network in parents.items() for figure, value in _score(network, images).items()}
    rows = []
    for lower_layer, layer in _connections(upper, cell["connections"]):
        turned = rotated(lower, lower_layer, donor.seed) if cell["rotated"] else lower
        junction = Junction.observe(turned, upper, layer, images.inputs, lower_layer=lower_layer)
        found = _compared(turned, upper, lower_layer, layer, images) if cell["connections"] != "across" else {}
        for method in cell["methods"]:
            named = {**cell["names"], "lower_layer": lower_layer, "layer": layer, "position": layers_of(upper).index(layer) + 1, "method": method}
            rows.append({**named, **_figures(junction.graft(method), upper, images), **scores, **found})
    return rows


def procedures(cell: Cell, store: str) -> list[Row]:
    """Least squares against the authors' procedure on one pair, a row per layer: errors, accuracies and CPU seconds of both."""
    donor, host = Classifier.from_dict(cell["lower"]), Classifier.from_dict(cell["upper"])
    images = host.images()
    lower, upper = donor.at(cell["lower_epoch"], store), host.at(cell["upper_epoch"], store)
    rows = []
    for _, layer in _connections(upper, cell["connections"]):
        for method in ("least_squares", "adam"):
            began = time.process_time()
            found = Junction.observe(lower, upper, layer, images.inputs).graft(method, seed=donor.seed)
            spent = time.process_time() - began
            rows.append({**cell["names"], "layer": layer, "method": method, **_figures(found, upper, images), "cpu_seconds": spent})
    return rows


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
    return {**score, "fit_error": found.error, "error": errors[found.layer], "output_error": list(errors.values())[-1], **later}


@torch.no_grad()
def _compared(lower: nn.Module, upper: nn.Module, lower_layer: str, layer: str, images: Images) -> Row:
    """Distances of the features that enter the connection from those of the host, each channel a feature."""
    ours, theirs = _features(lower, lower_layer, images.held_out[:PROBES]), _features(upper, layer, images.held_out[:PROBES])
    bandwidth = median_distance(theirs, theirs)
    sliced = sliced_wasserstein(ours, theirs, generator=torch.Generator().manual_seed(0), projections=PROJECTIONS).value
    ends = {"lower": moments(ours), "upper": moments(theirs)}
    statistics = {f"features_{end}_{figure}": value for end, found in ends.items() for figure, value in found._asdict().items()}
    scale = float(theirs.double()[0].square().mean().sqrt())
    return {
        "mmd": mmd(ours, theirs, [bandwidth]).values[0], "sliced_wasserstein": sliced / scale if scale > 0 else float("nan"),
        "cka": linear_cka(ours, theirs), **statistics,
    }  # fmt: skip


def _features(network: nn.Module, layer: str, inputs: Tensor) -> FeatureMeasure:
    signal = Below(network, layer)(inputs).double()
    return FeatureMeasure.uniform((signal.transpose(0, 1) if signal.ndim == 4 else signal.T).flatten(1))
