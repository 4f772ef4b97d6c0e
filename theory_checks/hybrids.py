"""Claim 12: networks fitted to features drawn in shares p and 1 - p from two trained networks meet no barrier; raw
weights in between do.

A hybrid of width m has in every layer round(p m) channels of network A and the rest of network B, drawn without
replacement.  On layer 1 the drawn
kernels are kept (a feature IS its kernel).  Above, a third network's kernels are fitted, layer after layer, by least
squares on the training images so that from its own features below it reproduces the drawn channels' pre-activations,
and its readout so that it reproduces p F_A + (1 - p) F_B: the grafting rule of Gu et al. 2020, without labels or
penalties.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

import meanfield as mf
from meanfield import finite, measures
from meanfield.network import Responses
from theory_checks.claim import Axes, Claim, Evidence, Series, Setting

DEPTH, SHARES = 2, tuple(k / 8 for k in range(9))
CLASSES = (0, 1, 2, 3, 4)
RIDGE = 1e-10  # of the mean eigenvalue of the Gram matrix
RESAMPLES = 2000  # of the bootstrap


@dataclass(frozen=True, eq=False)
class Pair:
    """Two trained networks, what they compute on the training images, and the training and the held-out problem."""

    train: mf.Problem
    test: mf.Problem
    networks: tuple[mf.ParticleNetwork, mf.ParticleNetwork]
    responses: tuple[Responses, Responses]

    def twin(self, which: int) -> Pair:
        """The network beside itself."""
        network, responses = self.networks[which], self.responses[which]
        return Pair(self.train, self.test, (network, network), (responses, responses))


@lru_cache(maxsize=1)
def _pairs(setting: Setting) -> tuple[Pair, ...]:
    """The same for the claim and its controls."""
    return tuple(_pair(setting, index) for index in range(setting.instances(1, 3)))


def _pair(setting: Setting, index: int) -> Pair:
    data, held = mf.data.load(
        "digits", classes=CLASSES, samples=setting.either(80, 160), pool=2, seed=setting.derived_seed(12, index)
    ).split(300)
    layer = mf.Conv(3, padding=1, activation="relu")
    architecture = mf.Architecture(data.input_shape, (layer,) * DEPTH, "average", len(data.classes))
    penalty = mf.Penalty(source=1e-5, readout=1e-5, input=1e-5)
    train, test = (
        mf.Problem(architecture, part.inputs, part.targets("softmax"), "softmax", penalty).to(device=setting.device)
        for part in (data, held)
    )
    widths, steps = (setting.either(16, 24),) * DEPTH, setting.either(100, 300)
    first, second = (
        finite.train(train, widths, setting.derived_seed(12, index, k), steps=steps).network.particles()
        for k in range(2)
    )
    with torch.no_grad():
        return Pair(train, test, (first, second), (first.responses(train.inputs), second.responses(train.inputs)))


Make = Callable[[Pair, float, torch.Generator], mf.ParticleNetwork]


def _draws(width: int, share: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    count = round(share * width)
    return torch.randperm(width, generator=generator)[:count], torch.randperm(width, generator=generator)[
        : width - count
    ]


@torch.no_grad()
def hybrid(pair: Pair, share: float, generator: torch.Generator) -> mf.ParticleNetwork:
    """A third network fitted to channels drawn from both, a share of them from the first."""
    first, signal, kernels = pair.networks[0], pair.train.inputs, []
    for layer, width in enumerate(first.widths):
        rows = _draws(width, share, generator)
        if layer == 0:
            kernels.append(torch.cat([net.kernels[0][r] for net, r in zip(pair.networks, rows)]))
            g = torch.cat([each.preactivations[0][:, r] for each, r in zip(pair.responses, rows)], 1)
        else:
            conv = first.architecture.layers[layer]
            target = torch.cat([each.preactivations[layer][:, r] for each, r in zip(pair.responses, rows)], 1)
            columns = conv.patches(signal).flatten(0, 1)
            fitted = _least_squares(columns, target.flatten(2).transpose(1, 2).flatten(0, 1))
            kernels.append((fitted.T * signal.shape[1]).reshape(width, signal.shape[1], *conv.kernel))
            g = conv.convolve(signal, kernels[-1] / signal.shape[1])
        signal = first.architecture.layers[layer].activate(g)
    mixed = share * pair.responses[0].output + (1 - share) * pair.responses[1].output
    readout = _least_squares(first.architecture.readout_features(signal), mixed).T * first.widths[-1]
    return mf.ParticleNetwork(first.architecture, first.masses, kernels, readout.contiguous())


def _least_squares(columns: Tensor, targets: Tensor) -> Tensor:
    gram = columns.T @ columns
    gram.diagonal().add_(RIDGE * gram.diagonal().mean())
    return torch.linalg.solve(gram, columns.T @ targets)


def _interpolated(pair: Pair, share: float, generator: torch.Generator) -> mf.ParticleNetwork:
    return measures.interpolate(pair.networks[1], pair.networks[0], share)


@torch.no_grad()
def _unfitted(pair: Pair, share: float, generator: torch.Generator) -> mf.ParticleNetwork:
    """Channels drawn as for the hybrid, each with its own kernels, slot by slot, whoever the slots below belong to."""
    first, second = pair.networks
    drawn = [torch.randperm(width, generator=generator)[: round(share * width)] for width in first.widths]
    kernels = [b.index_copy(0, chosen, a[chosen]) for a, b, chosen in zip(first.kernels, second.kernels, drawn)]
    readout = second.readout.index_copy(1, drawn[-1], first.readout[:, drawn[-1]])
    return mf.ParticleNetwork(first.architecture, first.masses, kernels, readout)


@torch.no_grad()
def _path(pair: Pair, make: Make, generator: torch.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Training loss, held-out loss and held-out accuracy along one path from p = 0 to 1."""
    rows = []
    for share in SHARES:
        network = make(pair, share, generator)
        outputs = [network.responses(each.inputs).output for each in (pair.train, pair.test)]
        losses = [
            float(each.loss.value(output, each.targets).mean())
            for each, output in zip((pair.train, pair.test), outputs)
        ]
        rows.append((*losses, mf.losses.accuracy(pair.test.loss, outputs[1], pair.test.targets)))
    training, held, accuracy = np.array(rows).T
    return training, held, accuracy


