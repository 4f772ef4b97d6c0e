import copy

import pytest
import torch
from torch import nn
from torch_networks import residual as users_residual

from meanfield import limits
from meanfield.finite.vgg import residual
from meanfield.landscape import plane
from meanfield.landscape.batch_norm import Statistics
from meanfield.landscape.evaluation import Evaluation
from meanfield.landscape.objective import Objective
from meanfield.landscape.passes import passes
from meanfield.subject import Subject
from meanfield.validation import Misuse

POINTS = torch.tensor([[0.0, 0.0], [0.4, -0.7], [4.0, 3.0]], dtype=torch.float64)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def small(dtype=torch.float64):
    network = residual((1, 8, 8), 3, width=3, blocks=(1, 1), generator=seeded(1), dtype=dtype)
    return network, torch.randn(30, 1, 8, 8, generator=seeded(2), dtype=dtype)


def users():
    return users_residual(3, 0), torch.randn(30, 2, 12, 12, generator=seeded(2), dtype=torch.float64)


LABELS = torch.arange(30) % 3


def in_training(network, parameters, images):
    """Outputs of a copy in training mode with all images in one batch, and the means and variances there."""
    moved = copy.deepcopy(network).train()
    moved.load_state_dict(dict(parameters), strict=False)
    found = {}

    def note(name):
        return lambda module, arguments: found.update({name: torch.var_mean(arguments[0], (0, 2, 3), correction=0)})

    for name, module in moved.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_pre_hook(note(name))
    with torch.no_grad():
        return moved(images), found


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("block", [None, 2**14])
def test_recomputed_statistics_are_those_of_training_with_all_images_in_one_batch(known, block, monkeypatch):
    network, images = small() if known else users()
    where, subject = plane(network, seed=1), Subject(network)
    if block is not None:
        monkeypatch.setattr(limits, "BLOCK_BYTES", block)
    batches = [(images[:7], LABELS[:7]), (images[7:], LABELS[7:])]
    sets = {"train": Objective(subject, batches), "held out": Objective(subject, 1 + images[:9], LABELS[:9])}
    found = Evaluation(where, sets, batch_norm="recomputed")
    assert (found.plain is None) == known
    assert bool(found._statistics.whole) == (known and block is None)
    for figures, (a, b) in zip(found(POINTS), POINTS.tolist()):
        outputs, wanted = in_training(network, where.at(a, b), images)
        assert float(figures[0]) == pytest.approx(float(nn.functional.cross_entropy(outputs, LABELS)), rel=1e-11)
        statistics = found._statistics((a, b))
        assert sorted(statistics) == sorted(f"{n}.{kind}" for n in wanted for kind in ("running_mean", "running_var"))
        for name, (variance, mean) in wanted.items():
            assert torch.allclose(statistics[f"{name}.running_var"], variance, rtol=1e-11)
            assert torch.allclose(statistics[f"{name}.running_mean"], mean, rtol=1e-11, atol=1e-12)
        outputs = subject({**where.at(a, b), **statistics}, sets["held out"].batches[0][0])
        assert float(figures[2]) == pytest.approx(float(nn.functional.cross_entropy(outputs, LABELS[:9])), rel=1e-11)


def test_kept_statistics_are_those_of_the_network_and_not_those_of_a_point():
    network, images = small(torch.float32)
    network.train()(images)
    subject, where = Subject(network), plane(network, seed=1)
    sets = {"train": Objective(subject, images, LABELS)}
    kept, recomputed = (Evaluation(where, sets, batch_norm=each)(POINTS) for each in ("kept", "recomputed"))
    with torch.no_grad():
        outputs = subject(where.at(*POINTS[2].tolist()), images)
    assert float(kept[2, 0]) == pytest.approx(float(nn.functional.cross_entropy(outputs, LABELS)), rel=1e-6)
    assert abs(kept[2, 0] / recomputed[2, 0] - 1) > 0.01
    assert kept.isfinite().all()
    without = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    sets = {"train": Objective(Subject(without), images, LABELS)}
    same = [Evaluation(plane(without, seed=1), sets, batch_norm=each)(POINTS) for each in ("kept", "recomputed")]
    assert torch.equal(*same)


def test_a_batch_norm_that_is_called_twice_is_refused():
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(1)
    network = nn.Sequential(nn.Conv2d(1, 1, 3, padding=1), norm, nn.Conv2d(1, 1, 3, padding=1), norm, nn.Flatten())
    images, where, subject = torch.randn(5, 1, 4, 4), plane(network, seed=1), Subject(network)
    with torch.no_grad(), pytest.raises(Misuse, match=r"batch_norm='recomputed'.*'1' is called more often"):
        Statistics(passes(subject, where, images)[0], [images])
