"""Planes through solutions and checkpoints: their points have the coordinates that they are said to have."""

import pytest
import torch
from torch import nn
from torch_networks import chain

from meanfield import landscape
from meanfield.landscape.directions import Plane, difference, inner
from meanfield.landscape.objective import Objective
from meanfield.subject import Subject
from meanfield.validation import Misuse


def moved(seed: int, size: float) -> nn.Module:
    found = chain()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in found.parameters():
            parameter += size * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return found


def close(plane: Plane, point: tuple[float, float], network: nn.Module) -> None:
    for name, parameter in network.named_parameters():
        torch.testing.assert_close(plane.at(*point)[name], parameter.detach(), rtol=1e-10, atol=1e-12)


def test_the_ends_of_a_line_are_the_networks():
    first, second = chain(0), chain(1)
    plane = landscape.line(first, second)
    close(plane, plane.marks["first"], first)
    close(plane, plane.marks["second"], second)
    with pytest.raises(Misuse, match="differ"):
        landscape.line(first, first)


def test_the_corners_of_a_triangle_are_the_networks_and_the_picture_has_true_angles():
    corners = [chain(seed) for seed in range(3)]
    plane = landscape.triangle(*corners)
    for name, network in zip(("first", "second", "third"), corners):
        close(plane, plane.marks[name], network)
        assert all(abs(coordinate) <= 1 for coordinate in plane.marks[name])
    assert abs(float(inner(plane.first, plane.second))) < 1e-10 * float(inner(plane.first, plane.first))
    assert float(inner(plane.second, plane.second)) == pytest.approx(float(inner(plane.first, plane.first)), rel=1e-12)
    middle = Subject(corners[0]).at(landscape.line(*corners[:2]).origin)
    with pytest.raises(Misuse, match="third"):
        landscape.triangle(corners[0], corners[1], middle)


def test_coordinates_are_least_squares_in_skew_units():
    origin = Subject(chain()).parameters
    first, second = (difference(Subject(moved(seed, 1.0)).parameters, origin) for seed in (1, 2))
    skew = {name: 3 * first[name] + 0.1 * second[name] for name in first}
    plane = Plane(origin, first, skew)
    point, distance = plane.coordinates(plane.at(0.7, -0.2))
    assert point == pytest.approx((0.7, -0.2), rel=1e-9)
    assert distance < 1e-10
    (a, b), distance = plane.coordinates(Subject(moved(5, 1.0)).parameters)
    left = difference(Subject(moved(5, 1.0)).parameters, plane.at(a, b))
    assert distance == pytest.approx(float(inner(left, left).sqrt()), rel=1e-10)
    assert abs(float(inner(left, first))) < 1e-9
    assert abs(float(inner(left, skew))) < 1e-9
    with pytest.raises(Misuse, match="span no plane"):
        Plane(origin, first, first).coordinates(origin)


def test_principal_components_of_a_path_in_a_plane_give_it_back():
    origin = Subject(chain()).parameters
    first, second = (difference(Subject(moved(seed, 1.0)).parameters, origin) for seed in (1, 2))
    known = Plane(origin, first, second)
    points = [(2.0, 1.0), (1.5, -0.5), (1.0, 0.3), (0.2, 0.1), (0.0, 0.0)]
    path = [known.at(*point) for point in points]
    plane = landscape.principal(path, chain())
    reach = [plane.coordinates(each) for each in path]
    assert all(distance < 1e-8 for _, distance in reach)
    assert max(max(map(abs, point)) for point, _ in reach) == pytest.approx(1, rel=1e-8)
    for (point, _), parameters in zip(reach, path):
        for name, tensor in plane.at(*point).items():
            torch.testing.assert_close(tensor, parameters[name], rtol=1e-8, atol=1e-8)
    assert plane.marks["end"] == pytest.approx((0, 0), abs=1e-12)
    assert abs(float(inner(plane.first, plane.second))) < 1e-8 * float(inner(plane.first, plane.first))


def test_principal_components_are_those_of_a_singular_value_decomposition():
    networks = [moved(seed, 0.1 * (seed + 1)) for seed in range(6)]
    plane = landscape.principal(networks)
    rows = torch.stack([nn.utils.parameters_to_vector(each.parameters()).detach() for each in networks])
    _, _, wanted = torch.linalg.svd(rows[:-1] - rows[-1], full_matrices=False)
    for direction, component in zip((plane.first, plane.second), wanted):
        flat = torch.cat([direction[name].flatten() for name, _ in networks[0].named_parameters()])
        assert abs(float(flat @ component)) == pytest.approx(float(flat.norm()), rel=1e-9)


def test_checkpoints_are_refused_by_name():
    states = [chain(seed).state_dict() for seed in range(3)]
    with pytest.raises(Misuse, match="network="):
        landscape.principal(states)
    with pytest.raises(Misuse, match=r"checkpoints\[1\]\['3.weight'\]='missing'"):
        landscape.principal([states[0], {k: v for k, v in states[1].items() if k != "3.weight"}, states[2]], chain())
    with pytest.raises(Misuse, match="line"):
        landscape.principal(states[:1] * 3, chain())
    assert landscape.principal(states, chain()).kind == "pca"


def test_what_has_no_place_in_a_plane_is_named():
    networks = [chain(seed) for seed in range(3)]
    with torch.no_grad():
        networks[1].get_parameter("3.weight")[0] = torch.nan
    with pytest.raises(Misuse, match=r"second='3.weight' has entries that are infinite or nan"):
        landscape.line(networks[0], networks[1])
    with pytest.raises(Misuse, match=r"second='3.weight' has entries"):
        landscape.triangle(*networks)
    for used in (landscape.principal, landscape.trajectory):
        with pytest.raises(Misuse, match=r"checkpoints\[1\]='3.weight' has entries"):
            used(networks)
    row = torch.ones(4, 1)
    with pytest.raises(Misuse, match="network='Linear' has one parameter"):
        landscape.eigenplane(nn.Linear(1, 1, bias=False), row, row, loss=nn.functional.mse_loss)


def test_the_plane_of_eigenvectors_bends_by_the_two_largest_eigenvalues():
    network = nn.Sequential(nn.Flatten(), nn.Linear(4, 3)).double()
    images = torch.randn(40, 1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(40) % 3
    objective = Objective(Subject(network), images, labels)
    shapes = {name: tensor.shape for name, tensor in objective.subject.parameters.items()}

    def loss(vector: torch.Tensor) -> torch.Tensor:
        pieces = vector.split([shape.numel() for shape in shapes.values()])
        return objective({name: piece.view(shape) for piece, (name, shape) in zip(pieces, shapes.items())})

    origin = torch.cat([tensor.flatten() for tensor in objective.subject.parameters.values()])
    values, vectors = torch.linalg.eigh(torch.autograd.functional.hessian(loss, origin))
    plane = landscape.eigenplane(network, images, labels)
    for direction, wanted in zip((plane.first, plane.second), vectors.T.flip(0)):
        found = torch.cat([tensor.flatten() for tensor in direction.values()])
        assert float(found.norm()) == pytest.approx(1, rel=1e-12)
        assert abs(float(found @ wanted)) == pytest.approx(1, rel=1e-6)  # the square of residuals of 1e-4
    assert f"eigenvalues {values[-1]:.3g} and {values[-2]:.3g}" in next(iter(plane.marks))
