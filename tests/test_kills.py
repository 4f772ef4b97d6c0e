"""Eight of the ends of `kills.py`, which has fifty by one command."""

import os

import kills
import pytest


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads /proc")
@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("solve", ["SIGTERM", "SIGHUP", "two SIGINT", "kill -9 of the parent"]),
        ("widths", ["SIGTERM", "two SIGINT", "kill -9 of the parent", "kill -9 of a worker"]),
    ],
)
def test_ended_at_random_moments_a_command_loses_nothing_and_leaves_nothing(name, kinds, tmp_path):
    assert len(kills.run(name, kinds, 0, 4.0, tmp_path)) == len(kinds)
