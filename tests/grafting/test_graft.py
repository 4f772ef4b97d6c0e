"""Grafts against slow twins, closed forms and known answers."""

from __future__ import annotations

import copy
import gc
import io
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from strategies import normal
from torch import Tensor, nn
from torch.nn import functional
from torch_networks import IMAGES, filled, plain, residual

from meanfield.grafting import Graft, Junction, graft, layer_errors

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
# the last two are no linear layers: a 1x1 convolution or a matrix goes in front
LAYERS = ["0", "3", "5", "8", "10", "12", "7", "11"]


def state(network: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


@pytest.mark.parametrize("layer", LAYERS)
def test_a_graft_of_a_network_on_itself_is_that_network(layer):
    network = plain(6, 0)
    found = graft(network, network, layer, IMAGES)
    assert found.error < 1e-24
    torch.testing.assert_close(found.network(IMAGES), network(IMAGES).detach(), rtol=0, atol=1e-10)


@pytest.mark.parametrize("layer", ["stem", "stage1.0", "stage1.1", "stage2.0", "head"])
def test_a_residual_network_of_a_user_grafts_on_itself_and_on_another(layer):
    network, other = residual(4, 0), residual(6, 1)
    before, flags = state(network), [module.training for module in network.modules()]
    images = normal((80, 2, 12, 12), 9)
    own = graft(network, network, layer, images)
    torch.testing.assert_close(own.network(images), copy.deepcopy(network).eval()(images).detach(), rtol=0, atol=1e-10)
    across = graft(other, network, layer, images)
    assert 0 <= across.error < 1
    assert across.network(images).shape == (80, 3)
    assert flags == [module.training for module in network.modules()]
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())


def slow_patches(layer: nn.Conv2d, signal: Tensor) -> np.ndarray:
    """(N, C, H, W) -> (n, C kh kw), one entry at a time from zero-padded maps."""
    (kh, kw), (sh, sw), (dh, dw), (ph, pw) = layer.kernel_size, layer.stride, layer.dilation, layer.padding
    count, channels, height, width = signal.shape
    rows = []
    for n in range(count):
        for y in range(-ph, height + ph - dh * (kh - 1), sh):
            for x in range(-pw, width + pw - dw * (kw - 1), sw):
                row = []
                for c in range(channels):
                    for i in range(kh):
                        for j in range(kw):
                            v, u = y + i * dh, x + j * dw
                            row.append(float(signal[n, c, v, u]) if 0 <= v < height and 0 <= u < width else 0.0)
                rows.append(row)
    return np.array(rows)


@pytest.mark.parametrize(
    ("geometry", "pool"),
    [
        ({"kernel_size": 3, "padding": 1}, nn.MaxPool2d(2)),
        ({"kernel_size": (2, 3), "stride": (2, 1), "padding": (0, 1)}, nn.Identity()),
        ({"kernel_size": 2, "dilation": 2, "stride": 2, "padding": 1}, nn.AvgPool2d(3, stride=1)),
    ],
)
@pytest.mark.parametrize("bias", [True, False])
def test_least_squares_against_a_slow_twin(geometry, pool, bias):
    def make(width: int, seed: int) -> nn.Sequential:
        conv = nn.Conv2d(width, 3, bias=bias, **geometry)
        return filled(nn.Sequential(nn.Conv2d(2, width, 3), nn.ReLU(), pool, conv, nn.Tanh()), seed)  # type: ignore[return-value]

    lower, upper, images = make(4, 0), make(5, 1), normal((24, 2, 8, 8), 2)
    found = graft(lower, upper, "3", images)
    design = slow_patches(lower[3], lower[:3](images).detach())
    if bias:
        design = np.concatenate([np.ones((len(design), 1)), design], 1)
    goal = upper[:4](images).detach().movedim(1, -1).reshape(-1, 3).numpy()
    weights, *_ = np.linalg.lstsq(design, goal, rcond=None)
    fitted = found.network.connection.layer
    kernel = fitted.weight.detach().flatten(1).T.numpy()
    np.testing.assert_allclose(kernel, weights[1:] if bias else weights, atol=1e-10)
    if bias:
        np.testing.assert_allclose(fitted.bias.detach().numpy(), weights[0], atol=1e-10)
    error = ((design @ weights - goal) ** 2).sum() / ((goal - goal.mean(0)) ** 2).sum()
    assert found.error == pytest.approx(error, rel=1e-9)
    assert (found.samples, found.unknowns) == (len(design), design.shape[1] - bias)
    expected = upper[4](
        functional.conv2d(
            lower[:3](images), fitted.weight, fitted.bias, upper[3].stride, upper[3].padding, upper[3].dilation
        )
    )
    torch.testing.assert_close(found.network(images), expected.detach(), rtol=0, atol=1e-12)


