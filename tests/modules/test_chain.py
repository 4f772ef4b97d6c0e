"""Modules that are trained elsewhere compute the same as particles, or are refused by the name of a layer."""

import pytest
import torch
from torch import nn
from torch.nn import functional

import meanfield as mf
from meanfield import finite
from meanfield.validation import Misuse

PRECISION = {torch.float64: 1e-12, torch.float32: 1e-5}
IMAGES = torch.randn(6, 3, 12, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Written(nn.Module):
    """As tutorials write them: functions, and pools in front of activations."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 2, padding=1)
        self.fc1, self.fc2 = nn.Linear(45, 7), nn.Linear(7, 4)

    def forward(self, x):
        x = functional.relu(functional.max_pool2d(self.conv1(x), 2))
        x = functional.max_pool2d(torch.relu_(self.conv2(x)), 2)
        return self.fc2(torch.tanh(self.fc1(x.view(x.size(0), -1))))


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.conv2, self.fc = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, padding=1), nn.Linear(400, 2)

    def forward(self, x):
        x = torch.relu(self.conv1(x))
        return self.fc(torch.flatten(torch.relu(x + self.conv2(x)), 1))


class Means(nn.Module):
    """Averages over positions by tensor methods, kept as maps or not."""

    def __init__(self, axes=(2, 3)):
        super().__init__()
        self.conv1, self.conv2, self.fc, self.axes = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 1), nn.Linear(5, 3), axes

    def forward(self, x):
        x = torch.relu(self.conv1(x)).mean(self.axes, keepdim=True)
        return self.fc(torch.relu(self.conv2(x)).mean((2, 3)))


def head(*modules, size, outputs=3):
    return nn.Sequential(*modules, nn.Flatten(), nn.Linear(size, outputs))


NETWORKS = {
    "strides": lambda: head(
        nn.Conv2d(3, 4, (3, 2), padding=(1, 0), stride=(2, 1)),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.MaxPool2d((2, 3)),
        nn.Dropout(),
        nn.Conv2d(4, 6, 3, bias=False),
        nn.ReLU(),
        size=6,
    ),
    "functions": Written,
    "means": Means,
    "norms": lambda: nn.Sequential(
        nn.BatchNorm2d(3),
        nn.Conv2d(3, 4, 3),
        nn.ReLU(),
        nn.BatchNorm2d(4),
        nn.AvgPool2d(2),
        nn.BatchNorm2d(4),
        nn.AvgPool2d((1, 2)),
        nn.Conv2d(4, 6, (3, 2), padding="valid"),
        nn.Softplus(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.BatchNorm1d(6),
        nn.Linear(6, 3),
    ),
    "mlp": lambda: nn.Sequential(
        nn.Flatten(),
        nn.Linear(432, 6),
        nn.BatchNorm1d(6, affine=False),
        nn.GELU(),
        nn.Linear(6, 5),
        nn.Tanh(),
        nn.Linear(5, 2),
    ),
    "averaged": lambda: nn.Sequential(
        nn.Conv2d(3, 4, 3, padding="same"),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d((4, 2)),
        nn.Flatten(),
        nn.Linear(32, 6),
        nn.Linear(6, 3),
    ),
}


def trained(make, dtype):
    """A few steps of a plain loop: running statistics that are no longer 0 and 1."""
    torch.manual_seed(1)
    module, images = make().to(dtype), IMAGES.to(dtype)
    optimiser = torch.optim.SGD(module.parameters(), 0.1)
    for _ in range(3):
        optimiser.zero_grad()
        module(images).square().mean().backward()
        optimiser.step()
    return module.eval(), images


@pytest.mark.parametrize("dtype", PRECISION, ids=str)
@pytest.mark.parametrize(
    "name", [name if name == "strides" else pytest.param(name, marks=pytest.mark.slow) for name in NETWORKS]
)
def test_outputs_are_the_modules(name, dtype):
    module, images = trained(NETWORKS[name], dtype)
    network = mf.ParticleNetwork.from_module(module, images[:1])
    with torch.no_grad():
        assert (network(images) - module(images)).abs().max() <= PRECISION[dtype]
    assert network.dtype == dtype
    for masses in network.masses:
        assert torch.equal(masses, torch.full_like(masses, 1 / len(masses)))


def test_kernels_are_weights_times_channels_and_the_bias_of_the_readout_is_a_particle():
    module, images = trained(NETWORKS["strides"], torch.float64)
    network = mf.ParticleNetwork.from_module(module, images)
    assert network.widths == (4, 7)
    torch.testing.assert_close(network.kernels[1][:6], 4 * module[5].weight.detach())
    torch.testing.assert_close(network.readout[:, :6, 0], 7 * module[8].weight.detach())
    assert network.biases[1].tolist() == [0] * 6 + [1]
    assert not network.kernels[1][6].any()
    torch.testing.assert_close(network.readout[:, 6, 0], 7 * module[8].bias.detach())


@pytest.mark.parametrize("dtype", PRECISION, ids=str)
@pytest.mark.parametrize("readout", ["average", "flatten"])
def test_modules_of_ours_come_back_to_the_last_bit(readout, dtype):
    """Also where a mass is no binary fraction: three channels of images, widths 6 and 7."""
    layers = (mf.Conv(3, 1, activation="gelu", pooling="max"), mf.Conv(2, stride=2, activation="tanh", bias=True))
    architecture = mf.Architecture((3, 12, 12), layers, readout, outputs=2)
    generator = torch.Generator().manual_seed(3)
    module = finite.sequential(mf.starts.start(architecture, (6, 7), IMAGES.to(dtype), generator)).eval()
    network = mf.ParticleNetwork.from_module(module, IMAGES.to(dtype))
    assert network.architecture == architecture
    again = finite.sequential(network).state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in module.state_dict().items())


def turned():
    """Batch norm that turns the sign of some features."""
    norm = nn.BatchNorm2d(4)
    nn.init.constant_(norm.weight, -1)
    return norm


def behind(*modules, size):
    return head(nn.Conv2d(3, 4, 3), nn.ReLU(), *modules, size=size)


def directly(*modules, size):
    return head(nn.Conv2d(3, 4, 3), *modules, size=size)


REFUSED = {
    "shortcut": (Residual, "module='Residual' joins or branches"),
    "dilation": (lambda: directly(nn.Conv2d(4, 4, 3, dilation=(1, 2)), size=192), r"1 \(Conv2d\).*dilation=\(1, 2\)"),
    "groups": (lambda: behind(nn.Conv2d(4, 4, 3, groups=2), size=256), r"2 \(Conv2d\).*groups=2"),
    "even": (lambda: behind(nn.Conv2d(4, 4, 2, padding="same"), size=400), r"2 \(Conv2d\).*pads two sides differently"),
    "overlap": (lambda: behind(nn.MaxPool2d(3, 2), size=64), r"2 \(MaxPool2d\).*stride = kernel_size"),
    "padded pool": (lambda: behind(nn.AvgPool2d(2, padding=1), size=144), r"2 \(AvgPool2d\).*are padded"),
    "dilated pool": (lambda: behind(nn.MaxPool2d(2, dilation=2), size=64), r"2 \(MaxPool2d\).*leave gaps"),
    "incomplete": (lambda: behind(nn.MaxPool2d(3, ceil_mode=True), size=64), r"2 \(MaxPool2d\).*ceil_mode=False"),
    "divisor": (lambda: behind(nn.AvgPool2d(2, divisor_override=3), size=100), r"2 \(AvgPool2d\).*divisor_override"),
    "largest": (lambda: behind(nn.AdaptiveMaxPool2d(1), size=4), r"2 \(AdaptiveMaxPool2d\).*no single tensor"),
    "unequal": (lambda: behind(nn.AdaptiveAvgPool2d(4), size=64), r"2 \(AdaptiveAvgPool2d\).*unequal size"),
    "unknown": (lambda: directly(nn.ReLU6(), size=400), r"1 \(ReLU6\).*activations are relu, tanh"),
    "approximate": (lambda: directly(nn.GELU("tanh"), size=400), r"1 \(GELU\).*activations are"),
    "activations": (lambda: behind(nn.Tanh(), size=400), r"2 \(Tanh\).*follows another activation"),
    "padded": (
        lambda: behind(nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1), size=400),
        r"2 \(BatchNorm2d\).*pads with zeros",
    ),
    "sign": (lambda: behind(turned(), nn.MaxPool2d(2), size=100), r"2 \(BatchNorm2d\).*turns the sign"),
    "twice": (lambda: behind(nn.MaxPool2d(2), nn.AvgPool2d(5), size=4), r"3 \(AvgPool2d\).*max pooled before"),
    "average": (lambda: directly(nn.AvgPool2d(2), nn.ReLU(), size=100), r"2 \(ReLU\).*average pools"),
    "whole average": (lambda: directly(nn.AdaptiveAvgPool2d(1), nn.ReLU(), size=4), r"2 \(ReLU\).*acts on averages"),
    "not rising": (lambda: directly(nn.MaxPool2d(2), nn.GELU(), size=100), r"2 \(GELU\).*acts on max pools"),
    "normalised": (
        lambda: directly(nn.MaxPool2d(2), nn.BatchNorm2d(4), nn.ReLU(), size=100),
        r"3 \(ReLU\).*normalised pools",
    ),
    "positions": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.BatchNorm1d(400), nn.Linear(400, 2)),
        r"3 \(BatchNorm1d\).*in front of the flattening",
    ),
    "rows": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(2), nn.Linear(100, 2)), r"1 \(Flatten\).*\(4, 100\)"),
    "map": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Linear(10, 2)), r"2 \(Linear\).*put a Flatten"),
    "axes": (lambda: Means((2,)), "module='Means' averages over other axes"),
    "softmax": (
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(432, 4), nn.ReLU(), nn.Linear(4, 2), nn.Softmax(1)),
        r"4 \(Softmax\).*leave it out",
    ),
    "end": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), r"1 \(ReLU\).*end in one Linear"),
    "linear": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(432, 4)), r"1 \(Linear\).*only layer"),
    "weights": (
        lambda: directly(nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 3)), size=256),
        r"1 \(ParametrizedConv2d\).*remove_parametrizations",
    ),
}


QUICK = ("shortcut", "dilation", "groups", "overlap", "unknown", "average", "largest", "end")


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize(
    ("make", "said"),
    [pytest.param(*case, id=name, marks=() if name in QUICK else pytest.mark.slow) for name, case in REFUSED.items()],
)
def test_what_has_no_place_is_refused_by_name(make, said):
    module, images = trained(make, torch.float64)
    with pytest.raises(Misuse, match=said):
        mf.ParticleNetwork.from_module(module, images)


@pytest.mark.parametrize(
    ("layer", "said"), [(nn.Dropout(), r"1 \(Dropout\).*eval"), (nn.BatchNorm2d(4), r"1 \(BatchNorm2d\).*eval")]
)
def test_training_mode_is_refused_and_changes_nothing(layer, said):
    module = head(nn.Conv2d(3, 4, 3), layer, nn.ReLU(), size=400).double()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    with pytest.raises(Misuse, match=said):
        mf.ParticleNetwork.from_module(module, IMAGES)
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())


def test_wrong_arguments_are_named():
    module = head(nn.Conv2d(3, 4, 3), nn.ReLU(), size=400)
    with pytest.raises(TypeError, match="module must be a torch"):
        mf.ParticleNetwork.from_module("network.pt", IMAGES)
    with pytest.raises(Misuse, match="example"):
        mf.ParticleNetwork.from_module(module, IMAGES[0])
    with pytest.raises(Misuse, match="module='Sequential' cannot be followed on the example"):
        mf.ParticleNetwork.from_module(module, IMAGES)  # float64 for a module in float32
