import pytest
import torch
from strategies import normal, seeded
from torch import nn
from torch_networks import IMAGES as MANY
from torch_networks import Residual, filled, plain

from meanfield.finite import FiniteCNN
from meanfield.landscape.channels import chain, select
from meanfield.validation import Misuse

pytestmark = pytest.mark.filterwarnings("ignore:Using padding")

IMAGES = MANY[:20]


def normed() -> nn.Sequential:
    """Nested, one activation in two places, batch norm before and after flattening, a slope per channel."""
    shared = nn.Tanh()
    body = nn.Sequential(nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), shared, nn.MaxPool2d(2), nn.Conv2d(6, 4, 3), shared)
    head = nn.Sequential(nn.Linear(36, 7), nn.PReLU(7), nn.Linear(7, 3))
    network = filled(nn.Sequential(body, nn.Flatten(), nn.BatchNorm1d(36), head), 0)
    network(IMAGES)  # running statistics that are not the default
    return network.eval()


NETWORKS = [plain(6, 1).eval(), normed()]


def widths(network):
    return [len(network.get_submodule(stage.layer).weight) for stage in chain(network, "network").stages[:-1]]


@pytest.mark.parametrize("network", NETWORKS)
def test_another_order_is_the_same_function_and_other_weights(network):
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    orders = [torch.randperm(width, generator=seeded(width)) for width in widths(network)]
    moved = select(network, orders)
    torch.testing.assert_close(moved(IMAGES), network(IMAGES), rtol=1e-10, atol=1e-12)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    first = chain(network, "network").stages[0].layer
    assert torch.equal(moved.get_submodule(first).weight, network.get_submodule(first).weight[orders[0]])
    back = select(moved, [order.argsort() for order in orders])
    assert all(torch.equal(tensor, before[name]) for name, tensor in back.state_dict().items())


@pytest.mark.parametrize("network", NETWORKS)
def test_copies_that_share_what_reads_them_are_the_same_function(network):
    keep = [torch.cat([torch.arange(width), torch.tensor([0, 2])]) for width in widths(network)]
    shares = [torch.ones(len(rows), dtype=torch.float64) for rows in keep]
    for share, width in zip(shares, widths(network)):
        share[[0, width]] = torch.tensor([0.3, 0.7], dtype=torch.float64)
        share[[2, width + 1]] = torch.tensor([0.9, 0.1], dtype=torch.float64)
    grown = select(network, keep, shares)
    assert widths(grown) == [width + 2 for width in widths(network)]
    torch.testing.assert_close(grown(IMAGES), network(IMAGES), rtol=1e-10, atol=1e-12)


def test_fewer_channels_are_those_without_the_others():
    network = filled(nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2)), 0)
    few, inputs = select(network, [torch.tensor([3, 1])]), normal((6, 5), 1)
    hidden = network[1](network[0](inputs))[:, [3, 1]]
    torch.testing.assert_close(few(inputs), hidden @ network[2].weight[:, [3, 1]].T + network[2].bias)
    assert few[0].out_features == few[2].in_features == 2


class Own(nn.Sequential):
    def forward(self, x):
        return 2 * super().forward(x)


def test_what_is_no_chain_is_refused_by_name():
    tied = nn.Linear(3, 3)
    hooked = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
    hooked[1].register_forward_hook(lambda *_: None)
    grouped = nn.Sequential(nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 1, groups=2), nn.Conv2d(2, 2, 1))
    cases = [
        (Residual(4), "a='Residual' is no nn.Sequential"),
        (nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3), nn.Linear(3, 2)), "a='1' is a LayerNorm, not known to act on"),
        (nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(2), nn.Linear(4, 2)), "a='1' is a Flatten, not known"),
        (grouped, "a='1' is a Conv2d, not known"),
        (hooked, "a='1' is a ReLU, not known"),
        (nn.Sequential(tied, nn.ReLU(), tied), "a='Sequential' shares parameters between layers"),
        (nn.Sequential(Own(nn.Linear(2, 2))), "a='0' is an nn.Sequential that does something of its own"),
        (nn.Sequential(nn.ReLU()), "a='Sequential' has no Conv2d and no Linear"),
        (FiniteCNN.__new__(FiniteCNN), r"finite\.sequential makes one of it"),
    ]
    for network, message in cases:
        with pytest.raises(Misuse, match=message):
            chain(network, "a")
