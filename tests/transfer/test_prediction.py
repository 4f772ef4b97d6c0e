"""The prediction against means over fresh starts, in standard errors of these means."""

import math

import pytest
import torch
from scipy import stats
from strategies import normal, seeded
from torch import nn
from torch.func import functional_call, vmap

import meanfield as mf
from meanfield import finite
from meanfield.finite.scaling import SCALINGS
from meanfield.transfer import Displacement, Moments, StartLaw, moments, predict
from meanfield.transfer.chain import layers
from meanfield.validation import Misuse

IMAGES = torch.rand(4, 1, 6, 6, generator=seeded(1), dtype=torch.float64)


def moved(network, scale=1.0):
    """A displacement as large as a start, and the law of that start."""
    particles = isinstance(network, mf.ParticleNetwork) or getattr(network, "scaling", None) == SCALINGS["mean_field"]
    law = (StartLaw.mean_field(network) if particles else StartLaw.he(network)).scaled(scale)
    # biases are random as well; a readout that hardly is leaves the means precise
    last = layers(network)[-1].weight
    biased = StartLaw({name: (each or 0.2) * (0.1 if name == last else 1) for name, each in law.deviations.items()})
    return Displacement.between(law.draw(network, seeded(2)), law.draw(network, seeded(3))), biased


def fresh(displacement, law, alpha, count):
    """Outputs (count, N, K) on fresh starts; `applied` is held against the same sum in test_displacement."""
    network = displacement.subject.network
    moved = {
        name: alpha * delta + law.deviations[name] * normal((count, *delta.shape), 4 + place)
        for place, (name, delta) in enumerate(displacement.delta.items())
    }
    with torch.no_grad():
        return vmap(lambda parameters: functional_call(network, parameters, (IMAGES,)))(moved)


def mlp(*widths, activation=nn.ReLU):
    layers = [nn.Flatten()]
    for source, target in zip((36, *widths), (*widths, 3)):
        layers += [nn.Linear(source, target), activation()]
    return nn.Sequential(*layers[:-1]).double()


def particles(**settings):
    layer = mf.Conv(3, activation="tanh", bias=True, **settings)
    return finite.FiniteCNN.random(mf.Architecture((1, 6, 6), (layer,), "flatten", 2), (5,), IMAGES, seeded())


EXACT = {
    "mlp": mlp(8),
    "mlp, tanh": mlp(8, activation=nn.Tanh),
    "convolution, average": nn.Sequential(
        nn.Conv2d(1, 4, (3, 2), stride=2, padding=(1, 0)), nn.GELU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(4, 3)
    ).double(),
    "particles": particles(pooling="average"),
    "finite, ntk": finite.FiniteCNN.random(
        mf.Architecture((1, 6, 6), (mf.Conv(3),), "average", 2), (5,), IMAGES, seeded(), scaling="ntk"
    ),
}


@pytest.mark.parametrize("name", EXACT)
def test_one_layer_is_exact_at_every_width(name):
    """Hotelling's test would need more draws than logits; Bonferroni's bound over the logits needs none."""
    displacement, law = moved(EXACT[name])
    draws = fresh(displacement, law, 1.5, 5000)
    found = moments(displacement, law, IMAGES, 1.5)
    errors = draws.std(0) / math.sqrt(len(draws))
    furthest = float(((draws.mean(0) - found.mean) / errors).abs().max())
    assert furthest < stats.t.isf(1e-4 / found.mean.numel() / 2, len(draws) - 1)
    # the logarithm of a variance of 5000 draws is known to sqrt(2 / 5000) = 0.02 where they are Gaussian
    ratio = draws.var(0) / found.covariance.diagonal(dim1=1, dim2=2)
    assert float(ratio.log().abs().max()) < 0.1
    rule = displacement.subject.at({key: 1.5 * each for key, each in displacement.delta.items()})(IMAGES)
    assert float(((draws.mean(0) - rule) / errors).abs().max()) > 5  # the zero start is another function


def test_one_layer_of_particles_has_its_formula():
    """F_alpha = alpha int Delta_u E h(alpha Delta_w . x + sigma |x| xi), by a rule of its own."""
    layer = mf.Conv(3, activation="tanh")
    network = finite.FiniteCNN.random(mf.Architecture((1, 6, 6), (layer,), "average", 2), (5,), IMAGES, seeded())
    network = network.particles()
    law = StartLaw.mean_field(network)
    displacement = Displacement.between(law.draw(network, seeded(2)), law.draw(network, seeded(3)))
    nodes = torch.linspace(-9, 9, 1001).tolist()
    weights = [math.exp(-(node**2) / 2) for node in nodes]
    patches = layer.patches(IMAGES)
    mean = 0.5 * patches @ displacement.delta["kernels.0"].flatten(1).T  # (N, P, M)
    size = patches.norm(dim=2, keepdim=True) * law.deviations["kernels.0"]
    smoothed = sum(torch.tanh(mean + size * node) * weight for node, weight in zip(nodes, weights)) / sum(weights)
    wanted = 0.5 * smoothed.mean(1) @ displacement.delta["readout"].T / 5
    torch.testing.assert_close(predict(displacement, law, IMAGES, 0.5), wanted, rtol=0, atol=1e-7)


