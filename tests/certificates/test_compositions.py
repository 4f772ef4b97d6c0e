import pytest
import torch
from strategies import normal

import meanfield as mf
from meanfield.certificates import compositions


@pytest.mark.parametrize("kernel", [1, (1, 2), 2, (2, 3), 3])
@pytest.mark.parametrize(("padding", "stride"), [(0, 1), (1, 2), ((1, 0), (1, 2)), (0, (2, 1))])
def test_each_feature_is_convolved_as_torch_does(kernel, padding, stride):
    conv = mf.Conv(kernel, padding, stride)
    signal, kernels = normal((2, 3, 4, 5, 6), 0), normal((3, 2, 4, *conv.kernel), 1)
    found = compositions.convolve_each(conv, signal, kernels)
    for r in range(3):
        expected = torch.nn.functional.conv2d(signal[:, r], kernels[r], stride=stride, padding=padding)
        torch.testing.assert_close(found[:, r], expected, rtol=1e-12, atol=1e-12)
