"""Whether a part of a network makes of every image the same, in any pass and in any company.

A fit sums over batches, and a graft is then called on others: both mean something only where what a part makes of an
image depends on that image alone.  Chance, state that is kept between calls and statistics of a batch break that, in
evaluation mode as well.  `require` runs the part on a few images and refuses with the reason.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Hashable

import numpy as np
import torch
from torch import Tensor, nn

from meanfield.validation import Misuse

IMAGES = 16  # of an example: chance that is rare for one of them is less so for all
PASSES = 64  # where random numbers are drawn: chance that acts in one pass of four is missed once in 10^8 times


@torch.no_grad()
def require(part: nn.Module, images: tuple[Tensor, ...], argument: str, layer: str, what: str) -> None:
    """ValueError unless `part` makes the same of the same images again, backwards, and of the last of them alone.

    images: its arguments, (N, ...) each, N >= 2; no pass must have been run before, which buffers would show.
    argument, layer: the layer at which a network is cut and the name of that argument.  what: the part, as the subject
    of a sentence.

    Results are the same if they differ by at most sqrt(eps) of the largest value, eps that of the images' dtype: in
    batches of other sizes sums are taken in other orders, whose rounding (eps) grows by the condition of the part, and
    a part that loses half of its digits to rounding is beyond fitting.  What N images share changes by about 1 / N when
    one of them is left alone.
    """
    trial = _Trial(part, images, lambda reason: Misuse(argument, layer, f"is no place for a graft: {what} {reason}"))
    trial.again()
    trial.in_other_company()


class _Trial:
    """A part, its images and what it makes of them; the methods raise what `refusal` makes of the reason."""

    def __init__(self, part: nn.Module, images: tuple[Tensor, ...], refusal: Callable[[str], Misuse]) -> None:
        self.part, self.images, self.refusal = part, images, refusal
        self.buffers = {name: buffer.clone() for name, buffer in part.named_buffers()}
        self.generators = _generators()
        self.whole = self.run(*images)
        if not isinstance(self.whole, Tensor):
            raise refusal(f"is a {type(self.whole).__name__}, not one tensor; wrap the network")
        self.tolerance = math.sqrt(torch.finfo(images[0].dtype).eps) * _largest(self.whole)

    def run(self, *images: Tensor) -> Tensor:
        return self.part(*(each.clone() for each in images))  # some modules work in place

    def same(self, found: Tensor, wanted: Tensor) -> bool:
        return _equal(found, wanted, self.tolerance)

    def again(self) -> None:
        """The same in further passes, many of them if random numbers are drawn."""
        for _ in range(PASSES):
            changed, drawn = not self.same(self.run(*self.images), self.whole), _generators() != self.generators
            if changed and drawn:
                raise self.refusal(
                    "depends on chance in evaluation mode, for two passes over the same images differ; draw nothing "
                    "there, as in functional.dropout(x, training=self.training)"
                )
            if changed:
                raise self.refusal(
                    "differs between two passes over the same images, for a module keeps state from call to call or "
                    "has a random generator of its own; let it depend on its inputs alone"
                )
            if not drawn:
                break
        for name, buffer in self.part.named_buffers():
            if name not in self.buffers or not _equal(buffer, self.buffers[name], 0.0):
                raise self.refusal(
                    f"changes the buffer {_named(name)} in evaluation mode, so that later passes may differ; change "
                    "buffers in training only"
                )

    def in_other_company(self) -> None:
        """The same whatever else is in the batch, and in which order."""
        try:
            alone = self.run(*(each[-1:] for each in self.images))
        except Exception as error:  # whatever a module raises: among others it took this image
            said = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
            raise self.refusal(f"takes {len(self.whole)} images and not one alone ({said}){self.remedy()}") from error
        if alone.shape != self.whole[-1:].shape:
            raise self.refusal(
                f"has shape {tuple(alone.shape)} for one image and {tuple(self.whole.shape)} for {len(self.whole)}; "
                "keep the first axis for images"
            )
        backwards = self.run(*(each.flip(0) for each in self.images)).flip(0)
        if not (self.same(alone, self.whole[-1:]) and self.same(backwards, self.whole)):
            raise self.refusal(
                f"depends for one image on the others in its batch, or on its place there{self.remedy()}"
            )

    def remedy(self) -> str:
        """The end of a sentence: the layers that take statistics of the batch, if there are any."""
        normed: list[str] = []
        handles = [
            module.register_forward_pre_hook(lambda *_, name=name: normed.append(_named(name)))
            for name, module in self.part.named_modules()
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None
        ]
        self.run(*self.images)
        for handle in handles:
            handle.remove()
        if not normed:
            return "; let it depend on that image alone"
        return f", through batch norm without running statistics in {', '.join(normed)}; set track_running_stats=True"


def _named(name: str) -> str:
    """A name in a part as the user's network has it."""
    return repr(name.removeprefix("network."))


def _equal(found: Tensor, wanted: Tensor, tolerance: float) -> bool:
    return found.shape == wanted.shape and torch.allclose(
        found.double(), wanted.double(), rtol=0, atol=tolerance, equal_nan=True
    )


def _largest(tensor: Tensor) -> float:
    """The largest finite size of an entry, 0 without one."""
    return float(tensor.double().abs().nan_to_num(0.0, 0.0).max()) if tensor.numel() else 0.0


def _generators() -> tuple[Hashable, ...]:
    """The states of the global generators of random numbers, somebody else's: they are looked at only."""
    arrays = np.random.get_state(legacy=False)  # noqa: NPY002
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    states = (torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in devices))
    return (
        *(state.numpy().tobytes() for state in states),
        random.getstate(),
        *map(repr, arrays.values()),
        bytes(arrays["state"]["key"]),
    )
