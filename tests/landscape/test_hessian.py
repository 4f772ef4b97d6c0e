import pytest
import torch
from strategies import normal, random_network, seeded
from torch import nn
from torch_networks import filled

from meanfield import Architecture, Conv, limits
from meanfield.landscape import hessian
from meanfield.landscape.objective import Objective
from meanfield.subject import Subject
from meanfield.validation import Misuse

IMAGES, LABELS = normal((20, 1, 6, 6), 3), torch.arange(20) % 3
BATCHES = [(IMAGES[:13], LABELS[:13]), (IMAGES[13:], LABELS[13:])]


def module():
    layers = [nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Tanh(), nn.MaxPool2d(2), nn.ReLU(inplace=True), nn.Flatten()]
    return filled(nn.Sequential(*layers, nn.Linear(8, 3)), 0)


def particles():
    layers = (Conv(2, activation="tanh", bias=True), Conv(2, activation="softplus", bias=True))
    return random_network(Architecture((1, 6, 6), layers, outputs=3), (3, 2), seed=2)


def squares(outputs, targets):
    return (outputs - targets[:, None]).square().mean()  # the mean alone


def matrix(operator):
    return torch.stack([operator(row) for row in torch.eye(operator.size, dtype=torch.float64)])


def dense(objective):
    """The Hessian entry by entry, row by row."""
    parameters = objective.subject.parameters
    like = {name: tensor.shape for name, tensor in parameters.items()}
    sizes = [tensor.numel() for tensor in parameters.values()]

    def loss(vector):
        pieces = vector.split(sizes)
        return objective({name: piece.view(shape) for (name, shape), piece in zip(like.items(), pieces)})

    return torch.autograd.functional.hessian(loss, hessian.flat(parameters.values()))


def jacobian(function, parameters):
    """(..., D)."""
    found = torch.autograd.functional.jacobian(
        lambda *moved: function(dict(zip(parameters, moved))), tuple(parameters.values())
    )
    return torch.cat([each.flatten(-tensor.ndim) for each, tensor in zip(found, parameters.values())], -1)


@pytest.mark.parametrize("network", [module, particles])
@pytest.mark.parametrize("loss", [None, squares])
def test_products_are_those_of_the_dense_hessian(network, loss):
    objective = Objective(Subject(network()), BATCHES, loss=loss)
    wanted = dense(objective)
    torch.testing.assert_close(matrix(hessian.Hessian(objective, objective.subject.parameters)), wanted)
    scale = {name: 1 + tensor.abs() for name, tensor in objective.subject.parameters.items()}
    factors = hessian.flat(scale.values())
    scaled = matrix(hessian.Hessian(objective, objective.subject.parameters, scale))
    torch.testing.assert_close(scaled, factors[:, None] * wanted * factors)


def test_the_part_of_gauss_and_newton_is_that_of_jacobians():
    objective = Objective(Subject(module()), BATCHES)
    parameters = objective.subject.parameters
    rows = jacobian(lambda moved: objective.subject(moved, IMAGES), parameters)
    chances = objective.subject(parameters, IMAGES).softmax(1)
    bends = torch.diag_embed(chances) - chances[:, :, None] * chances[:, None]
    wanted = torch.einsum("nka,nkl,nlb->ab", rows, bends, rows) / 20
    found = hessian.GaussNewton(objective, parameters)
    torch.testing.assert_close(matrix(found), wanted)
    assert found.count == found.size


def test_what_is_linear_has_no_curvature():
    linear = filled(nn.Sequential(nn.Flatten(), nn.Linear(36, 1)), 0)
    objective = Objective(Subject(linear), IMAGES, LABELS, loss=lambda outputs, targets: outputs.mean())
    for kind in (hessian.Hessian, hessian.GaussNewton):
        assert not matrix(kind(objective, objective.subject.parameters)).any()


