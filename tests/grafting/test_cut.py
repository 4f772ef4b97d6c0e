"""Cuts: what enters a layer, what the rest makes of another signal put there, and where that is exact."""

from __future__ import annotations

from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from strategies import normal
from torch import Tensor, nn
from torch.nn import functional
from torch_networks import filled, plain, residual

from meanfield.grafting import cut, graft

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
IMAGES = normal((6, 2, 12, 12), 3)
PLAIN = plain(4, 0).requires_grad_(False)  # "1" and "6" are one module under two names
RESIDUAL = residual(4, 0).eval().requires_grad_(False)


def pooled(x: Tensor) -> Tensor:
    return functional.adaptive_avg_pool2d(x, 1).flatten(1)


def parts(network: nn.Module, layer: str):
    """The network before a layer, and from it on, written out."""
    if network is PLAIN:
        return PLAIN[: int(layer)], PLAIN[int(layer) :]
    stem = lambda x: functional.relu(RESIDUAL.norm(RESIDUAL.stem(x)))  # noqa: E731
    one, two = RESIDUAL.stage1
    last = lambda x: RESIDUAL.head(pooled(RESIDUAL.stage2(x)))  # noqa: E731
    return {
        "stem": (lambda x: x, RESIDUAL),
        "stage1": (stem, lambda x: last(two(one(x)))),
        "stage1.0": (stem, lambda x: last(two(one(x)))),
        "stage1.1": (lambda x: one(stem(x)), lambda x: last(two(x))),
        "stage2.0": (lambda x: two(one(stem(x))), last),
        "head": (lambda x: pooled(RESIDUAL.stage2(two(one(stem(x))))), RESIDUAL.head),
    }[layer]


CASES = [(PLAIN, str(index)) for index in range(len(PLAIN))]
CASES += [(RESIDUAL, layer) for layer in ("stem", "stage1", "stage1.0", "stage1.1", "stage2.0", "head")]
every_layer = pytest.mark.parametrize(("network", "layer"), CASES, ids=[layer for _, layer in CASES])


@every_layer
def test_below_is_what_enters_the_layer(network, layer):
    assert torch.equal(cut.Below(network, layer)(IMAGES), parts(network, layer)[0](IMAGES))


@every_layer
def test_above_carries_a_signal_on_whatever_the_inputs(network, layer):
    """Put at the layer's entrance or in place of its output; every layer here is a cut."""
    before, after = parts(network, layer)
    signal = normal(before(IMAGES).shape, 5)
    entered, replaced = (cut.Above(network, layer, entering=entering) for entering in (True, False))
    expected, left = after(signal), network.get_submodule(layer)(signal.clone())
    torch.testing.assert_close(entered(signal.clone(), IMAGES), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(replaced(left.clone(), IMAGES), expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(entered(signal.clone(), IMAGES + 1), entered(signal.clone(), IMAGES))
    if (network, layer) not in ((PLAIN, "1"), (PLAIN, "6")):  # called twice
        cut.check(network, layer, IMAGES, "layer", entering=True)
        cut.check(network, layer, IMAGES, "layer", entering=False)


class Broken(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("must not run")


@pytest.mark.parametrize("around", [nn.Sequential, lambda *layers: nn.Sequential(nn.Sequential(*layers))])
def test_below_runs_nothing_after_the_layer(around):
    layer = "1" if around is nn.Sequential else "0.1"
    network = around(nn.Linear(3, 4), nn.ReLU(), Broken())
    assert torch.equal(
        cut.Below(network, layer)(torch.ones(2, 3)), network.get_submodule(layer[:-1] + "0")(torch.ones(2, 3))
    )


def test_no_hook_is_left_behind_and_inputs_stay():
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            x += 1
            return self.layer(x)

    network, inputs = InPlace(), torch.zeros(2, 3)
    cut.Below(network, "layer")(inputs)
    cut.Above(network, "layer", entering=True)(torch.ones(2, 3), inputs)
    cut.called_once(network, "layer", inputs, "layer")
    cut.check(network, "layer", inputs, "layer", entering=False)
    with cut.recorded(network, (nn.Linear,)):
        network(inputs.clone())
    assert not inputs.any()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())


def test_calls_from_several_threads_at_once_see_nothing_of_each_other():
    """One module under two tasks in four threads, each with a signal of its own."""
    below, above = cut.Below(RESIDUAL, "stage1.1"), cut.Above(RESIDUAL, "stage1.1", entering=True)
    signals = [normal((2, 4, 12, 12), seed) for seed in range(4)]
    entering, expected = below(IMAGES[:2]), [above(signal, IMAGES[:2]) for signal in signals]

    def call(index: int) -> bool:
        signal = signals[index % 4]
        return torch.equal(above(signal, IMAGES[:2]), expected[index % 4]) and torch.equal(below(IMAGES[:2]), entering)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(call, range(320)))


def test_a_pass_that_misses_the_layer_says_so():
    class Sometimes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            try:
                return self.layer(x) if len(x) > 1 else x
            except Exception:  # what a cut does is none of a user's business
                return x

    below, above = cut.Below(Sometimes(), "layer"), cut.Above(Sometimes(), "layer", entering=False)
    assert torch.equal(below(torch.ones(2, 3)), torch.ones(2, 3))
    for call in (lambda: below(torch.ones(1, 3)), lambda: above(torch.ones(1, 3), torch.ones(1, 3))):
        with pytest.raises(RuntimeError, match="'layer' was not called in this pass"):
            call()


def test_a_cut_of_a_cut():
    """The layer of the outer cut lies inside the network of the inner one, and the other way round."""
    inner = nn.Sequential(OrderedDict(first=nn.Flatten(1), rest=cut.Below(RESIDUAL, "stage1.1")))
    stem = functional.relu(RESIDUAL.norm(RESIDUAL.stem(IMAGES)))
    inner[0] = nn.Identity()
    assert torch.equal(cut.Below(inner, "rest.network.stage1.0")(IMAGES), stem)
    assert torch.equal(cut.Below(nn.Sequential(inner), "0")(IMAGES), IMAGES)
    assert torch.equal(inner(IMAGES), RESIDUAL.stage1[0](stem))


def test_recorded_outputs_are_those_of_every_module_in_order_before_anything_in_place():
    network = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(300, 2)).double()
    with cut.recorded(network, (nn.Conv2d, nn.Linear)) as found:
        output = network(IMAGES)
    assert list(found) == ["0", "3"]
    assert torch.equal(found["0"], network[0](IMAGES))
    assert bool((found["0"] < 0).any())
    assert torch.equal(found["3"], output)
    network(IMAGES + 1)
    assert torch.equal(found["3"], output)


