"""Maxima of ReLU responses over the unit sphere of kernels: exact for up to three entries, bounded for more.

For patches a_i (rows of A) and weights w_i (rows of W) the response of a kernel z is q(z) = sum_i w_i relu(a_i z); its
largest length over |z| = 1 says whether any ReLU feature, tried or not, could improve a network.  q is positively
homogeneous and piecewise linear, a difference of convex functions.  Both methods return an upper bound that no kernel
exceeds, rounding included, and a kernel that attains the lower one.

arrangement: the planes a_i z = 0 cut the sphere into cells on which q is linear, so a maximum lies inside a cell, at
its normalised gradient, or on a plane, where the same holds one dimension lower (Edelsbrunner, Algorithms in
Combinatorial Geometry, 1987, ch. 7).
branch and bound: cones over boxes on the facets of the cube cover all directions.  On a cone a row of one sign is
linear, a row of both signs lies under its chord where it counts positively and over any of its supporting planes where
it counts negatively (McCormick, Math. Program. 10, 1976); the linear function that results is maximised exactly over
the unit vectors of the cone, by projection on it.  Where positive and negative rows nearly cancel, as for the residuals
of a trained network, they are bounded in pairs by how far apart they are (`pairs`).  A `Search` goes on where it
stopped, is kept in a file and begins with other weights where it was.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from meanfield.certificates.sphere.arrangement import listable, maximise_arrangement, maximise_line
from meanfield.certificates.sphere.branching import Branching, maximise_branching
from meanfield.certificates.sphere.cones import Cones
from meanfield.certificates.sphere.response import Found, Response, reduced
from meanfield.signatures import Nonnegative, Positive, checked
from meanfield.storage.tensors import digest
from meanfield.validation import Misuse, finite, shaped

# Distance of row spaces, which enters the bound, up to which two are one.
SAME_SPACE = 1e-12
STATE = ("of", "basis", "cells", "uppers", "argmax", "figures", "curve")


@dataclass(frozen=True, eq=False)
class SphereMaximum:
    """lower <= max_{|z| = 1} |q(z)| <= upper, attained at the unit vector argmax (d,) from below.

    upper holds with rounding; cells: linear pieces (arrangement) or cones (branch and bound) that were looked at.
    """

    lower: float
    upper: float
    argmax: Tensor
    method: str
    cells: int
    seconds: float


@checked
def maximise(
    A: Tensor, W: Tensor, *, max_seconds: Positive = 10.0, tolerance: Nonnegative = 1e-9, start: Tensor | None = None
) -> SphereMaximum:
    """Bounds of max_{|z| = 1} |W^T relu(A z)| for patches A (n, d) and weights W (n, C), in float64.

    One output and up to three dimensions (of the row space of A) are solved exactly.  Beyond MAX_PLANES, and where
    nearly equal planes leave more open than `tolerance`, it is branch and bound as for anything else: until upper <=
    (1 + tolerance) lower up to rounding or `max_seconds` have passed (looked at between batches; the set-up is not
    interrupted).  The bounds hold at any time.
    start (k, d) or (d,): directions to try first.  The answer is in the units of W times those of A.
    Raises TypeError for what is no tensor, ValueError for shapes that do not fit, entries that are not finite or
    complex, and rows whose squares are not finite.
    """
    began = time.perf_counter()
    A, W, starts = _checked(A, W, start)
    deadline = began + max_seconds
    response = reduced(A.detach().double(), W.detach().double())
    found = _found(response, starts @ response.basis, deadline, tolerance)
    return _maximum(response, found, time.perf_counter() - began)


class Search:
    """Bounds of max_{|z| = 1} |W^T relu(A z)| by branch and bound that go on where they stopped, as `maximise` gives
    them.

    maximum: what is known so far.  curve: pairs (seconds of work, upper) as the upper bound fell.
    """

    @checked
    @torch.inference_mode(False)  # the tree is changed in place, here and where the search goes on
    def __init__(self, A: Tensor, W: Tensor, *, start: Tensor | None = None) -> None:
        """The arguments of `maximise`."""
        A, W, starts = _checked(A, W, start)
        self._given = A.detach().double(), W.detach().double()
        response = reduced(*self._given)
        self._branching = Branching(response, starts @ response.basis)

    @classmethod
    def _of(cls, A: Tensor, W: Tensor, branching: Branching) -> Search:
        search = cls.__new__(cls)
        search._given, search._branching = (A, W), branching
        return search

    @cached_property
    def _names(self) -> dict[str, Any]:
        return _named(*self._given)

    @property
    def maximum(self) -> SphereMaximum:
        return _maximum(self._branching.response, self._branching.found(), self._branching.seconds)

    @property
    def curve(self) -> list[tuple[float, float]]:
        return [(seconds, upper + self._branching.response.rounding) for seconds, upper in self._branching.curve]

    @checked
    @torch.inference_mode(False)
    def refine(self, max_seconds: Positive, *, tolerance: Nonnegative = 1e-9) -> SphereMaximum:
        """Go on until upper <= (1 + tolerance) lower up to rounding or so many seconds have passed.  An interrupt
        leaves a search that goes on.
        """
        self._branching.refine(time.perf_counter() + max_seconds, tolerance)
        return self.maximum

    def sample(self, count: int) -> tuple[Cones, Tensor]:
        """So many cells, those of the largest bounds among them, and the basis (d, r) of their coordinates."""
        return self._branching.sample(count), self._branching.response.basis

    def state(self) -> dict[str, Any]:
        """Tensors and plain values from which `restored` goes on, for a `storage.states.StateFile`."""
        return {"of": self._names, **self._branching.state()}

    @classmethod
    @torch.inference_mode(False)
    def restored(cls, A: Tensor, W: Tensor, state: Mapping[str, Any]) -> Search:
        """The search of `state`, with the same bounds to the last bit, for the same A and W.

        Raises ValueError for others, and for a state that lacks something.  That its cells hold all directions, and
        that their bounds hold, is not looked at, which would take as long as finding them did: the checksum of a
        `StateFile` tells what was damaged, nothing tells what was made up.
        """
        A, W, _ = _checked(A, W, None)
        A, W = A.detach().double(), W.detach().double()
        lacking = [name for name in STATE if name not in state]
        if lacking:
            raise Misuse("state", sorted(state), f"is not that of a search: it lacks {', '.join(lacking)}")
        for name, here in _named(A, W).items():
            there = state["of"][name]
            if there["shape"] != here["shape"]:
                shapes = tuple(there["shape"]), tuple(here["shape"])
                raise Misuse(
                    "state", state["of"], f"is of another {name}, of shape {shapes[0]}; here it is {shapes[1]}"
                )
            if there != here:
                raise Misuse("state", state["of"], f"is of another {name}, with other entries")
        return cls._of(A, W, Branching.restored(reduced(A, W, state["basis"]), state))

    @torch.inference_mode(False)
    def moved(self, A: Tensor, W: Tensor, *, start: Tensor | None = None) -> Search:
        """A search for other weights of the same patches, which begins with this one's cells: bounding them anew takes
        as long as bounding them did.  Where A and W have another row space, or cells were dropped for want of room, it
        begins anew.
        """
        A, W, starts = _checked(A, W, start)
        A, W, basis = A.detach().double(), W.detach().double(), self._branching.response.basis
        shaped(A, (len(A), len(basis)), "A")
        fresh = reduced(A, W).basis
        apart = float((fresh - basis @ (basis.T @ fresh)).norm())
        outputs = self._branching.response.linear.shape[1]
        if self._branching.leaves is None or apart > SAME_SPACE or outputs != W.shape[1] or not fresh.shape[1]:
            return Search(A, W, start=start)
        return Search._of(A, W, Branching(reduced(A, W, basis), starts @ basis, self._branching.leaves))


def _named(A: Tensor, W: Tensor) -> dict[str, Any]:
    """By which a state is told from that of others."""
    return {name: {"shape": list(each.shape), "digest": digest([each])} for name, each in (("A", A), ("W", W))}


def _maximum(response: Response, found: Found, seconds: float) -> SphereMaximum:
    """In the coordinates of the patches, with rounding."""
    space = response.basis
    argmax = space @ found.argmax if space.shape[1] else torch.eye(1, len(space)).to(space)[0]
    upper = max(found.upper, found.lower) + response.rounding
    return SphereMaximum(found.lower, upper, argmax, found.method, found.cells, seconds)


def _found(response: Response, starts: Tensor, deadline: float, tolerance: float) -> Found:
    """By the arrangement where that is listed, by branch and bound where it is not or does not meet the tolerance."""
    dimension = response.linear.shape[0]
    if dimension == 0:
        return Found(0.0, 0.0, response.linear.new_zeros(0), "arrangement", 0)
    if dimension == 1:
        return maximise_line(response)
    if not listable(response):
        return maximise_branching(response, starts, deadline, tolerance)
    listed = maximise_arrangement(response)
    if listed.upper <= (1 + tolerance) * listed.lower + response.rounding:
        return listed
    found = maximise_branching(response, torch.cat([listed.argmax[None], starts]), deadline, tolerance)
    return replace(found, upper=min(found.upper, listed.upper))


def _checked(A: Tensor, W: Tensor, start: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    for tensor, name, shape in ((A, "A", "(n, d)"), (W, "W", "(n, C)")):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor of shape {shape}, not {type(tensor).__name__}")
        if tensor.ndim != 2 or tensor.shape[1] == 0:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; expected {shape} with at least one column")
        finite(tensor, name)
        if not bool(tensor.detach().double().norm(dim=1).isfinite().all()):
            raise ValueError(f"{name} has rows whose squares exceed the largest number; scale it down")
    shaped(W, (A.shape[0], W.shape[1]), "W")
    if start is None:
        return A, W, A.new_zeros(0, A.shape[1], dtype=torch.float64)
    starts = start[None] if isinstance(start, Tensor) and start.ndim == 1 else start
    count = starts.shape[0] if isinstance(starts, Tensor) and starts.ndim == 2 else 1
    return A, W, finite(shaped(starts, (count, A.shape[1]), "start"), "start").detach().to(A.device, torch.float64)