DEEP = {
    "mlp": mlp(64, 64),
    "convolutions, max": nn.Sequential(
        nn.Conv2d(1, 12, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(12, 24, 2), nn.Tanh(), nn.Flatten(),
        nn.Linear(96, 3),
    ).double(),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", DEEP)
def test_deep_networks_are_predicted_to_their_width(name):
    displacement, law = moved(DEEP[name])
    draws = fresh(displacement, law, 1.0, 2000)
    found = moments(displacement, law, IMAGES)
    deviation = draws.std(0)
    # the bias is a small part of the deviation over starts, beside the error of a mean of 2000 (0.02)
    assert float(((draws.mean(0) - found.mean) / deviation).square().mean().sqrt()) < 0.1
    ratio = found.covariance.diagonal(dim1=1, dim2=2).sqrt() / deviation
    assert float((ratio.mean() - 1).abs()) < 0.1


@pytest.mark.parametrize("between", [nn.Identity(), nn.Dropout()])  # of one, channels have covariances of their own
@pytest.mark.parametrize(("stride", "padding", "dilation"), [(1, 0, 1), (2, 1, 1), (1, (2, 1), 2)])
def test_a_convolution_of_random_signals_is_its_matrix(stride, padding, dilation, between):
    """Moments behind a second convolution against those of the linear layer that it is, and of its start's kernel,
    tap by tap.
    """
    below = nn.Conv2d(1, 2, 3)
    conv = nn.Conv2d(2, 3, (2, 3), stride=stride, padding=padding, dilation=dilation)
    network = nn.Sequential(below, between, conv).double()
    law = StartLaw({"0.weight": 0.5, "0.bias": 0.3, "2.weight": 0.4, "2.bias": 0.2})
    displacement = Displacement.between(law.draw(network, seeded()), network)
    first = moments(Displacement.between(LAW_BELOW.draw(network[:1], seeded()), network[:1]), LAW_BELOW, IMAGES)
    found = moments(displacement, law, IMAGES, 1.0)
    bias = displacement.delta["2.bias"]
    free = nn.functional.conv2d(torch.eye(32).double().reshape(32, 2, 4, 4), displacement.delta["2.weight"],
                                stride=stride, padding=padding, dilation=dilation)  # fmt: skip
    matrix = free.flatten(1).T
    torch.testing.assert_close(found.mean, first.mean @ matrix.T + bias.repeat_interleave(free[0, 0].numel()))
    # the map of channels is block-diagonal below, so that the blocks of every target are sums over sources
    geometry = {"stride": stride, "padding": padding, "dilation": dilation}
    taps = nn.functional.unfold(
        torch.eye(32).double().reshape(32, 2, 4, 4), conv.kernel_size, **geometry
    )  # (32, T, P')
    seconds = first.covariance + first.mean[:, :, None] * first.mean[:, None]
    noise = 0.4**2 * torch.einsum("atp,nab,btq->npq", taps, seconds, taps) + 0.2**2
    wanted = matrix @ first.covariance @ matrix.T
    block = free[0, 0].numel()
    for target in range(3):
        part = slice(target * block, (target + 1) * block)
        torch.testing.assert_close(found.covariance[:, part, part], wanted[:, part, part] + noise)


@pytest.mark.parametrize("below", [nn.Conv2d(1, 3, 3, stride=2), nn.Sequential(nn.Flatten(), nn.Linear(36, 5))])
def test_a_linear_layer_of_random_signals_has_its_formula(below):
    """Cov g = D Cov f D' + (s^2 sum E f^2 + s_b^2) 1, exactly, with variances of f that count."""
    below = nn.Sequential(*(below if isinstance(below, nn.Sequential) else [below]), nn.Identity(), nn.Flatten())
    features = below(IMAGES.float()).shape[1]
    network = nn.Sequential(*below, nn.Linear(features, 4)).double()
    law = StartLaw({name: 0.3 + 0.1 * place for place, (name, _) in enumerate(network.named_parameters())})
    displacement = Displacement.between(law.draw(network, seeded()), network)
    lower = dict(list(law.deviations.items())[:2])
    first = moments(Displacement.between(displacement.subject.network[:-1], network[:-1]), StartLaw(lower), IMAGES)
    weight, bias = list(displacement.delta.values())[2:]
    found = moments(displacement, law, IMAGES)
    torch.testing.assert_close(found.mean, first.mean @ weight.T + bias)
    power = first.mean.square().sum(1) + first.covariance.diagonal(dim1=1, dim2=2).sum(1)
    noise = 0.5**2 * power[:, None, None] * torch.eye(4) + 0.6**2 * torch.eye(4)
    torch.testing.assert_close(found.covariance, weight @ first.covariance @ weight.T + noise)
    assert float((0.5**2 * first.covariance.diagonal(dim1=1, dim2=2).sum(1) / noise[:, 0, 0]).min()) > 0.1


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.Tanh()])
def test_a_maximum_is_taken_before_the_activation_that_it_follows(activation):
    ends = nn.Conv2d(1, 3, 3), nn.Flatten(), nn.Linear(12, 2)
    orders = [(activation, nn.MaxPool2d(2)), (nn.MaxPool2d(2), activation)]
    networks = [nn.Sequential(ends[0], *order, *ends[1:]).double() for order in orders]
    found = [moments(*moved(network), IMAGES) for network in networks]
    assert torch.equal(found[0].mean, found[1].mean)
    assert torch.equal(found[0].covariance, found[1].covariance)


