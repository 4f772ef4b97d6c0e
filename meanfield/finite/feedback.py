"""Training by errors that go backward through other weights than those of the forward pass.

Lillicrap, Cownden, Tweed & Akerman 2016 (fixed random ones: feedback alignment).  A step has the form of a gradient
step, with the matrices that carry errors down replaced; what a layer makes of its own error is as in backpropagation.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from meanfield.signatures import checked
from meanfield.starts import normal
from meanfield.validation import Misuse, shaped


class _Feedback(nn.Module):
    """A layer whose forward pass is its own, and whose inputs get their errors through `feedback`, a buffer."""

    feedback: Tensor
    weight: Tensor

    def forward(self, input: Tensor) -> Tensor:
        own = super().forward(input.detach())
        if not (torch.is_grad_enabled() and input.requires_grad):
            return own
        back = self._linear(input)
        return own + (back - back.detach())  # adds zeros, and the gradient of the feedback

    def _linear(self, signal: Tensor) -> Tensor:
        raise NotImplementedError


class FeedbackLinear(_Feedback, nn.Linear):
    def _linear(self, signal: Tensor) -> Tensor:
        return nn.functional.linear(signal, self.feedback)


class FeedbackConv2d(_Feedback, nn.Conv2d):
    def _linear(self, signal: Tensor) -> Tensor:
        return self._conv_forward(signal, self.feedback, None)


KINDS: dict[type[nn.Module], type[_Feedback]] = {nn.Linear: FeedbackLinear, nn.Conv2d: FeedbackConv2d}


@checked
def feedback_aligned(network: nn.Module, generator: torch.Generator) -> nn.Module:
    """A copy of a network whose errors go backward through fixed random weights, for `fit` to train.

    In every nn.Linear and nn.Conv2d they are Gaussian, of the root mean square of the layer's own weights, and
    independent of them.  Forward the copy is the network; names of parameters stay, the random weights are buffers.
    """
    weights = _weights(network)
    drawn = {name: normal(each.shape, generator, each) * each.detach().square().mean().sqrt() for name, each in weights}
    return fed_back(network, drawn)


@checked
def fed_back(network: nn.Module, feedback: Mapping[str, Tensor]) -> nn.Module:
    """A copy of a network whose errors go backward through given weights: name of the layer -> as its own weight."""
    found, known = copy.deepcopy(network), dict(_weights(network))
    for name in feedback.keys() - known.keys():
        raise Misuse("feedback", name, f"is no nn.Linear and no nn.Conv2d of the network, which are {', '.join(known)}")
    for name in known:
        if name not in feedback:
            raise Misuse("feedback", sorted(feedback), f"has no weights for the layer {name}")
        layer = found.get_submodule(name)
        given = shaped(feedback[name], tuple(layer.get_parameter("weight").shape), f"feedback[{name!r}]")
        layer.register_buffer("feedback", given.detach().clone())
        layer.__class__ = KINDS[type(layer)]  # the same parameters, hooks and settings
    return found


def _weights(network: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Of the layers through which errors pass, by name; Misuse without any."""
    found = [
        (name, module.get_parameter("weight")) for name, module in network.named_modules() if type(module) in KINDS
    ]
    if not found:
        remedy = "has no nn.Linear or nn.Conv2d whose errors could be sent elsewhere; finite.sequential makes them"
        raise Misuse("network", type(network).__name__, remedy)
    return found
