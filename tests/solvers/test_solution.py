"""What every solver returns."""

from meanfield.solvers.solution import STATUS_TEXTS, Solution, message


def test_messages_carry_the_detail_in_front():
    assert message("optimal") == STATUS_TEXTS["optimal"]
    assert message("failed", "solver X") == "solver X: the solver returned no point"


def test_solution_relative_gap():
    assert Solution(-2.0, 1.0, "optimal", "", None, None).relative_gap == 0.5
    assert Solution(0.0, 0.0, "optimal", "", None, None).relative_gap == 0.0
