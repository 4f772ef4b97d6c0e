"""VGG and residual classifiers: layers, shapes and names, the start, the size of the signal, the blocks; the random
numbers they draw.
"""

import math

import pytest
import torch
from strategies import seeded
from torch import nn
from torch.nn import functional

from meanfield.finite import residual, vgg
from meanfield.finite.vgg import ResidualBlock

STAGES = {8: [1] * 5, 11: [1, 1, 2, 2, 2], 13: [2] * 5, 16: [2, 2, 3, 3, 3]}


def images(*shape, seed=5, dtype=torch.float32):
    return torch.rand(shape, generator=seeded(seed), dtype=torch.float64).to(dtype)


def names(network, kind):
    return [name for name, module in network.named_children() if isinstance(module, kind)]


class TestVGGLayers:
    @pytest.mark.parametrize("depth", STAGES)
    def test_convolutions_and_poolings_are_those_of_the_table(self, depth):
        network = vgg(depth, (3, 32, 32), 10, width=2, generator=seeded())
        expected, channels, index = [], 3, 0
        for stage, (count, width) in enumerate(zip(STAGES[depth], (2, 4, 8, 16, 16)), start=1):
            for _ in range(count):
                index += 1
                expected += [(f"conv{index}", channels, width), f"relu{index}"]
                channels = width
            expected.append(f"pool{stage}")
        found = [
            (n, m.in_channels, m.out_channels) if isinstance(m, nn.Conv2d) else n for n, m in network.named_children()
        ]
        assert found == [*expected, "flatten", "linear1"]
        assert all(
            (c.kernel_size, c.padding, c.stride) == ((3, 3), (1, 1), (1, 1))
            for c in network
            if isinstance(c, nn.Conv2d)
        )
        assert network(images(2, 3, 32, 32)).shape == (2, 10)

    @pytest.mark.parametrize(
        ("side", "poolings", "features"),
        [((1, 1), 0, 8), ((8, 8), 3, 8), ((14, 14), 3, 8), ((28, 28), 4, 8), ((32, 32), 5, 8), ((4, 9), 2, 16)],
    )
    def test_poolings_stop_before_the_map_is_smaller_than_their_window(self, side, poolings, features):
        network = vgg(8, (1, *side), 3, width=1, generator=seeded())
        assert names(network, nn.MaxPool2d) == [f"pool{stage}" for stage in range(1, poolings + 1)]
        assert network.linear1.in_features == features  # 8 channels times the positions that are left
        assert network(images(2, 1, *side)).shape == (2, 3)

    def test_an_activation_takes_the_place_of_every_relu(self):
        network = vgg(8, (1, 4, 4), 3, width=1, hidden=(4,), activation="tanh", generator=seeded())
        assert names(network, nn.Tanh) == [f"tanh{index}" for index in range(1, 7)]
        assert not names(network, nn.ReLU)

    def test_hidden_layers_and_dropout(self):
        network = vgg(11, (1, 8, 8), 4, width=1, hidden=(6, 5), dropout=0.25, generator=seeded())
        expected = ["flatten", "dropout1", "linear1", "relu9", "dropout2", "linear2", "relu10", "dropout3", "linear3"]
        assert [name for name, _ in network.named_children()][-9:] == expected
        assert [(m.in_features, m.out_features) for m in network if isinstance(m, nn.Linear)] == [
            (8, 6),
            (6, 5),
            (5, 4),
        ]
        assert {m.p for m in network if isinstance(m, nn.Dropout)} == {0.25}
        assert names(vgg(11, (1, 8, 8), 4, width=1, dropout=0.5, generator=seeded()), nn.Dropout) == ["dropout1"]
        assert not names(vgg(11, (1, 8, 8), 4, width=1, hidden=(6,), generator=seeded()), nn.Dropout)

    def test_vgg_16_has_as_many_parameters_as_published(self):
        network = vgg(16, (3, 32, 32), 10, generator=seeded())
        convolutions = [m for m in network if isinstance(m, nn.Conv2d)]
        assert sum(m.weight.numel() for m in convolutions) == 14_710_464
        assert sum(m.bias.numel() for m in convolutions) == 4_224
        assert sum(p.numel() for p in network.parameters()) == 14_714_688 + 512 * 10 + 10