@pytest.mark.parametrize("layer", ["stage1.0.conv1", "stage1.1.conv2", "stage2.0.down", "stage1.0.bn1"])
@pytest.mark.parametrize("entering", [False, True])
def test_a_layer_beside_a_shortcut_is_refused(layer, entering):
    with pytest.raises(ValueError, match=f"layer='{layer}' is no cut .*way around this layer"):
        cut.check(RESIDUAL, layer, IMAGES, "layer", entering=entering)


class Shortcut(nn.Module):
    def __init__(self, hide: bool) -> None:
        super().__init__()
        self.inner, self.outer, self.hide = nn.Linear(6, 6), nn.Linear(6, 3), hide

    def forward(self, x: Tensor) -> Tensor:
        return self.outer((x.detach() if self.hide else x) + self.inner(functional.relu(x)))


@pytest.mark.parametrize("hide", [False, True])
def test_shortcuts_are_seen_without_a_graph_as_well(hide):
    network = filled(Shortcut(hide), 0)
    for check in (
        lambda: cut.check(network, "inner", normal((20, 6), 0), "layer", entering=False),
        lambda: graft(network, network, "inner", normal((20, 6), 0)),
    ):
        with pytest.raises(ValueError, match="way around this layer"):
            check()
        with torch.no_grad(), pytest.raises(ValueError, match="way around this layer"):
            check()


def test_a_layer_called_twice_is_refused():
    for check in (cut.called_once, lambda *arguments: cut.check(*arguments, entering=True)):
        with pytest.raises(ValueError, match="lower_layer='scale' is called 2 times"):
            check(RESIDUAL, "scale", IMAGES, "lower_layer")
        with pytest.raises(ValueError, match="layer='6' is called 2 times"):
            check(PLAIN, "6", IMAGES, "layer")


def test_a_layer_needs_one_tensor_by_position():
    class Calls(nn.Module):
        def __init__(self, how: str) -> None:
            super().__init__()
            self.layer, self.how = nn.Bilinear(3, 3, 2) if how == "two" else nn.Linear(3, 2), how

        def forward(self, x: Tensor) -> Tensor:
            return {"two": lambda: self.layer(x, x), "named": lambda: self.layer(input=x)}[self.how]()

    for how in ("two", "named"):
        with pytest.raises(ValueError, match="layer='layer' does not take one tensor by position"):
            cut.called_once(Calls(how), "layer", torch.ones(2, 3), "layer")


def test_modules_are_found_by_name():
    assert cut.find(RESIDUAL, "stage1.1.conv2", "layer") is RESIDUAL.stage1[1].conv2
    assert cut.find(PLAIN, "6", "layer") is PLAIN[1]
    with pytest.raises(
        ValueError, match=r"layer='stage1.0.conv3' is not .*there are 'stage1.0.conv\d'.*\(\d+ in all\)"
    ):
        cut.find(RESIDUAL, "stage1.0.conv3", "layer")
    with pytest.raises(ValueError, match=r"it has none, put it into an nn\.Sequential"):
        cut.find(nn.Linear(2, 2), "0", "layer")
    with pytest.raises(TypeError, match="lower_layer=3 must be the name"):
        cut.find(PLAIN, 3, "lower_layer")
