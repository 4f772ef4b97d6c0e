"""The smooth losses: squared, logistic, softmax."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from meanfield.losses.base import LabelLoss, Loss, check_count
from meanfield.validation import Misuse

NEWTON_STEPS = 60
LEAST_SHARE = 1e-3  # of a probability whose logarithm a start takes
# at weights down to 1e-6 and centers up to 1e4 softmax needs 16, the logistic loss as many
DEVICE_STEPS = 20  # on a GPU their number is fixed: to look whether all have settled would wait for it


def _steps(like: Tensor) -> int:
    return DEVICE_STEPS if like.is_cuda else NEWTON_STEPS


class SquaredLoss(Loss):
    """loss(F, y) = 1/2 |F - y|^2, real targets; F = y is best.

    More than two classes have the targets 1 and 0, so that the best F(x) is the vector of their probabilities.
    """

    name = "squared"
    supercoercive = True

    def value(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return 0.5 * (outputs - targets).square().sum(1)

    def gradient(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return outputs - targets

    def conjugate(self, dual: Tensor, targets: Tensor) -> Tensor:
        """1/2 |s|^2 + <s, y>."""
        return (0.5 * dual.square() + dual * targets).sum(1)

    def feasible(self, dual: Tensor, targets: Tensor) -> Tensor:
        return dual

    def unit(self, targets: Tensor) -> float:
        return float(targets.abs().max()) or 1.0

    def prox(self, center: Tensor, targets: Tensor, weight: float) -> Tensor:
        return (targets + weight * center) / (1 + weight)

    def cvxpy_sum(self, cp: Any, outputs: Any, targets: np.ndarray) -> Any:
        return 0.5 * cp.sum_squares(outputs - targets)


class LogisticLoss(LabelLoss):
    """loss(F, y) = sum_k log(1 + exp(-y_k F_k)), labels y in {-1, +1}.

    More than two classes: one against the rest, +1 for the own class and -1 for the others.
    """

    name = "logistic"

    def value(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return torch.nn.functional.softplus(-targets * outputs).sum(1)

    def gradient(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return -targets * torch.sigmoid(-targets * outputs)

    def conjugate(self, dual: Tensor, targets: Tensor) -> Tensor:
        """Binary negative entropy of v = -y s, +inf outside 0 <= v <= 1."""
        v = -targets * dual
        entropy = torch.xlogy(v, v) + torch.special.xlog1py(1 - v, -v)  # 1 - v alone would lose a v of 1e-20
        return torch.where((v >= 0) & (v <= 1), entropy, torch.inf).sum(1)

    def feasible(self, dual: Tensor, targets: Tensor) -> Tensor:
        return -targets * (-targets * dual).clamp(0, 1)

    def prox(self, center: Tensor, targets: Tensor, weight: float) -> Tensor:
        """Root m of weight (m - mc) = sigmoid(-m) for the margin m = y F, by Newton kept inside a bracket."""
        margin_center = targets * center
        low, high = margin_center, margin_center + 1 / weight
        # the residual is convex below 0 and concave above: from this side of the root the steps go straight to it
        margin = torch.where(weight * low + 0.5 <= 0, high.clamp_max(0), low.clamp_min(0))
        for _ in range(_steps(center)):
            sigmoid = torch.sigmoid(-margin)
            residual = weight * (margin - margin_center) - sigmoid
            low, high = torch.where(residual < 0, margin, low), torch.where(residual > 0, margin, high)
            step = margin - residual / (weight + sigmoid * (1 - sigmoid))
            new = torch.where((step >= low) & (step <= high), step, 0.5 * (low + high))
            settled = (new - margin).abs() <= 4 * torch.finfo(margin.dtype).eps * (1 + margin.abs())
            margin = new
            if not margin.is_cuda and bool(settled.all()):
                break
        return targets * margin

    def cvxpy_sum(self, cp: Any, outputs: Any, targets: np.ndarray) -> Any:
        return cp.sum(cp.logistic(-cp.multiply(targets, outputs)))


class SoftmaxLoss(Loss):
    """loss(F, y) = log sum_k exp F_k - F_y, integer classes y in 0..K-1, (N,) int64: one output each, two included."""

    name = "softmax"

    def outputs_for(self, classes: int) -> int:
        return classes

    def encode(self, indices: Tensor, classes: int) -> Tensor:
        return indices

    def decode(self, targets: Tensor) -> Tensor:
        return targets

    def check_targets(self, targets: Tensor, count: int, outputs: int, like: Tensor) -> Tensor:
        check_count(targets, count)
        if outputs < 2:
            raise Misuse("outputs", outputs, "is too few: the softmax loss needs one output per class, at least 2")
        if (
            targets.ndim != 1
            or targets.is_complex()
            or bool((targets != targets.floor()).any() if targets.is_floating_point() else False)
        ):
            raise ValueError(
                f"targets of shape {tuple(targets.shape)} and dtype {targets.dtype}: the softmax loss expects "
                f"({count},) integer classes"
            )
        classes = targets.to(dtype=torch.int64, device=like.device)
        if int(classes.min()) < 0 or int(classes.max()) >= outputs:
            raise ValueError(
                f"targets lie in {int(classes.min())}..{int(classes.max())}; with outputs={outputs} the classes are "
                f"0..{outputs - 1}"
            )
        if count > 1 and bool((classes == classes[0]).all()):
            raise ValueError(f"targets hold one class only ({int(classes[0])}); at least two are needed")
        return classes

    def value(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(outputs, targets, reduction="none")

    def gradient(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return self._balanced(outputs.softmax(1), targets)

    def conjugate(self, dual: Tensor, targets: Tensor) -> Tensor:
        """Negative entropy of v = s + e_y, +inf outside the simplex.

        v_y = 1 - t for the sum t of the other entries, which -s_y has to equal up to rounding OF ITSELF: a sum of 1e-16
        beside a t of 1e-20 is no rounding, and large outputs of a lightly penalised network would live on it.
        """
        others = self._others(dual, targets)
        total = others.sum(1)
        slack = 16 * dual.shape[1] * torch.finfo(dual.dtype).eps
        inside = (others >= 0).all(1) & (total <= 1 + slack) & (dual.sum(1).abs() <= slack * total)
        own = total.clamp(0, 1)
        entropy = torch.xlogy(others, others).sum(1) + torch.special.xlog1py(1 - own, -own)
        return torch.where(inside, entropy, torch.inf)

    def feasible(self, dual: Tensor, targets: Tensor) -> Tensor:
        others = self._others(dual, targets).clamp_min(0)
        own = (1 + dual.gather(1, targets[:, None])).clamp_min(0)
        total = own + others.sum(1, keepdim=True)
        return self._balanced(torch.where(total > 0, others / total, 0.0), targets)

    def prox(self, center: Tensor, targets: Tensor, weight: float) -> Tensor:
        """Newton's method; the Hessian diag(v + weight) - v v^T is inverted by Sherman-Morrison."""
        outputs = self._near(center, targets, weight)
        merit = self._merit(outputs, center, targets, weight)
        for _ in range(_steps(center)):
            v = outputs.softmax(1)
            gradient = v - self._one_hot(targets, center) + weight * (outputs - center)
            inverse = 1 / (v + weight)
            along = (inverse * v * gradient).sum(1, keepdim=True) / (1 - (inverse * v * v).sum(1, keepdim=True))
            step = inverse * (gradient + v * along)
            # rounding of the gradient over the least curvature
            settled = step.abs() <= 8 * torch.finfo(v.dtype).eps * (1 + outputs.abs() + 1 / weight)
            if not step.is_cuda and bool(settled.all()):
                break
            outputs, merit = self._advance(outputs, step, merit, center, targets, weight)
        return outputs

    def cvxpy_sum(self, cp: Any, outputs: Any, targets: np.ndarray) -> Any:
        chosen = np.eye(outputs.shape[1])[targets]
        return cp.sum(cp.log_sum_exp(outputs, axis=1)) - cp.sum(cp.multiply(chosen, outputs))

    def _near(self, center: Tensor, targets: Tensor, weight: float) -> Tensor:
        """A start near F = c + (e_y - v) / w, v = softmax(F), from which a few steps are enough at any center.

        A weak pull leaves F nearly equal where v > 0: v is then the point of the simplex nearest to w c + e_y.
        """
        if weight >= 1:
            return center
        own = self._one_hot(targets, center)
        v = _nearest_in_simplex(weight * center + own)
        return center + (own - v) / weight + torch.where(v > 0, v.clamp_min(LEAST_SHARE).log(), 0.0)

    def _merit(self, outputs: Tensor, center: Tensor, targets: Tensor, weight: float) -> Tensor:
        return self.value(outputs, targets) + 0.5 * weight * (outputs - center).square().sum(1)

    def _advance(
        self, outputs: Tensor, step: Tensor, merit: Tensor, center: Tensor, targets: Tensor, weight: float
    ) -> tuple[Tensor, Tensor]:
        """The full Newton step of each image if its merit does not rise beyond rounding, else log(1 + d) / d of it.

        d is the step's span: along it the Hessian changes by at most exp(d), so that the shorter step always descends
        (generalised self-concordance; Sun & Tran-Dinh 2019, theorem 2).
        """
        whole = outputs - step
        new = self._merit(whole, center, targets, weight)
        descends = new <= merit + 8 * torch.finfo(merit.dtype).eps * (1 + merit.abs())
        span = (step.amax(1, keepdim=True) - step.amin(1, keepdim=True)).clamp_min(torch.finfo(merit.dtype).tiny)
        shorter = outputs - torch.log1p(span) / span * step
        return torch.where(descends[:, None], whole, shorter), torch.where(
            descends, new, self._merit(shorter, center, targets, weight)
        )

    def _others(self, rows: Tensor, targets: Tensor) -> Tensor:
        """Rows (N, K) with 0 at the own class."""
        return rows.scatter(1, targets[:, None], 0.0)

    def _balanced(self, rows: Tensor, targets: Tensor) -> Tensor:
        """Rows with minus the sum of the others at the own class: v_y - 1 would lose what is below rounding of 1."""
        others = self._others(rows, targets)
        return others.scatter(1, targets[:, None], -others.sum(1, keepdim=True))

    def _one_hot(self, targets: Tensor, like: Tensor) -> Tensor:
        return torch.nn.functional.one_hot(targets, like.shape[1]).to(like.dtype)


def _nearest_in_simplex(rows: Tensor) -> Tensor:
    """Rows (N, K) moved to the nearest v >= 0 with sum v = 1 (Held, Wolfe & Crowder 1974)."""
    falling = rows.sort(1, descending=True).values
    sums = falling.cumsum(1) - 1
    counts = torch.arange(1, rows.shape[1] + 1, dtype=rows.dtype, device=rows.device)
    kept = (falling * counts > sums).sum(1, keepdim=True).clamp_min(1)  # rounding may leave none
    return (rows - sums.gather(1, kept - 1) / kept).clamp_min(0)
