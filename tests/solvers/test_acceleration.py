"""Anderson acceleration of linear maps with known fixed points, and its safeguards."""

import torch
from strategies import normal

from meanfield.solvers.acceleration import Anderson


def iterate(matrix, offset, steps, accelerate):
    state, metric, accelerated = torch.zeros_like(offset), torch.ones_like(offset), Anderson()
    for _ in range(steps):
        change = matrix @ state + offset - state
        state = accelerated.advance(state, change, metric) if accelerate else state + change
    return state


def slow_map(size=8):
    """A symmetric contraction with factors from 0.5 to 0.999."""
    turn = torch.linalg.qr(normal((size, size), 0))[0]
    return turn * torch.linspace(0.5, 0.999, size, dtype=torch.float64) @ turn.T, normal((size,), 1)


def test_a_slow_linear_map_is_solved_in_a_few_dozen_steps():
    matrix, offset = slow_map()
    answer = torch.linalg.solve(torch.eye(8, dtype=torch.float64) - matrix, offset)
    plain, fast = (
        torch.linalg.vector_norm(iterate(matrix, offset, 60, each) - answer).item() for each in (False, True)
    )
    assert fast < 1e-6 * torch.linalg.vector_norm(answer).item()
    assert plain > 1e4 * fast


def test_steps_of_equal_length_do_not_make_it_jump_far():
    """A state that drifts by one unit a step: every affine combination of the changes is as good as any other."""
    accelerated, state = Anderson(), torch.zeros(3, dtype=torch.float64)
    drift = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
    for step in range(200):
        new = accelerated.advance(state, drift + 1e-12 * normal((3,), step), torch.ones(3, dtype=torch.float64))
        assert (new - state).norm().item() <= 300  # REACH times the memory of 20 unit steps, and one more
        state = new


def test_a_jump_that_lengthens_the_step_is_taken_back():
    accelerated, metric = Anderson(), torch.ones(2, dtype=torch.float64)
    state = torch.tensor([1.0, 1.0], dtype=torch.float64)
    for _ in range(5):
        before, change = state, -0.1 * state
        state = accelerated.advance(state, change, metric)
    assert accelerated.before is not None  # it has just jumped
    back = accelerated.advance(state, 100 * torch.ones_like(state), metric)  # and finds a far longer step there
    torch.testing.assert_close(back, before + change)


def test_a_new_map_forgets_the_old_one():
    matrix, offset = slow_map()
    accelerated, state = Anderson(), torch.zeros_like(offset)
    for _ in range(7):
        state = accelerated.advance(state, matrix @ state + offset - state, torch.ones_like(offset))
    accelerated.forget()
    change = -0.5 * state
    torch.testing.assert_close(accelerated.advance(state, change, torch.ones_like(offset)), state + change)