class TestVGGStart:
    @pytest.mark.parametrize(
        # on 4x4 images the maps are 4, 2, 1, 1, 1 wide; (3 - 2 / h)^2 offsets meet them
        ("fan_in", "offsets"),
        [("kernel", (9, 9, 9, 9, 9)), ("inside", (2.5**2, 4, 1, 1, 1))],
    )
    def test_variances(self, fan_in, offsets):
        network = vgg(8, (3, 4, 4), 64, width=32, hidden=(256,), fan_in=fan_in, generator=seeded())
        sources = (3, 32, 64, 128, 256)
        for index, (count, channels) in enumerate(zip(offsets, sources), start=1):
            self.is_normal(network.get_submodule(f"conv{index}").weight, 2 / (count * channels))
        self.is_normal(network.linear1.weight, 2 / 256)
        self.is_normal(network.linear2.weight, 1 / 256)
        assert all(not p.any() for name, p in network.named_parameters() if name.endswith("bias"))

    def test_variances_follow_the_activation(self):
        network = vgg(8, (3, 4, 4), 64, width=32, activation="tanh", fan_in="kernel", generator=seeded())
        self.is_normal(network.conv2.weight, 1 / (9 * 32))
        block = residual((3, 4, 4), 64, width=32, activation="tanh", generator=seeded()).get_submodule("stage1.0")
        self.is_normal(block.conv1.weight, 1 / (9 * 32))
        self.is_normal(block.conv2.weight, 1 / (9 * 32))

    def is_normal(self, weight, variance):
        """Mean, variance and fourth moment within five standard deviations."""
        x, n = weight.detach().double().flatten() / math.sqrt(variance), weight.numel()
        assert abs(float(x.mean())) < 5 / math.sqrt(n)
        assert abs(float(x.square().mean()) - 1) < 5 * math.sqrt(2 / n)
        assert abs(float(x.pow(4).mean()) - 3) < 5 * math.sqrt(96 / n)

    def test_the_size_of_the_signal_survives_small_maps_only_when_fan_ins_lie_inside(self):
        """On 1x1 maps 8 of 9 kernel entries meet zeros: a layer then divides the variance by nine."""
        found = {}
        for fan_in in ("inside", "kernel"):
            network = vgg(8, (4, 1, 1), 2, width=64, fan_in=fan_in, generator=seeded())[:-2]
            found[fan_in] = float(
                network(images(50, 4, 1, 1)).detach().square().mean() / images(50, 4, 1, 1).square().mean()
            )
        assert 0.3 < found["inside"] < 3
        assert found["kernel"] == pytest.approx(found["inside"] * 9.0**-5, rel=1e-4)

    @pytest.mark.parametrize("make", [vgg, residual])
    def test_the_generator_alone_decides_and_the_global_numbers_are_untouched(self, make):
        arguments = ((8, (1, 4, 4), 3), {"width": 2, "hidden": (4,)}) if make is vgg else (((1, 4, 4), 3), {"width": 2})
        before = torch.get_rng_state()
        first, again, other = (make(*arguments[0], **arguments[1], generator=seeded(s)).state_dict() for s in (1, 1, 2))
        assert torch.equal(torch.get_rng_state(), before)
        assert all(torch.equal(first[name], again[name]) for name in first)
        assert not torch.equal(first["conv1.weight"], other["conv1.weight"])
        generator = seeded(1)
        assert not torch.equal(
            *(make(*arguments[0], **arguments[1], generator=generator).conv1.weight for _ in range(2))
        )

    @pytest.mark.parametrize(
        "make", [lambda **k: vgg(8, (1, 4, 4), 3, width=2, **k), lambda **k: residual((1, 4, 4), 3, width=2, **k)]
    )
    def test_dtypes_differ_by_rounding_only(self, make):
        single, double = make(generator=seeded()), make(generator=seeded(), dtype=torch.float64)
        assert {p.dtype for p in double.parameters()} == {torch.float64}
        x = images(3, 1, 4, 4, dtype=torch.float64)
        assert double(x).dtype == torch.float64
        torch.testing.assert_close(single(x.float()).double(), double(x), rtol=1e-3, atol=1e-4)