@pytest.mark.parametrize("kind", [hessian.Hessian, hessian.GaussNewton])
def test_graphs_that_do_not_fit_are_built_anew_and_give_the_same(kind, monkeypatch):
    objective = Objective(Subject(module()), BATCHES)
    vector = torch.randn(hessian.flat(objective.subject.parameters.values()).shape, generator=seeded(0)).double()
    kept = kind(objective, objective.subject.parameters)
    whole = sum(len(inputs) * 8 for inputs, _ in BATCHES)
    assert all(kept._kept)
    for room, remaining in ((0, 0), (1e9 * whole, 2)):
        monkeypatch.setattr(limits, "available", lambda device, room=room: room)
        other = kind(objective, objective.subject.parameters)
        assert sum(each is not None for each in other._kept) == remaining
        for _ in range(2):
            assert torch.equal(other(vector), kept(vector))
    each = hessian._held(lambda: kind.graph(objective, kept.leaves, BATCHES[0]))
    monkeypatch.setattr(limits, "available", lambda device: 1.2 * each / hessian.KEPT_SHARE)
    assert [graph is not None for graph in kind(objective, objective.subject.parameters)._kept] == [True, False]


def test_where_no_gradients_are_wanted_and_in_float32_products_are_the_same():
    wide = Objective(Subject(module()), BATCHES)
    vector = torch.randn(hessian.flat(wide.subject.parameters.values()).shape, generator=seeded(0)).double()
    wanted = hessian.Hessian(wide, wide.subject.parameters)(vector)
    with torch.inference_mode():
        made = Objective(Subject(module()), [(images * 1, labels * 1) for images, labels in BATCHES])
        found = hessian.Hessian(made, made.subject.parameters)(vector)
    assert torch.equal(found, wanted)
    narrow = Objective(Subject(module().float()), [(images.float(), labels) for images, labels in BATCHES])
    found = hessian.Hessian(narrow, narrow.subject.parameters)(vector)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_slopes_along_a_direction_are_those_of_each_image():
    objective = Objective(Subject(particles()), BATCHES)
    parameters = objective.subject.parameters
    direction = {name: torch.randn(tensor.shape, generator=seeded(1)).to(tensor) for name, tensor in parameters.items()}
    slopes = jacobian(
        lambda moved: nn.functional.cross_entropy(objective.subject(moved, IMAGES), LABELS, reduction="none"),
        parameters,
    )
    wanted = slopes @ hessian.flat(direction.values())
    torch.testing.assert_close(hessian.slopes_along(objective, parameters, direction), wanted)
    averaged = Objective(objective.subject, BATCHES, loss=nn.functional.cross_entropy)
    torch.testing.assert_close(hessian.slopes_along(averaged, parameters, direction), wanted)
    value, gradient = hessian.slope(objective, parameters)
    assert float(value) == pytest.approx(objective.score(parameters).loss)
    along = hessian.flat(gradient.values()) @ hessian.flat(direction.values())
    assert float(along) == pytest.approx(float(wanted.mean()))


def test_a_gradient_that_is_not_finite_is_refused():
    objective = Objective(Subject(module()), BATCHES, loss=lambda outputs, targets: (outputs - outputs).sqrt().mean())
    with pytest.raises(Misuse, match="gradient must be finite"):
        hessian.require_smooth(objective, objective.subject.parameters)


def test_attention_can_be_differentiated_twice():
    """Torch's fused kernels of it cannot."""
    network = filled(nn.TransformerEncoderLayer(4, 2, 4, dropout=0.0, batch_first=True), 0)
    images, targets = normal((5, 3, 4), 1), torch.zeros(5)
    objective = Objective(Subject(network), images, targets, loss=lambda outputs, _: outputs.square().mean())
    operator = hessian.Hessian(objective, objective.subject.parameters)
    vector, step = normal((operator.size,), 2), 1e-5
    slopes = [
        hessian.flat(hessian.slope(objective, hessian.named(at, objective.subject.parameters))[1].values())
        for at in (hessian.flat(objective.subject.parameters.values()) + sign * step * vector for sign in (1, -1))
    ]
    torch.testing.assert_close(operator(vector), (slopes[0] - slopes[1]) / (2 * step), rtol=1e-6, atol=1e-7)