def barrier(losses: np.ndarray) -> float:
    """Largest rise of a path above the straight chord between its ends, in units of the chord."""
    chord = np.interp(SHARES, [0, 1], [losses[0], losses[-1]])
    return float(((losses - chord) / chord)[1:-1].max())


def _paths(
    setting: Setting, make: Make, count: int, place: int, twins: bool = False
) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """`count` paths of every pair; twins: of each of its networks with itself."""
    found = []
    for index, pair in enumerate(_pairs(setting)):
        for which, each in enumerate((pair.twin(0), pair.twin(1)) if twins else (pair,)):
            generator = setting.generator(12, index, place, which)
            found += [_path(each, make, generator) for _ in range(count)]
    return found


@lru_cache(maxsize=1)
def _noise(setting: Setting) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Self-hybrids: both shares are drawn from one network."""
    return _paths(setting, hybrid, setting.either(5, 12), 1, twins=True)


def _upper(values: Sequence[float], seed: int) -> float:
    """Upper end of the 95% bootstrap interval of the mean."""
    sample = np.asarray(values)
    drawn = np.random.default_rng(seed).integers(0, len(sample), (RESAMPLES, len(sample)))
    return float(np.quantile(sample[drawn].mean(1), 0.975))


def _compared(setting: Setting, make: Make) -> Evidence:
    """The mean barrier of paths, at its upper 95% limit, over the 95% quantile of self-hybrids' barriers."""
    drawn = 1 if make is _interpolated else setting.either(5, 12)
    paths, noise = _paths(setting, make, drawn, 2), _noise(setting)
    statistics, parts = [], []
    for which, name in enumerate(("training", "held-out")):
        rises, own = [barrier(path[which]) for path in paths], [barrier(path[which]) for path in noise]
        upper, allowed = _upper(rises, setting.derived_seed(12, 3)), float(np.quantile(own, 0.95))
        statistics.append(upper / allowed)
        parts.append(
            f"{name} loss rises by {np.mean(rises):.2%} of the chord (at most {upper:.2%}; self-hybrids "
            f"{np.mean(own):.2%}, 95% below {allowed:.2%})"
        )
    accuracy = np.mean([path[2] for path in paths], 0)
    text = (
        f"{'; '.join(parts)}; held-out accuracy {accuracy[0]:.1%} and {accuracy[-1]:.1%} at the ends, least between "
        f"{accuracy[1:-1].min():.1%}"
    )
    mean, own = np.mean([path[0] for path in paths], 0), np.mean([path[0] for path in noise], 0)
    series = (
        Series("path", list(SHARES), mean.tolist()),
        Series("chord", [0.0, 1.0], [mean[0], mean[-1]], "dashed"),
        Series("self-hybrids", list(SHARES), own.tolist()),
        Series("held out", list(SHARES), np.mean([path[1] for path in paths], 0).tolist()),
    )
    return Evidence(statistics[0], text, len(paths), series=series)


CLAIMS = (
    Claim(
        name="hybrids",
        statement=(
            "Networks fitted to features drawn in shares p and 1 - p from two trained networks meet no barrier beyond "
            "the cost of resampling one."
        ),
        source="Gu et al. 2020, hybrid networks",
        statistic=(
            "mean over draws and pairs of the largest rise of the training loss above the chord between p = 0 and 1 "
            "(in units of the chord), upper 95% bootstrap limit, over the 95% quantile of that rise where both shares "
            "are drawn from ONE network"
        ),
        threshold=1.0,
        derivation=(
            "a definition: drawing channels and fitting cost something even within one network; no barrier means no "
            "more than 95% of such self-hybrids cost. It was written down after curves of two pairs (ten classes) had "
            "been seen, so it is no blind test"
        ),
        limits=(
            "Empirical, no theorem: small ReLU networks of two layers on 4x4 digits, equal widths, one way to fit. "
            "The readout is fitted to the mixed outputs, whose own loss is convex in p; what can fail is that the "
            "mixed features carry them. Two draws from one network share channels, so that self-hybrids have fewer "
            "distinct features, which widens what is allowed."
        ),
        measure=lambda setting: _compared(setting, hybrid),
        controls={
            "raw weights interpolated": lambda setting: _compared(setting, _interpolated),
            "channels drawn, third network not fitted": lambda setting: _compared(setting, _unfitted),
        },
        axes=Axes("share p of channels from network A", "loss"),
    ),
)