def test_the_solution_is_of_least_norm_where_features_are_dead_or_equal():
    network = plain(6, 0)
    lower = copy.deepcopy(network)
    with torch.no_grad():
        lower[3].weight[2], lower[3].bias[2] = 0, -1.0  # never above zero: dead
        lower[3].weight[4], lower[3].bias[4] = lower[3].weight[1], lower[3].bias[1]  # twins
    found = graft(lower, network, "5", IMAGES)
    kernel = found.network.connection.layer.weight
    assert bool((kernel[:, 2] == 0).all())
    torch.testing.assert_close(kernel[:, 1], kernel[:, 4], rtol=0, atol=1e-9)
    assert found.rank <= (7 - 2) * 6


@pytest.mark.parametrize("layer", ["5", "8"])
def test_a_permutation_of_channels_is_recovered(layer):
    network = plain(6, 0)
    below = {"5": "3", "8": "5"}[layer]
    order = torch.tensor([3, 0, 6, 5, 1, 4, 2] if layer == "5" else [2, 0, 1, 5, 3, 4])
    lower = copy.deepcopy(network)
    source, reader = lower.get_submodule(below), lower.get_submodule(layer)
    with torch.no_grad():
        source.weight.copy_(source.weight[order])
        if source.bias is not None:
            source.bias.copy_(source.bias[order])
        reader.weight.copy_(reader.weight[:, order])
    for method in ("match", "transport"):
        found = graft(lower, network, layer, IMAGES, method)
        assert torch.equal(found.network.connection.layer.weight, reader.weight)
        assert found.error < 1e-24
    squares = graft(lower, network, layer, IMAGES)
    torch.testing.assert_close(squares.network(IMAGES), network(IMAGES).detach(), rtol=0, atol=1e-10)
    if squares.rank == squares.unknowns:  # only then is the kernel determined
        torch.testing.assert_close(squares.network.connection.layer.weight, reader.weight.detach(), rtol=0, atol=1e-9)


def test_transport_splits_the_kernel_over_clones():
    network = plain(6, 2)
    with torch.no_grad():
        network[3].bias.fill_(1.0)
    assert bool((network[:5](IMAGES).amax((0, 2, 3)) > 0).all())  # dead channels could be exchanged
    lower = copy.deepcopy(network)
    clones = torch.tensor([0, 1, 2, 3, 4, 5, 6] * 2)
    lower[3] = nn.Conv2d(6, 14, 3, stride=2).double()
    with torch.no_grad():
        lower[3].weight.copy_(network[3].weight[clones])
        lower[3].bias.copy_(network[3].bias[clones])
    lower[5] = nn.Conv2d(14, 6, (2, 3), padding="same", dilation=(1, 2), bias=False).double()
    found = graft(lower, network, "5", IMAGES, "transport")
    torch.testing.assert_close(
        found.network.connection.layer.weight.detach(), network[5].weight[:, clones].detach() / 2, rtol=0, atol=1e-12
    )
    torch.testing.assert_close(found.network(IMAGES), network(IMAGES).detach(), rtol=0, atol=1e-10)


