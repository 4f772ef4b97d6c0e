import os

import pytest
import torch
from hypothesis import HealthCheck, settings

CHECKS = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
settings.register_profile("default", max_examples=20, deadline=None, derandomize=True, suppress_health_check=CHECKS)
settings.register_profile("explore", max_examples=200, deadline=None, suppress_health_check=CHECKS)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


# Of claims and commands; other tests carry their mark themselves.
SLOW = {
    *(
        f"test_a_claim_holds_and_its_controls_are_rejected[{claim}]"
        for claim in (
            "attainment.bounded",
            "dissipation.limit",
            "hybrids",
            "joint_convexity.curvature",
            "joint_convexity.falsification",
            "mixture",
            "one_layer_relation",
            "stationary_points.growth",
            "stationary_points.one_layer",
            "stationary_points.width",
            "weak_duality",
            "weight_nonconvexity.curvature",
            "zero_gap",
        )
    ),
    "test_a_fresh_process_answers_and_a_failure_says_why",
    "test_ctrl_c_keeps_the_best_network",
    "test_growth_command",
    "test_solve_command",
    "test_the_example_runs_as_written",
}


def pytest_collection_modifyitems(items):
    for item in items:
        if item.name in SLOW:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(params=["cpu", "cuda"])
def device(request):
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return torch.device(request.param)
