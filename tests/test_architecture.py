import json
import re

import numpy as np
import pytest
import reference as slow
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import architectures, convs, normal, random_inputs, random_network, seeds

import meanfield as mf


@given(convs((4, 5), tuple(slow.ACTIVATIONS)), seeds)
def test_convolve_matches_the_explicit_sums(conv, seed):
    inputs, kernels, bias = normal((2, 2, 4, 5), seed), normal((3, 2, *conv.kernel), seed + 1), normal((3,), seed + 2)
    expected = [
        [slow.convolve(x, w, [1, 1], b, conv) for w, b in zip(kernels.numpy(), bias.numpy())] for x in inputs.numpy()
    ]
    np.testing.assert_allclose(conv.convolve(inputs, kernels, bias), expected, atol=1e-13)


@given(convs((4, 5), ("tanh",)), seeds)
def test_patches_are_the_shifts_channel_major(conv, seed):
    inputs = normal((2, 2, 4, 5), seed)
    patches = conv.patches(inputs).numpy()
    for n, image in enumerate(inputs.numpy()):
        for row, q in enumerate(slow.positions_of(conv, image[0])):
            expected = [slow.shifted(channel, *q, conv, s) for channel in image for s in slow.offsets_of(conv)]
            np.testing.assert_array_equal(patches[n, row], expected)


@given(convs((4, 5), tuple(slow.ACTIVATIONS)), seeds)
def test_activate_matches_the_explicit_pooling(conv, seed):
    g = normal((2, 3, 4, 5), seed)
    expected = [[slow.activate(map_, conv) for map_ in maps] for maps in g.numpy()]
    np.testing.assert_allclose(conv.activate(g), expected, atol=1e-13)


@given(architectures())
def test_geometry_predicts_every_shape(arch):
    signal = normal((1, *arch.input_shape), 0)
    widths = [2] * arch.depth
    for conv, geometry, shape in zip(arch.layers, arch.geometry, arch.kernel_shapes(widths)):
        assert tuple(signal.shape[2:]) == geometry.input
        g = conv.convolve(signal, normal(shape, 1))
        assert tuple(g.shape[2:]) == geometry.output
        signal = conv.activate(g)
        assert tuple(signal.shape[2:]) == geometry.pooled
    assert arch.readout_positions == signal[0, 0].numel()


@given(architectures(), seeds)
def test_readout_features_are_means_or_shares_of_positions(arch, seed):
    features = normal((2, 3, *arch.geometry[-1].pooled), seed)
    seen = arch.readout_features(features).numpy()
    flat = features.numpy().reshape(2, 3, -1)
    expected = flat.mean(2) if arch.readout == "average" else flat / flat.shape[2]
    np.testing.assert_allclose(seen, expected, atol=1e-14)
    assert arch.readout_shape(3) == (arch.outputs, *seen.shape[1:])


@given(architectures())
def test_description_survives_json(arch):
    assert mf.Architecture.from_dict(json.loads(json.dumps(arch.to_dict()))) == arch


def test_kernel_shapes_put_the_target_first():
    arch = mf.Architecture((3, 8, 8), (mf.Conv((1, 2)), mf.Conv(3)))
    assert arch.kernel_shapes((5, 7)) == [(5, 3, 1, 2), (7, 5, 3, 3)]


def test_sizes_are_stored_as_pairs():
    conv = mf.Conv(kernel_size=3, padding=(0, 1), stride=[2, 1])
    assert (conv.kernel_size, conv.padding, conv.stride, conv.pool_size, conv.offsets) == (
        (3, 3),
        (0, 1),
        (2, 1),
        (2, 2),
        9,
    )