def test_transport_is_optimal_and_not_blind_to_rotations_as_least_squares_is():
    lower, upper = plain(6, 0), plain(6, 1)
    junction = Junction.observe(lower, upper, "5", IMAGES)
    features = [network[:5](IMAGES).detach().transpose(0, 1).flatten(1) for network in (lower, upper)]
    torch.testing.assert_close(junction.costs, torch.cdist(*features).square())
    rotation = torch.linalg.qr(normal((7, 7), 5)).Q
    turn = nn.Conv2d(7, 7, 1, bias=False).double()
    with torch.no_grad():
        turn.weight.copy_(rotation[..., None, None])
    turned = nn.Sequential(*list(lower)[:5], turn, *list(lower)[5:])
    same = graft(turned, upper, "5", IMAGES, lower_layer="6")
    assert same.error == pytest.approx(graft(lower, upper, "5", IMAGES).error, rel=1e-9)
    own = graft(
        nn.Sequential(*list(upper)[:5], turn, *list(upper)[5:]), upper, "5", IMAGES, "transport", lower_layer="6"
    )
    assert own.error > 0.05  # on itself transport would be exact


def test_match_needs_equal_widths_and_transport_does_not():
    with pytest.raises(ValueError, match=r"method='match' needs equal widths; 5 features below and 7 above"):
        graft(plain(4, 0), plain(6, 1), "5", IMAGES, "match")
    assert graft(plain(4, 0), plain(6, 1), "5", IMAGES, "transport").error > 0


def test_ridge_against_the_normal_equations():
    lower, upper = plain(5, 0), plain(5, 1)
    found = graft(lower, upper, "8", IMAGES, ridge=0.3)
    design = (
        functional.unfold(functional.pad(lower[:8](IMAGES), (1, 1, 1, 1), "circular"), 2)
        .transpose(1, 2)
        .flatten(0, 1)
        .detach()
        .numpy()
    )
    goal = upper[:9](IMAGES).detach().movedim(1, -1).reshape(-1, 3).numpy()
    a, b = design - design.mean(0), goal - goal.mean(0)
    weights = np.linalg.solve(a.T @ a / len(a) + 0.3 * np.eye(a.shape[1]), a.T @ b / len(a))
    layer = found.network.connection.layer
    np.testing.assert_allclose(layer.weight.detach().flatten(1).T, weights, atol=1e-11)
    np.testing.assert_allclose(layer.bias.detach(), goal.mean(0) - design.mean(0) @ weights, atol=1e-11)
    with pytest.raises(ValueError, match=r"ridge=0.1 is of least squares"):
        graft(lower, upper, "8", IMAGES, "transport", 0.1)


@pytest.mark.slow
def test_adam_ends_where_least_squares_is():
    lower, upper = plain(4, 0), plain(4, 1)
    exact, found = graft(lower, upper, "5", IMAGES), graft(lower, upper, "5", IMAGES, "adam", steps=3000)
    assert exact.error <= found.error <= exact.error * 1.02


