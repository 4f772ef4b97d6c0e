"""Tensors from a device to the host: what is copied together is waited for once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def on_host(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors, of one dtype and device, on the host, in one copy; those of the host as they are."""
    if not tensors or tensors[0].device.type == "cpu":
        return list(tensors)
    sizes = [tensor.numel() for tensor in tensors]
    together = torch.cat([tensor.detach().flatten() for tensor in tensors]).cpu()
    return [part.view(tensor.shape) for part, tensor in zip(together.split(sizes), tensors)]