LAW_BELOW = StartLaw({"0.weight": 0.5, "0.bias": 0.3})


def test_accuracy_is_a_probability_over_starts():
    mean = torch.tensor([[1.0, 0.0], [0.0, 0.5]], dtype=torch.float64)
    covariance = torch.tensor([[2.0, 0.5], [0.5, 1.0]], dtype=torch.float64).expand(2, 2, 2)
    wanted = (stats.norm.cdf(1 / math.sqrt(2)) + stats.norm.cdf(0.5 / math.sqrt(2))) / 2
    found = Moments(mean, covariance).accuracy(torch.tensor([0, 1]))
    assert found == pytest.approx(wanted, abs=2 / 1024)
    assert Moments(mean, 0 * covariance).accuracy(torch.tensor([0, 1])) == 1.0


def test_blocks_of_images_change_nothing(monkeypatch):
    displacement, law = moved(mlp(8))
    whole = predict(displacement, law, IMAGES)
    monkeypatch.setattr(mf.limits, "block_bytes", lambda: 1)
    torch.testing.assert_close(predict(displacement, law, IMAGES), whole, rtol=1e-13, atol=1e-14)
    assert predict(displacement, law, IMAGES.float()).dtype == torch.float32


@pytest.mark.parametrize(
    ("network", "said"),
    [
        (nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(32, 2)), r"1 \(BatchNorm2d\)"),
        (nn.Sequential(nn.Flatten(), nn.Linear(36, 4), nn.LeakyReLU(0.3), nn.Linear(4, 2)), r"2 \(LeakyReLU\)"),
        (nn.Sequential(nn.Conv2d(1, 2, 3), nn.GELU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8, 2)), r"gelu"),
        (finite.residual((1, 6, 6), 2, width=2, batch_norm=False, generator=seeded()), "ResidualBlock"),
        (nn.Sequential(nn.Linear(6, 2)), "reads 6 features"),  # which torch takes row by row
        (nn.Sequential(nn.Flatten(), nn.Linear(36, 4), nn.GELU("tanh"), nn.Linear(4, 2)), r"2 \(GELU\)"),
        (
            nn.Sequential(nn.Conv2d(1, 2, 3), nn.Conv2d(2, 2, 2, groups=2), nn.Flatten(), nn.Linear(18, 2)),
            r"1 \(Conv2d",
        ),
        (nn.Sequential(nn.Conv2d(1, 2, 3), nn.MaxPool2d(2, padding=1), nn.Flatten(), nn.Linear(18, 2)), r"1 \(MaxPool"),
        (nn.Sequential(nn.Flatten(), *[nn.Linear(36, 36)] * 2), r"2 \(Linear\)' shares parameters"),
    ],
)
def test_what_has_no_prediction_is_refused_by_name(network, said):
    network = network.double()
    law = StartLaw.he(network)
    with pytest.raises(Misuse, match=said):
        predict(Displacement.between(network, network), law, IMAGES)


@pytest.mark.parametrize(
    ("images", "said"),
    [
        (IMAGES[:0], "at least one image"),
        ((100 * IMAGES).long(), "of floats"),
        (IMAGES[..., :5], r"images=\(4, 1, 6, 5\) is a shape that the network does not take"),
    ],
)
def test_images_are_refused_in_one_line(images, said):
    displacement, law = moved(mlp(8))
    with pytest.raises(Misuse, match=said) as caught:
        predict(displacement, law, images)
    assert caught.value.argument == "images"
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="labels has shape"):
        moments(displacement, law, IMAGES).accuracy(torch.zeros(3, dtype=torch.int64))


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.ReLU(inplace=True)])
def test_an_activation_may_stand_at_two_places_and_work_in_place(activation):
    """Modules are walked in the order of their calls; `named_children` has one that stands twice once."""
    apart = mlp(8, 8)
    first, second = (layer for layer in apart if isinstance(layer, nn.Linear) and layer.out_features == 8)
    shared = nn.Sequential(nn.Flatten(), first, activation, second, activation, apart[-1])
    images = IMAGES.clone()
    found = [predict(*moved(network), images) for network in (apart, shared)]
    assert torch.equal(*found)
    assert torch.equal(images, IMAGES)


def test_an_activation_of_what_is_not_random_leaves_the_images():
    network = nn.Sequential(nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(36, 2)).double()
    images = -IMAGES
    predict(*moved(network), images)
    assert torch.equal(images, -IMAGES)


def test_a_law_of_other_parameters_is_refused():
    displacement, law = moved(mlp(8))
    with pytest.raises(Misuse, match=r"start_law='1\.bias'"):
        predict(displacement, StartLaw({name: 1.0 for name in law.deviations if name != "1.bias"}), IMAGES)