def test_adam_draws_from_its_seed_and_reads_the_inputs_again():
    lower, upper = plain(4, 0), plain(4, 1)
    first, again, other = (
        graft(lower, upper, "5", IMAGES, "adam", steps=5, seed=seed).network(IMAGES) for seed in (3, 3, 4)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    few = graft(lower, upper, "5", IMAGES.split(10), "adam", steps=5)  # a list can be read again, a generator cannot
    assert few.error > graft(lower, upper, "5", IMAGES).error
    with pytest.raises(ValueError, match="read only once"):
        graft(lower, upper, "5", (batch for batch in IMAGES.split(10)), "adam", steps=99)


def test_float32_agrees_with_float64():
    lower, upper = plain(5, 0), plain(6, 1)
    for layer in ("3", "8", "10"):
        exact = graft(lower, upper, layer, IMAGES)
        single = graft(copy.deepcopy(lower).float(), copy.deepcopy(upper).float(), layer, IMAGES.float())
        assert single.error == pytest.approx(exact.error, rel=1e-4)
        torch.testing.assert_close(single.network(IMAGES.float()).double(), exact.network(IMAGES), rtol=0, atol=2e-3)


def test_layers_of_other_depths_meet_by_averaging_or_repeating():
    lower, upper = plain(5, 0), plain(5, 1)
    down = graft(lower, upper, "5", IMAGES, lower_layer="3")  # 6x6 maps to 2x2: means over 3x3 pixels
    signal = functional.avg_pool2d(lower[:3](IMAGES), 3)
    torch.testing.assert_close(down.network.connection.resampled(lower[:3](IMAGES)), signal)
    expected = upper[6:](
        functional.conv2d(functional.pad(signal, (2, 2, 0, 1)), down.network.connection.layer.weight, dilation=(1, 2))
    )
    torch.testing.assert_close(down.network(IMAGES), expected.detach(), rtol=0, atol=1e-12)
    up = graft(lower, upper, "3", IMAGES, lower_layer="5")  # 2x2 to 6x6: every pixel nine times
    repeated = lower[:5](IMAGES).repeat_interleave(3, 2).repeat_interleave(3, 3)
    torch.testing.assert_close(up.network.connection.resampled(lower[:5](IMAGES)), repeated)
    flat = graft(lower, upper, "10", IMAGES, lower_layer="8")  # a map into a fully connected layer: flattened
    assert flat.unknowns == 5 * 1 * 1
    with pytest.raises(ValueError, match="maps connect to maps"):
        graft(lower, upper, "5", IMAGES, lower_layer="12")


def test_inputs_are_not_kept():
    """A generator's batches are gone once they have been read: what is stored does not grow with their number."""
    alive: list[weakref.ref[Tensor]] = []

    def batches():
        for seed in range(6):
            batch = normal((20, 2, 12, 12), seed)
            alive.append(weakref.ref(batch))
            yield batch
            del batch
            gc.collect()
            assert sum(each() is not None for each in alive) <= 2

    lower, upper = plain(5, 0), plain(5, 1)
    seen: list[int] = []
    found = graft(lower, upper, "5", batches(), progress=seen.append)
    assert sum(seen) == 120
    whole = torch.cat([normal((20, 2, 12, 12), seed) for seed in range(6)])
    assert found.error == pytest.approx(graft(lower, upper, "5", whole).error, rel=1e-9)


def test_a_loader_of_pairs_is_read(tmp_path):
    images, labels = IMAGES[:40], torch.zeros(40)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, labels), batch_size=16)
    assert graft(plain(5, 0), plain(5, 1), "3", loader).error == pytest.approx(
        graft(plain(5, 0), plain(5, 1), "3", images).error, rel=1e-9
    )


def test_errors_name_what_is_wrong():
    lower, upper = plain(5, 0), plain(5, 1)
    with pytest.raises(ValueError, match=r"layer='conv3' is not a module of the network"):
        graft(lower, upper, "conv3", IMAGES)
    with pytest.raises(ValueError, match=r"lower_layer='99' is not a module"):
        graft(lower, upper, "3", IMAGES, lower_layer="99")
    with pytest.raises(ValueError, match=r"method='least_square' is unknown.*did you mean 'least_squares'"):
        graft(lower, upper, "3", IMAGES, "least_square")
    with pytest.raises(ValueError, match="must share one dtype"):
        graft(lower, upper, "3", IMAGES.float())
    with pytest.raises(ValueError, match="must be floating-point"):
        graft(lower, upper, "3", IMAGES.int())
    with pytest.raises(ValueError, match="got nothing"):
        graft(lower, upper, "3", [])
    with pytest.raises(TypeError, match=r"upper must be a torch.nn.Module, not int"):
        graft(lower, 3, "3", IMAGES)  # type: ignore[arg-type]


