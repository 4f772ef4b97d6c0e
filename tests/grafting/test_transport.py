import itertools

import numpy as np
import pytest
import torch
from scipy.optimize import linprog
from strategies import normal, random_masses

from meanfield.grafting.transport import assignment, is_uniform, plan


def test_an_assignment_is_the_best_of_all():
    costs = normal((5, 5), 0).square()
    orders = {order: float(costs[range(5), order].sum()) for order in itertools.permutations(range(5))}
    assert tuple(assignment(costs).tolist()) == min(orders, key=lambda order: orders[order])
    torch.testing.assert_close(plan(costs), torch.eye(5, dtype=torch.float64)[assignment(costs)] / 5)


@pytest.mark.parametrize(("rows", "columns"), [(4, 6), (5, 5)])
def test_a_plan_solves_the_linear_program(rows, columns):
    costs, below, above = normal((rows, columns), 1).square(), random_masses(rows, 2), random_masses(columns, 3)
    found = plan(costs, below, above)
    torch.testing.assert_close(found.sum(1), below)
    torch.testing.assert_close(found.sum(0), above)
    sums = np.vstack([np.kron(np.eye(rows), np.ones(columns)), np.kron(np.ones(rows), np.eye(columns))])
    best = linprog(costs.flatten().numpy(), A_eq=sums, b_eq=torch.cat([below, above]).numpy())
    assert float((costs * found).sum()) == pytest.approx(best.fun, rel=1e-9)
    assert int((found > 0).sum()) <= rows + columns - 1


def test_masses_are_equal_up_to_rounding():
    thirds = torch.full((3,), 1 / 3, dtype=torch.float32)
    assert is_uniform(thirds)
    assert is_uniform(torch.ones(2) / 2)
    assert not is_uniform(torch.tensor([0.5, 0.5001]))
    assert plan(normal((3, 3), 0).square(), thirds, thirds).unique().tolist() == [0, 1 / 3]
