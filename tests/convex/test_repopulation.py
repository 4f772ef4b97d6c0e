import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import cases, normal, random_inputs, random_network

import meanfield as mf
from meanfield import measures
from meanfield.convex.repopulation import ProgramPoint, to_network, to_program


@given(cases(zero_mass=(False, True)))
def test_variables_are_the_stated_products(case):
    network, point = case.network, to_program(case.network)
    p = network.masses
    for layer, W in enumerate(point.kernels, start=1):
        w = network.kernels[layer]
        expected = [[w[j, i] * p[layer - 1][i] * p[layer][j] for i in range(w.shape[1])] for j in range(len(w))]
        np.testing.assert_allclose(W, torch.stack([torch.stack(row) for row in expected]), rtol=1e-14)
        b = network.biases[layer]
        assert (point.biases[layer - 1] is None) == (b is None)
        if b is not None:
            np.testing.assert_allclose(point.biases[layer - 1], b * p[layer], rtol=1e-14)
    for j, mass in enumerate(p[-1]):
        np.testing.assert_allclose(point.readout[:, j], network.readout[:, j] * mass, rtol=1e-14)
    assert all(torch.equal(a, b) for a, b in zip(point.masses, p))


@given(cases())
def test_round_trip_returns_the_network(case):
    back = to_network(to_program(case.network), case.network)
    for got, expected in zip(back.tensors(), case.network.tensors(), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-13, atol=1e-13)


@given(cases(zero_mass=(False, True)))
def test_round_trip_keeps_value_output_and_features_of_live_particles(case):
    back = to_network(to_program(case.network), case.network)
    live = measures.drop_massless(case.network)
    assert back.widths == live.widths
    torch.testing.assert_close(case.problem.value(back), case.problem.value(case.network), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(back(case.problem.inputs), case.network(case.problem.inputs), rtol=1e-11, atol=1e-12)
    for got, expected in zip(back.features(case.problem.inputs), live.features(case.problem.inputs), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-12)


@given(cases(zero_mass=(False, True)))
def test_program_value_of_the_frozen_network_is_its_value(case):
    program = case.freeze
    point = program.point(case.network)
    torch.testing.assert_close(program.value(point), case.problem.value(case.network), rtol=1e-12, atol=1e-12)
    assert program.violation(point) < 1e-12


@given(cases(zero_mass=(False, True)), st.floats(0, 1))
def test_combine_is_the_straight_line_in_every_variable(case, t):
    first = to_program(case.network)
    second = first.map(lambda tensor: normal(tensor.shape, case.seed + 1))
    line = first.combine(second, t)
    for name in ("masses", "kernels", "biases"):
        for got, a, b in zip(getattr(line, name), getattr(first, name), getattr(second, name), strict=True):
            assert (got is None) == (a is None)
            if a is not None:
                torch.testing.assert_close(got, (1 - t) * a + t * b)
    torch.testing.assert_close(line.readout, (1 - t) * first.readout + t * second.readout)


def test_to_network_normalises_masses_and_keeps_the_flow():
    """Masses that add up to 1 + e are divided by their sum; p w p' stays W."""
    arch = mf.Architecture((1, 3, 3), (mf.Conv(2), mf.Conv(2, bias=True)))
    network = random_network(arch, (3, 2), 0)
    point = to_program(network)
    scaled = ProgramPoint(tuple(1.001 * p for p in point.masses), point.kernels, point.readout, point.biases)
    back = to_network(scaled, network)
    again = to_program(back)
    assert all(p.sum().item() == pytest.approx(1, abs=1e-14) for p in again.masses)
    for got, expected in zip(
        (*again.kernels, again.readout, again.biases[0]), (*point.kernels, point.readout, point.biases[0])
    ):
        torch.testing.assert_close(got, expected, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("readout", ["average", "flatten"])
def test_float32_round_trip(readout, device):
    arch = mf.Architecture((1, 3, 3), (mf.Conv(2), mf.Conv(2, padding=1, bias=True)), readout, 2)
    network = random_network(arch, (3, 2), 0, dtype=torch.float32).to(device=device)
    back = to_network(to_program(network), network)
    assert back.dtype == torch.float32
    assert back.device.type == device.type
    inputs = random_inputs(arch, 2, 0, torch.float32).to(device)
    torch.testing.assert_close(back(inputs), network(inputs), rtol=1e-5, atol=1e-5)


def test_repr_names_widths():
    arch = mf.Architecture((1, 3, 3), (mf.Conv(2), mf.Conv(2)))
    assert repr(to_program(random_network(arch, (3, 2), 0))) == "ProgramPoint(widths=(3, 2), dtype=torch.float64)"
