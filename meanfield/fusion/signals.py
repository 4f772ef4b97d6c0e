"""What enters and leaves the layers of a network, images in blocks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor, nn

from meanfield.validation import Misuse, finite, instance

IMAGES = 256  # that pass through a network at a time


class Signal(NamedTuple):
    """Of one layer: maps (N, C, H, W) or vectors (N, D)."""

    entering: Tensor
    leaving: Tensor


def signals(network: nn.Module, names: Iterable[str], images: Tensor) -> Iterator[dict[str, Signal]]:
    """Block by block of images, the signals of the layers of these names."""
    with listening(network, names) as heard:
        for block in images.split(IMAGES):
            network(block.clone())  # some modules work in place
            yield dict(heard)
            heard.clear()


@contextmanager
def listening(network: nn.Module, names: Iterable[str]) -> Iterator[dict[str, Signal]]:
    """What the layers of these names take and give in the latest pass."""
    heard: dict[str, Signal] = {}

    def note(name: str, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        if isinstance(module, nn.Linear) and args[0].ndim != 2:
            remedy = f"is the shape in which they come to the Linear {name}; it must be vectors (N, D)"
            raise Misuse("images", tuple(args[0].shape), remedy)
        heard[name] = Signal(args[0], output.clone())  # which an activation in place would change

    with ExitStack() as hooks:
        for name in set(names):
            hooks.enter_context(network.get_submodule(name).register_forward_hook(partial(note, name)))
        yield heard


def by_channel(signal: Tensor, width: int) -> Tensor:
    """(width, n), float64: the values of every channel over images and positions, also of flattened maps."""
    return signal.reshape(len(signal), width, -1).transpose(0, 1).flatten(1).double()


def checked_images(images: Any, network: nn.Module) -> Tensor:
    """Images (N, ...), N >= 1, finite, in the network's dtype and on its device, such as it takes; Misuse otherwise."""
    tensor = instance(images, "images", Tensor)
    if tensor.ndim < 2 or not len(tensor):
        raise Misuse("images", tuple(tensor.shape), "is their shape; give (N, C, H, W) or (N, D), N >= 1")
    first = next(network.parameters(), tensor)
    if (tensor.dtype, tensor.device) != (first.dtype, first.device):
        kind = f"{tensor.dtype} on {tensor.device}"
        raise Misuse("images", kind, f"is their kind, that of the network {first.dtype} on {first.device}")
    images = finite(tensor, "images").detach()
    try:
        network(images[:1].clone())
    except RuntimeError as error:
        remedy = f"is a shape that the network does not take: {str(error).splitlines()[0]}"
        raise Misuse("images", tuple(images.shape), remedy) from None
    return images
