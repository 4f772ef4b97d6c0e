"""Products of float32 numbers in float32: recent GPUs round what convolutions read to 10 bits unless told otherwise."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

# (owner, name) of what decides, and its value for float32; torch has renamed both
_DECIDES = (
    (
        (torch.backends.cudnn.conv, "fp32_precision", "ieee"),  # type: ignore[attr-defined]
        (torch.backends.cuda.matmul, "fp32_precision", "ieee"),
    )
    if hasattr(torch.backends.cuda.matmul, "fp32_precision")
    else ((torch.backends.cudnn, "allow_tf32", False), (torch.backends.cuda.matmul, "allow_tf32", False))
)


@contextmanager
def full_float32() -> Iterator[None]:
    """Also a decorator.  What is computed inside, backward passes included, is not rounded to TF32: that raises the
    violation of a frozen point from 5e-7 to 4e-4.  The process's settings are put back at the end, whatever it is.
    """
    if not torch.cuda.is_available():
        yield
        return
    before = [getattr(owner, name) for owner, name, _ in _DECIDES]
    try:
        for owner, name, value in _DECIDES:
            setattr(owner, name, value)
        yield
    finally:
        for (owner, name, _), value in zip(_DECIDES, before):
            setattr(owner, name, value)