class InPlace(nn.Module):
    """Changes its inputs, and its first layer is an activation in place."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x -= 1
        x /= 2
        return self.second(functional.relu(self.first(x), inplace=True))


def test_networks_that_work_in_place_change_nobody_s_inputs():
    network, images = filled(InPlace(), 0), normal((100, 6), 0)
    before = images.clone()
    for layer in ("first", "second"):
        found = graft(network, network, layer, images)
        assert found.error < 1e-24
        assert max(layer_errors(found, network, images).values()) < 1e-24
        found.network(images)
        assert torch.equal(images, before)
    lower = filled(nn.Sequential(nn.Linear(6, 4)), 1)
    plain_, changing = (filled(nn.Sequential(nn.ReLU(inplace), nn.Linear(6, 4)), 2) for inplace in (False, True))
    errors = [graft(lower, upper, "1", images, lower_layer="0").error for upper in (plain_, changing)]
    assert errors[0] == pytest.approx(errors[1], rel=1e-12)


def test_matrices_on_the_last_axis_of_anything():
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.mix = nn.Conv2d(2, 5, 3), nn.Linear(5, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.mix(torch.tanh(self.conv(x)).permute(0, 2, 3, 1))

    lower, upper = filled(Last(), 0), filled(Last(), 1)
    found = graft(lower, upper, "mix", IMAGES)
    assert (found.unknowns, found.samples) == (5, 150 * 100)
    features = torch.tanh(lower.conv(IMAGES)).permute(0, 2, 3, 1).flatten(0, 2).detach().numpy()
    goal = upper(IMAGES).flatten(0, 2).detach().numpy()
    design = np.concatenate([np.ones((len(features), 1)), features], 1)
    missed = goal - design @ np.linalg.lstsq(design, goal, rcond=None)[0]
    assert found.error == pytest.approx((missed**2).sum() / ((goal - goal.mean(0)) ** 2).sum(), rel=1e-9)


def test_inputs_that_cannot_be_used_are_named():
    lower, upper = plain(5, 0), plain(5, 1)
    broken = IMAGES.clone()
    broken[3, 0, 0, 0] = float("nan")
    for method in ("least_squares", "transport"):
        with pytest.raises(ValueError, match="not finite"):
            graft(lower, upper, "5", broken, method)
    with pytest.raises(
        ValueError, match=r"begin with torch.float64 \(150, 2, 12, 12\) and go on with torch.int64 \(150,\)"
    ):
        graft(lower, upper, "5", (IMAGES, torch.zeros(150, dtype=torch.int64)))
    with pytest.raises(TypeError, match="inputs must be a tensor"):
        graft(lower, upper, "5", None)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"layer=5 must be the name"):
        graft(lower, upper, 5, IMAGES)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="have not been added"):
        Junction(lower, upper, "5", "5", IMAGES[:2]).graft()
    split = [IMAGES[:70], IMAGES[:0], IMAGES[70:]]
    found = graft(lower, upper, "5", split)
    assert found.error == pytest.approx(graft(lower, upper, "5", IMAGES).error, rel=1e-12)
    assert layer_errors(found, upper, split) == pytest.approx(layer_errors(found, upper, IMAGES))


@pytest.fixture(scope="module")
def joined() -> Graft:
    return graft(residual(6, 1), residual(4, 0), "stage1.1", IMAGES)


def test_a_graft_may_be_called_by_many_threads(joined):
    upper, images = residual(4, 0), IMAGES[:2]
    expected, errors = joined.network(images), layer_errors(joined, upper, images)

    def call(index: int) -> bool:
        if index % 20 == 0:
            return layer_errors(joined, upper, images) == errors
        return torch.equal(joined.network(images), expected)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(call, range(320)))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.jit
def test_a_graft_is_copied_pickled_traced_and_exported_as_it_is(joined):
    network, expected = joined.network, joined.network(IMAGES)
    buffer = io.BytesIO()
    torch.save(network, buffer)
    buffer.seek(0)
    count = torch.export.Dim("count")
    exported = torch.export.export(network, (IMAGES[:3],), dynamic_shapes=({0: count},), strict=False)
    for made in (
        copy.deepcopy(network),
        torch.load(buffer, weights_only=False),
        torch.jit.trace(network, (IMAGES[:3],)),
        exported.module(),
    ):
        torch.testing.assert_close(made(IMAGES), expected, rtol=0, atol=1e-12)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_graft_cannot_be_scripted(joined):
    for network in (joined.network, nn.Sequential(joined.network)):
        with pytest.raises(TypeError, match=r"^network is a graft.*use torch.export.export.*or torch.jit.trace[^\n]*$"):
            torch.jit.script(network)
