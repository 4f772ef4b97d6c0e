"""The mixture of two modules: both side by side, their outputs weighted."""

from __future__ import annotations

from torch import Tensor, nn

from meanfield.grafting.graft import frozen


class Mixture(nn.Module):
    """(1 - t) first(x) + t second(x): what the union of both networks computes, their channels side by side with
    block-diagonal kernels between and the last layers weighted by 1 - t and t.

    Any networks whose outputs have one shape; copies in evaluation mode, each with its own running statistics.
    """

    def __init__(self, first: nn.Module, second: nn.Module, t: float) -> None:
        super().__init__()
        self.first, self.second, self.t = frozen(first, "first"), frozen(second, "second"), t
        self.eval()

    def forward(self, inputs: Tensor) -> Tensor:
        return (1 - self.t) * self.first(inputs) + self.t * self.second(inputs)

    def extra_repr(self) -> str:
        return f"t={self.t}"
