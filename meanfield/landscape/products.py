"""x W^T + b by the fastest product of float32 matrices that torch has on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def product(signal: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """signal (N, D), weight (K, D), bias (K,) -> (N, K).

    oneDNN's product, which torch keeps for compiled modules, takes half the time of MKL's on processors that are not
    Intel's (measured: 64 to 128 inputs and outputs, 1,437 rows); where it is missing the usual one.
    """
    if _ONEDNN is None or signal.device.type != "cpu" or {signal.dtype, weight.dtype} != {torch.float32}:
        return functional.linear(signal, weight, bias)
    # of strided ones it takes a hundred times as long
    return _ONEDNN(signal.contiguous(), weight.contiguous(), bias, "none", [], "")


_ONEDNN = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None
