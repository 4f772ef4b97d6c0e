"""Proven lower bounds of J over all measures: one ReLU layer (`one_layer`), or two layers of tanh, erf or hard tanh
(`two_layers`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor

from meanfield import limits, validation
from meanfield.certificates import one_layer, two_layers, vectors
from meanfield.certificates.cuts import Features
from meanfield.certificates.duality import feasible
from meanfield.certificates.one_layer import OneLayerProof
from meanfield.certificates.proof import ProvenBound
from meanfield.certificates.two_layers import TwoLayerProof
from meanfield.network import ParticleNetwork
from meanfield.problem import Problem
from meanfield.signatures import Nonnegative, Seconds, checked
from meanfield.storage import states, tensors
from meanfield.validation import path


def no_method(problem: Problem) -> str:
    """Why `prove` has no method for a problem; empty where it has one."""
    if problem.penalty.uncertified is not None:
        return "the penalty has a term that nothing is proven of"
    if problem.ranks.count > 1:
        return "the images are shared among processes"
    return (one_layer if problem.architecture.depth == 1 else two_layers).unfit(problem)


@checked
@torch.inference_mode(False)
def prove(
    problem: Problem,
    output: Tensor,
    network: ParticleNetwork,
    seconds: Nonnegative,
    callback: Callable[[dict[str, Any]], None] | None = None,
    *,
    before: ProvenBound | None = None,
    state: Annotated[str | Path, path] | None = None,
    state_seconds: Seconds = states.STATE_SECONDS,
) -> ProvenBound:
    """The best lower bound of J over all measures that `seconds` prove, from the multipliers r = `output` (N, K) on.

    network: its features are the first of the small program, its J that of the share.  The first bound is at r; then
    features that r undercharges, the next r, its bound, in turn, each bound with twice the time that has gone, or with
    all that is left where that is less than twice as much again.  Where the time that is left would not close a tree,
    the next r follows from its own cells (`relaxing`; one output).  It ends early where the bound reaches the program's
    value.  Ctrl-C and a limit of time (`limits.within`) end it with what is proven by then.  before: an earlier answer,
    to go on from; its seconds count.
    state: file (.safetensors) to which what is proven and the tree of the branch and bound are written every
    `state_seconds` seconds, less often where writing would take more than SAVING of the time, and at the end.  A call
    with the same problem, multipliers and network goes on from there, whatever `before`, as if it had not ended: with
    the same tree, and with as many more seconds as `seconds` is larger.  Of two layers r is kept, but no tree.  The
    file stays, for the caller to remove; one that is damaged or of another proof is refused (ValueError).
    callback: hears {"phase": "proof", "seconds", "bound", "share"} after every bound.
    """
    problem.require_whole("prove")
    shape = len(problem.inputs), problem.architecture.outputs
    output = validation.finite(validation.shaped(output, shape, "output"), "output").detach()
    reason = no_method(problem)
    if reason:
        return ProvenBound(-math.inf, reason=reason)
    settings = {"work": "proof", "multipliers": tensors.digest([output])[: states.DIGITS]}
    file = states.of_run(state, settings, problem, network)
    kept = None if file is None else file.load(problem.inputs.device)
    before = before if kept is None else ProvenBound.restored(kept["best"])
    problem, network = problem.to(dtype=torch.float64), network.to(dtype=torch.float64)
    output = feasible(problem, output.to(problem.inputs))
    make = OneLayerProof if problem.architecture.depth == 1 else TwoLayerProof
    proof = make(problem, network, seconds, callback, file, state_seconds, before)
    if kept is not None:
        proof.restore(kept)
    try:
        proof.run(output)
    except (KeyboardInterrupt, limits.TimeUp):
        if not proof.best.curve:
            raise
    proof.save()
    return proof.answer()


def at_multipliers(
    problem: Problem, output: Tensor, network: ParticleNetwork | None, seconds: float
) -> dict[str, float | str | None]:
    """The proven bound at r = `output`, scaled: what `search_features` reports of it; {} where no method applies, or
    no time was given to one that needs it.
    """
    if problem.architecture.depth > 1 or no_method(problem):
        return {}
    if seconds <= 0 and one_layer.entries(problem.architecture) > one_layer.EXACT_ENTRIES:
        return {}
    features = Features.of(problem)
    start = None if network is None else vectors.kernels(network)
    found = one_layer.bound(problem, features, output, start, max(seconds, one_layer.LEAST_SECONDS))
    return {"rigorous_bound": found.value, "rigorous_kind": found.kind}
