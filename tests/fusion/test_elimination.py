"""Eliminating channels from least-squares problems, against refits from scratch."""

import pytest
import torch
from strategies import normal

from meanfield.fusion.elimination import RIDGE, Reader, eliminate, keep
from meanfield.grafting.least_squares import Products

GROUPS, SIZE, OUTPUTS, SAMPLES = 6, 3, 2, 200


def problem(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Correlated columns (GROUPS SIZE, n) with means, and targets (K, n) that they do not fit."""
    mixing = torch.eye(GROUPS * SIZE, dtype=torch.float64) + 0.3 * normal((GROUPS * SIZE, GROUPS * SIZE), seed)
    design = mixing @ normal((GROUPS * SIZE, SAMPLES), seed + 1) + 1
    return design, normal((OUTPUTS, GROUPS * SIZE), seed + 2) @ design + normal((OUTPUTS, SAMPLES), seed + 3) + 2


def reader(design: torch.Tensor, targets: torch.Tensor, *, offset: bool, current: torch.Tensor | None = None) -> Reader:
    moments = Products(len(design), len(targets), design.device)
    for part in (slice(0, 70), slice(70, None)):
        moments.add(design[:, part], targets[:, part])
    start = torch.zeros(len(design), len(targets), dtype=torch.float64) if current is None else current
    return Reader.of(moments, start, GROUPS, offset=offset)


def refitted(
    design: torch.Tensor, targets: torch.Tensor, groups: list[int], *, offset: bool
) -> tuple[torch.Tensor, float]:
    """Weights of these groups from scratch, and the squared error, of the ridge included."""
    if offset:
        design, targets = (each - each.mean(1, keepdim=True) for each in (design, targets))
    ridge = RIDGE * float(design.square().sum(1).mean())
    rows = design.unflatten(0, (GROUPS, SIZE))[groups].flatten(0, 1)
    stacked = torch.cat([rows.T, ridge**0.5 * torch.eye(len(rows), dtype=torch.float64)])
    wanted = torch.cat([targets.T, torch.zeros(len(rows), len(targets), dtype=torch.float64)])
    weights = torch.linalg.lstsq(stacked, wanted, driver="gelsd").solution
    return weights, float((stacked @ weights - wanted).square().sum())


@pytest.mark.parametrize("offset", [True, False])
def test_the_loss_of_a_channel_is_what_a_refit_without_it_loses(offset):
    design, targets = problem(0)
    found, everything = reader(design, targets, offset=offset), list(range(GROUPS))
    weights, least = refitted(design, targets, everything, offset=offset)
    torch.testing.assert_close(found.weights, weights, rtol=1e-8, atol=1e-9)
    for group, loss in enumerate(found.losses()):
        others = [each for each in everything if each != group]
        weights, error = refitted(design, targets, others, offset=offset)
        assert float(loss) * found.unit == pytest.approx(error - least, rel=1e-8)
        torch.testing.assert_close(found.without(group).weights, weights, rtol=1e-8, atol=1e-9)
    spread = targets - targets.mean(1, keepdim=True)
    assert found.unit == pytest.approx(float(spread.square().sum()))


def test_channels_go_as_a_slow_search_lets_them_go():
    """Two readers, refitted from scratch for every candidate of every step; a constant leaves an error of one unit."""
    problems = [problem(0), problem(10)]
    left = list(range(GROUPS))
    units = [float((b - b.mean(1, keepdim=True)).square().sum()) for _, b in problems]

    def error(groups: list[int]) -> float:
        return sum(refitted(*each, groups, offset=True)[1] / unit for each, unit in zip(problems, units))

    while len(left) > 2:
        left = min(([each for each in left if each != group] for group in left), key=error)
    found, readers = eliminate([reader(*each, offset=True) for each in problems], 2)
    assert found.tolist() == left
    for each, own in zip(problems, readers):
        torch.testing.assert_close(own.weights, refitted(*each, left, offset=True)[0], rtol=1e-8, atol=1e-9)
    (kept,) = keep([reader(*problems[0], offset=True)], torch.tensor(left))
    torch.testing.assert_close(kept.weights, readers[0].weights, rtol=1e-9, atol=1e-9)


def test_what_the_samples_do_not_show_stays_as_it_was():
    design, targets = problem(0)
    design = design * (torch.arange(GROUPS * SIZE) % SIZE > 0)[:, None]  # the first column of every channel: zeros
    current = normal((GROUPS * SIZE, OUTPUTS), 5)
    found = reader(design, targets, offset=True, current=current)
    torch.testing.assert_close(found.weights[::SIZE], current[::SIZE], rtol=1e-9, atol=1e-9)
    assert not torch.allclose(found.weights[1], current[1])


def test_columns_that_are_all_zero_go_first():
    design, targets = problem(0)
    design[2 * SIZE : 3 * SIZE] = 0
    left, (found,) = eliminate([reader(design, targets, offset=True)], GROUPS - 1)
    assert left.tolist() == [0, 1, 3, 4, 5]
    assert bool(found.weights.isfinite().all())
    flat = torch.ones_like(targets)  # which a constant gives, so that there is no unit to count errors in
    assert bool(reader(problem(0)[0], flat, offset=True).losses().isfinite().all())
    none, _ = eliminate([reader(torch.zeros_like(design), targets, offset=True)], 1)
    assert len(none) == 1
