"""Claims, commands and pages that take seconds, which `make test-fast` leaves out; other tests carry the mark
themselves.
"""

CLAIMS = (
    "attainment.bounded",
    "attainment.minimum",
    "dissipation.bounded",
    "dissipation.limit",
    "hybrids",
    "joint_convexity.curvature",
    "joint_convexity.falsification",
    "mixture",
    "one_layer_relation",
    "sampling",
    "sampling.tangent_kernel",
    "sphere",
    "stationary_points.growth",
    "stationary_points.one_layer",
    "stationary_points.width",
    "weak_duality",
    "weak_duality.all_measures",
    "weak_duality.section5",
    "weight_nonconvexity.curvature",
    "zero_gap",
    "zero_gap.bounded",
    "zero_gap.programs",
)
SLOW = {
    *(
        f"theory_checks/test_theory_checks.py::test_a_claim_holds_and_its_controls_are_rejected[{claim}]"
        for claim in CLAIMS
    ),
    "bench/test_study.py::test_a_study_is_added_in_thirty_lines_and_run_from_the_command_line",
    "benchmarks/test_benchmarks.py::test_a_fresh_process_answers_and_a_failure_says_why",
    "benchmarks/test_benchmarks.py::test_flow_command",
    "benchmarks/test_benchmarks.py::test_growth_command",
    "benchmarks/test_benchmarks.py::test_solve_command",
    "studies/widths/test_study.py::test_the_page_holds_every_part",
    "test_cli.py::test_ctrl_c_keeps_the_best_network",
    "test_readme.py::test_a_recipe_runs_as_written[example0]",
    "test_readme.py::test_a_recipe_runs_as_written[example2]",
    "test_readme.py::test_the_example_runs_as_written",
}
