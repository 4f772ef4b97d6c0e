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
    "mixture.loss",
    "one_layer_relation",
    "sampling",
    "sampling.tangent_kernel",
    "sphere",
    "stationary_points.growth",
    "stationary_points.one_layer",
    "stationary_points.width",
    "transfer",
    "transfer.dependence_gap",
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
    "bench/test_sweep.py::test_killed_again_and_again_and_resumed_the_table_is_the_same",
    "bench/test_workers.py::test_a_worker_ends_after_its_parent",
    "benchmarks/test_benchmarks.py::test_a_fresh_process_answers_and_a_failure_says_why",
    "benchmarks/test_benchmarks.py::test_flow_command",
    "benchmarks/test_benchmarks.py::test_growth_command",
    "benchmarks/test_benchmarks.py::test_points_of_a_landscape_are_measured_and_an_absent_peer_is_told",
    "benchmarks/test_benchmarks.py::test_solve_command",
    "solvers/test_flow.py::test_minibatches_end_where_the_whole_batch_does[gradient-1.0]",
    "solvers/test_flow.py::test_minibatches_end_where_the_whole_batch_does[preconditioned-0.1]",
    "studies/grafting/test_page.py::test_every_part_has_its_pictures_and_its_section",
    "studies/grafting/test_study.py::test_the_study_runs_and_goes_on_where_it_was",
    "studies/widths/test_study.py::test_the_page_holds_every_part",
    "test_cli.py::test_ctrl_c_keeps_the_best_network",
    "test_limits.py::test_a_solve_stopped_at_any_look_keeps_its_best_network[interrupt]",
    "test_limits.py::test_a_solve_stopped_at_any_look_keeps_its_best_network[memory]",
    "test_public_names.py::test_names_do_not_depend_on_what_was_imported_before",
    "test_readme.py::test_a_recipe_runs_as_written[example0]",
    "test_readme.py::test_a_recipe_runs_as_written[example1]",
    "test_readme.py::test_a_recipe_runs_as_written[example2]",
    "test_readme.py::test_the_example_runs_as_written",
}