def test_one_layer_may_be_given_bare():
    assert mf.Architecture((1, 3, 3), mf.Conv()).layers == (mf.Conv(),)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_operations_keep_dtype_and_device(dtype, device):
    conv = mf.Conv(2, padding=1, stride=2, pooling="average")
    x, w = normal((2, 3, 5, 5), 0, dtype).to(device), normal((4, 3, 2, 2), 1, dtype).to(device)
    g = conv.convolve(x, w)
    for tensor in (g, conv.activate(g), conv.patches(x)):
        assert tensor.dtype == dtype
        assert tensor.device.type == device.type


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernel_size": 0}, "kernel_size=0"),
        ({"kernel_size": (1, 2, 3)}, "kernel_size=.*pair"),
        ({"kernel_size": 2.5}, "kernel_size=2.5"),
        ({"padding": -1}, "padding=-1"),
        ({"stride": 0}, "stride=0"),
        ({"pool_size": 0}, "pool_size=0"),
        ({"activation": "rely"}, "activation='rely'.*did you mean 'relu'"),
        ({"pooling": "mean"}, "pooling='mean'"),
        ({"bias": 1}, "bias=1 must be True or False"),
    ],
)
def test_conv_names_the_bad_argument(options, message):
    with pytest.raises(ValueError, match=message):
        mf.Conv(**options)


@pytest.mark.parametrize(
    ("shape", "layers", "options", "message"),
    [
        ((4, 4), (mf.Conv(),), {}, r"input_shape=\(4, 4\) must be \(channels, height, width\)"),
        (4, (mf.Conv(),), {}, "input_shape=4"),
        ((1, 0, 4), (mf.Conv(),), {}, "input_shape=0"),
        ((1, 4, 4), (), {}, r"layers=\(\) must be a non-empty"),
        ((1, 4, 4), ("conv",), {}, "layers=.*sequence of Conv"),
        ((1, 4, 4), 3, {}, "layers=3 must be a non-empty"),
        ((1, 4, 4), (mf.Conv(),), {"readout": "mean"}, "readout='mean'"),
        ((1, 4, 4), (mf.Conv(),), {"outputs": 0}, "outputs=0"),
        (
            (1, 4, 2),
            (mf.Conv(),),
            {},
            r"kernel_size=\(3, 3\) .* input of layers\[0\], 2 along width \(input 2, padding 0\)",
        ),
        ((1, 4, 4), (mf.Conv(), mf.Conv()), {}, r"kernel_size=\(3, 3\) .* layers\[1\], 2 along height"),
        (
            (1, 3, 3),
            (mf.Conv(3, pooling="max"),),
            {},
            r"pooling='max' does not fit layers\[0\]: pool_size=\(2, 2\) leaves no position of the output \(1, 1\)",
        ),
    ],
)
def test_architecture_names_the_bad_argument(shape, layers, options, message):
    with pytest.raises(ValueError, match=message):
        mf.Architecture(shape, layers, **options)


@pytest.mark.parametrize(
    "description",
    [{}, {"layers": [{"kernel": 3}]}, {"layers": 3}, None, {"input_shape": [1, 4, 4], "layers": [{}], "colour": 1}],
)
def test_from_dict_refuses_other_descriptions(description):
    with pytest.raises(ValueError, match=r"architecture description .* is not one written by to_dict"):
        mf.Architecture.from_dict(description)


@pytest.mark.parametrize("shape", [(1, 3, 3), (2, 1, 3, 4), (2, 2, 3, 3)])
def test_check_inputs_names_the_expected_shape(shape):
    with pytest.raises(ValueError, match=re.escape(f"images has shape {shape}; the architecture expects (N, 1, 3, 3)")):
        mf.Architecture((1, 3, 3), mf.Conv()).check_inputs(torch.zeros(shape), "images")


def test_shapes_and_counts_may_come_from_arrays():
    """And leave none in the description, which is written as JSON."""
    arch = mf.Architecture(
        np.array([1, 4, 4]), (mf.Conv(np.int64(2), bias=np.True_) for _ in range(2)), outputs=np.int64(2)
    )
    assert arch == mf.Architecture.from_dict(json.loads(json.dumps(arch.to_dict())))
    assert arch == mf.Architecture((1, 4, 4), [mf.Conv(2, bias=True)] * 2, outputs=2)


@given(architectures(), st.integers(1, 4))
def test_entries_are_the_numbers_that_an_image_and_its_maps_take(arch, width):
    network, image = random_network(arch, [width] * arch.depth, 0), random_inputs(arch, 1, 0)
    responses = network.responses(image)
    maps = image.numel() + sum(map(torch.numel, (*responses.preactivations, *responses.features)))
    patches = max(layer.patches(below).numel() for layer, below in zip(arch.layers, (image, *responses.features)))
    for copies in (1, 3):
        assert arch.entries(network.widths, copies) == copies * maps + patches