class TestResidual:
    def test_names_shapes_and_strides(self):
        network = residual((3, 9, 8), 5, width=2, blocks=(1, 2, 1), generator=seeded())
        expected = ["conv1", "norm1", "relu1", "stage1", "stage2", "stage3", "pool", "flatten", "linear1"]
        assert [name for name, _ in network.named_children()] == expected
        blocks = [name for name, module in network.named_modules() if isinstance(module, ResidualBlock)]
        assert blocks == ["stage1.0", "stage2.0", "stage2.1", "stage3.0"]
        signal, seen = images(2, 3, 9, 8), []
        for name, module in network.named_children():
            signal = module(signal)
            seen += [tuple(signal.shape[1:])] * name.startswith(("conv", "stage", "linear"))
        assert seen == [(2, 9, 8), (2, 9, 8), (4, 5, 4), (8, 3, 2), (5,)]
        assert isinstance(network.get_submodule("stage1.0.shortcut"), nn.Identity)
        assert isinstance(network.get_submodule("stage2.1.shortcut"), nn.Identity)
        assert network.get_submodule("stage2.0.shortcut")[0].kernel_size == (1, 1)

    def test_the_mean_over_positions_is_read(self):
        network = residual(
            (1, 4, 4), 3, width=2, blocks=(1,), batch_norm=False, generator=seeded(), dtype=torch.float64
        )
        x = images(2, 1, 4, 4, dtype=torch.float64)
        features = network[:3](x)
        torch.testing.assert_close(network(x), features.mean((2, 3)) @ network.linear1.weight.T)

    @pytest.mark.parametrize(("batch_norm", "activation"), [(True, "relu"), (False, "relu"), (True, "tanh")])
    def test_a_block_is_the_formula_of_its_docstring(self, batch_norm, activation):
        h = {"relu": lambda signal: signal.clamp_min(0), "tanh": torch.tanh}[activation]
        block = ResidualBlock(2, 3, 2, batch_norm, seeded(), torch.float64, activation).train()
        with torch.no_grad():
            for index, parameter in enumerate(block.parameters()):
                parameter.copy_(torch.randn(parameter.shape, generator=seeded(index), dtype=torch.float64))
        x = images(4, 2, 5, 5, dtype=torch.float64)
        found, at = block(x), dict(block.named_parameters())

        def norm(signal, name):
            return self.norm(signal, at[f"{name}.weight"], at[f"{name}.bias"]) if batch_norm else signal

        inner = h(norm(functional.conv2d(x, at["conv1.weight"], at.get("conv1.bias"), 2, 1), "norm1"))
        outer = norm(functional.conv2d(inner, at["conv2.weight"], at.get("conv2.bias"), 1, 1), "norm2")
        side = "shortcut.0" if batch_norm else "shortcut"
        across = norm(functional.conv2d(x, at[f"{side}.weight"], at.get(f"{side}.bias"), 2), "shortcut.1")
        torch.testing.assert_close(found, h(outer + across))
        assert ("conv1.bias" in at) != batch_norm

    def norm(self, signal, scale, shift):
        mean, variance = signal.mean((0, 2, 3), keepdim=True), signal.var((0, 2, 3), keepdim=True, unbiased=False)
        return (signal - mean) / (variance + 1e-5).sqrt() * scale[:, None, None] + shift[:, None, None]

    def test_without_batch_norm_a_block_starts_as_its_shortcut(self):
        network = residual((1, 6, 6), 3, width=4, batch_norm=False, generator=seeded())
        assert not any(isinstance(module, nn.BatchNorm2d) for module in network.modules())
        signal = network[:2](images(2, 1, 6, 6))
        assert torch.equal(network.get_submodule("stage1.0")(signal), signal)
        assert network.get_submodule("stage1.0.conv1").weight.any()
        assert residual((1, 6, 6), 3, width=4, generator=seeded()).get_submodule("stage1.0.conv2").weight.any()


class TestArguments:
    @pytest.mark.parametrize(
        ("changed", "message"),
        [
            ({"depth": 12}, "depth=12 must be one of 8, 11, 13, 16"),
            ({"depth": "11"}, "depth='11' must be an integer"),
            ({"input_shape": (8, 8)}, r"input_shape=\(8, 8\) must be three integers \(C, H, W\)"),
            ({"input_shape": (1, 0, 8)}, "input_shape=0 must be an integer of at least 1"),
            ({"classes": 1}, "classes=1 must be an integer of at least 2"),
            ({"width": 0}, "width=0 must be an integer of at least 1"),
            ({"hidden": 512}, "hidden=512 must be a sequence of integers"),
            ({"hidden": (0,)}, "hidden=0 must be an integer of at least 1"),
            ({"dropout": 1.0}, "dropout=1.0 must be at least 0 and less than 1"),
            ({"dropout": -0.1}, "dropout=-0.1 must be a finite number of at least 0"),
            ({"activation": "elu"}, "activation='elu' is unknown"),
            ({"fan_in": "inner"}, "fan_in='inner' is unknown.*'inside'"),
        ],
    )
    def test_vgg(self, changed, message):
        with pytest.raises(ValueError, match=message):
            vgg(**{"depth": 11, "input_shape": (1, 8, 8), "classes": 3, "width": 1, "generator": seeded(), **changed})

    @pytest.mark.parametrize(
        ("changed", "message"),
        [
            ({"blocks": ()}, r"blocks=\(\) must hold one integer per stage"),
            ({"blocks": (1, 0)}, "blocks=0 must be an integer of at least 1"),
            ({"batch_norm": 1}, "batch_norm=1 must be True or False"),
            ({"input_shape": "abc"}, "input_shape='abc' must be a sequence of integers"),
        ],
    )
    def test_residual(self, changed, message):
        with pytest.raises(ValueError, match=message):
            residual(**{"input_shape": (1, 8, 8), "classes": 3, "generator": seeded(), **changed})
