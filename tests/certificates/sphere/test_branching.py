"""The search: bounds that no direction exceeds in either precision, and a tree that survives a stop."""

import math
from itertools import product

import pytest
import torch
from responses import best_seen, cancelling, crossing_planes, lengths, unit
from strategies import normal, seeded

from meanfield.certificates.sphere import Search, arrangement, branching, cones, maximise
from meanfield.certificates.sphere.branching import Bounds, bounded_cones
from meanfield.certificates.sphere.cones import Cones
from meanfield.certificates.sphere.pairs import Pairs
from meanfield.certificates.sphere.response import reduced
from meanfield.storage.states import StateFile
from meanfield.validation import Misuse

KINDS = ["general", "integer", "nearly integer", "nearly equal", "bytes", "of many lengths"]
PRECISIONS = [torch.float64, torch.float32]


def problem(seed):
    """A, W of 2 to 9 dimensions, one output or two, sizes of 1e-6 to 1e6, in part with rows that are nearly equal."""
    random = seeded(seed)
    draw = lambda high: int(torch.randint(high, (), generator=random))  # noqa: E731
    dimension, kind, weights = 2 + draw(8), KINDS[draw(6)], ["random", "one size", "opposite", "residual"][draw(4)]
    rows = crossing_planes(kind, dimension, seed) if dimension < 4 else normal((5 + draw(40), dimension), seed)
    A, W = cancelling(rows, weights, seed)
    if draw(2):
        near = A + 10.0 ** -draw(16) * normal(A.shape, seed + 1)
        A, W = torch.cat([A, near, -2 * A[:3]]), torch.cat([W, (1 - 2 * draw(2)) * W, W[:3]])
    if not draw(3):
        W = torch.cat([W, normal(W.shape, seed + 2)], 1)
    return 10.0 ** (draw(13) - 6) * A, 10.0 ** (draw(13) - 6) * W


def climbed(A, W, count, seed):
    """The largest response that so many starts reach by going to where the gradient points."""
    points = unit(normal((count, A.shape[1]), seed))
    best = 0.0
    for _ in range(12):
        values = points @ A.T
        responses = values.relu() @ W
        best = max(best, float(responses.norm(dim=1).max()))
        points = unit(((values > 0) * (unit(responses) @ W.T)) @ A)
    return best


def excess(seed, count, seconds, monkeypatch):
    """How far an attained value is above the bound of a search that was stopped early, over the bound."""
    A, W = problem(seed)
    reached = climbed(A, W, count, seed)
    if W.shape[1] == 1 and A.shape[1] < 4:
        reached = max(reached, maximise(A, W).lower)
    with monkeypatch.context() as patch:
        patch.setattr(arrangement, "MAX_PLANES", {})
        upper = maximise(A, W, max_seconds=seconds).upper
    return (reached - upper) / max(upper, 1e-300)


@pytest.mark.slow
def test_no_attained_value_lies_above_a_bound(monkeypatch):
    assert max(excess(seed, 500, 1e-6, monkeypatch) for seed in range(40)) <= 0


def cells_of(A, W, halvings, gap=0.0):
    response = reduced(A, W)
    return response, bounded_cones(response, halvings, gap)


def inside(cells, count, seed):
    """Directions in every cone: at random, at corners, at its middle, (b, k, r)."""
    dimension = cells.middles.shape[1]
    drawn = 2 * torch.rand(len(cells), count, dimension, generator=seeded(seed), dtype=torch.float64) - 1
    corners = torch.tensor(list(product((-1.0, 1.0), repeat=dimension)), dtype=torch.float64)
    at = torch.cat([drawn, corners.expand(len(cells), -1, -1), torch.zeros_like(drawn[:, :1])], 1)
    return unit(cells.middles[:, None] + cells.halves[:, None] * at)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("near", [1e-9, 0.02, 0.5, 10.0])
def test_no_direction_lies_above_the_bound_of_its_cone(precision, near):
    for seed in range(4):
        A, w = normal((150, 3 + seed % 2), seed), normal((150, 1), seed + 1)
        A, W = torch.cat([A, A + near * normal(A.shape, seed + 2)]), torch.cat([w, -w])
        response, cells = cells_of(A, W, 4, math.inf if precision == torch.float32 else 0.0)
        points = inside(cells, 30, seed)
        values = response(points.flatten(0, 1)).unflatten(0, points.shape[:2])[..., 0] * cells.signs[:, None]
        assert float((values.amax(1) - cells.uppers).max()) <= response.rounding


@pytest.mark.parametrize("outputs", [2, 3])
def test_no_direction_lies_above_the_bound_of_its_cone_with_several_outputs(outputs):
    """Few rows and large cones: outputs are long in other directions than at the middle, and chords are met."""
    for seed in range(20):
        response, cells = cells_of(normal((4, 3), seed), normal((4, outputs), seed + 100), seed % 3)
        points = inside(cells, 100, seed)
        values = response(points.flatten(0, 1)).norm(dim=1).unflatten(0, points.shape[:2])
        assert float((values.amax(1) - cells.uppers).max()) <= response.rounding


def twin(pairs, middle, half, sign, allowed):
    """Slope, offset and slack above sign q on one box, pair by pair, as the page of `pairs` says."""
    size = middle.norm()
    slope, offset, count, moment = sign * pairs.linear.clone(), 0.0, 0.0, 0.0
    for left, right, flow in zip(pairs.left, pairs.right, pairs.flows):
        a, b = (left, right) if sign > 0 else (right, left)
        apart = left - right
        x, y, reach = float(a @ middle), float(b @ middle), float(half @ a.abs())
        slope += 0.5 * flow * (a - b)
        if reach - abs(y) > 0.3 * float(size * apart.norm()):
            count, moment = count + flow * apart.norm(), moment + flow * torch.outer(apart, apart) / apart.norm()
        elif abs(x) >= reach:
            slope += 0.5 * flow * (math.copysign(1, x) * a - math.copysign(1, y) * b)
        else:
            low, high = x - reach, x + reach
            chord = (abs(high) - abs(low)) / (high - low)
            slope += 0.5 * flow * (chord * a - math.copysign(1, y) * b)
            offset += 0.5 * flow * (abs(low) - chord * low)
    largest = torch.linalg.eigvalsh(moment)[-1] if count else 0.0
    exact = 0.5 * float(count * largest) ** 0.5
    together = 0.5 * float(count * (1 + allowed) * (largest + allowed * count)) ** 0.5
    rounded = 0.5 * float(pairs.flows.sum()) * allowed * float(size + 2 * half.norm() + 1)
    return slope, offset, exact, together + rounded


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("near", [0.05, 0.5])
def test_sums_over_pairs_are_what_a_loop_gives(precision, sign, near):
    A, w = normal((290, 4), 1), normal((290, 1), 2)
    response = reduced(torch.cat([A, A + near * normal(A.shape, 3)]), torch.cat([w, -0.9 * w]))
    pairs = Pairs.of(response)
    assert len(pairs.flows) > 2 * 256
    cells = bounded_cones(response, 6)
    cells = cells[(cells.signs == sign).nonzero()[::331, 0]]
    above = pairs.above(cells, sign, precision)
    eps, total = torch.finfo(precision).eps, float(pairs.flows.sum())
    allowed = (256 + 2 * 4 + 9) * eps
    for index in range(len(cells)):
        slope, offset, exact, slack = twin(pairs, cells.middles[index], cells.halves[index], sign, allowed)
        torch.testing.assert_close(above.linear[index], slope, rtol=0, atol=20 * eps * total)
        assert float(above.offset[index]) == pytest.approx(float(offset), abs=20 * eps * total)
        assert float(above.slack[index]) == pytest.approx(slack, rel=12 * eps, abs=0)
        assert float(above.slack[index]) > exact + 10 * eps * total


def test_the_bound_of_a_cone_needs_no_accuracy_of_the_root(monkeypatch):
    cells = cells_of(normal((10, 4), 1), normal((10, 1), 2), 3)[1]
    linear, root = normal((len(cells), 4), 3), cones._slice_root
    best = (inside(cells, 100, 4) * linear[:, None]).sum(2).amax(1)
    uppers, tops = cones.cone_maxima(linear, cells)
    assert float((uppers - (linear * tops).sum(1))[best > 0].max()) < 1e-12
    for factor in (0.0, 0.5, 0.99, 1.0, 1.01, 2.0):
        monkeypatch.setattr(cones, "_slice_root", lambda *given, factor=factor: factor * root(*given))
        assert float((best - cones.cone_maxima(linear, cells)[0]).max()) < 1e-12


def test_what_pairs_say_is_the_response():
    response = reduced(*problem(0)) if problem(0)[1].shape[1] == 1 else reduced(normal((30, 4), 1), normal((30, 1), 2))
    pairs, points = Pairs.of(response), unit(normal((50, response.rows.shape[1]), 3))
    value = points @ pairs.linear
    value += ((points @ pairs.left.T).relu() - (points @ pairs.right.T).relu()) @ pairs.flows
    torch.testing.assert_close(value, response(points)[:, 0], rtol=1e-12, atol=1e-12)


def test_rounding_of_single_precision_enters_where_all_rows_keep_their_sign():
    """The bound of such a cell is exact: half of all would lie below the response without what is allowed for."""
    A, w = normal((500, 4), 5), normal((500, 1), 6)
    A = A * A[:, :1].sign() * torch.tensor([1.0, 1e-3, 1e-3, 1e-3])
    response = reduced(A, w)
    tight = bounded_cones(response, 0).halved()
    tight = Cones(tight.middles, tight.halves * 1e-12, *tight.tensors()[2:]).unbounded()
    with branching._pool() as pool:
        single, double = (Bounds(response)(tight, gap, pool)[0].uppers for gap in (math.inf, 0.0))
    values = response(unit(tight.middles))[:, 0] * tight.signs
    assert bool((single >= values).all())
    assert bool((double >= values - response.rounding).all())
    up = values > 0  # no bound is below 0
    assert float((double - values)[up].max()) < 1e-9 * float(w.abs().sum())
    assert float((single - values)[up].min()) > 0


def test_single_precision_only_where_products_have_it(monkeypatch):
    pairs = Pairs.of(reduced(normal((50, 4), 1), normal((50, 1), 2)))
    assert pairs.precision(math.inf) == torch.float32
    coarse = float(pairs.flows.sum()) * (256 + 2 * 4 + 9) * torch.finfo(torch.float32).eps / 0.02
    assert pairs.precision(1.01 * coarse) == torch.float32
    assert pairs.precision(0.99 * coarse) == torch.float64
    with torch.autocast("cpu"):
        assert pairs.precision(math.inf) == torch.float64
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    assert pairs.precision(math.inf) == torch.float64


# --- a search that goes on --------------------------------------------------------------------------------------------

A, W = normal((60, 6), 7), normal((60, 1), 8)


def test_a_search_goes_on_and_its_curve_falls():
    search = Search(A, W)
    found = [search.maximum, search.refine(60, tolerance=0.5), search.refine(60, tolerance=0.4)]
    assert found[0].upper > found[1].upper > found[2].upper
    assert found[0].cells < found[1].cells < found[2].cells
    seconds, uppers = zip(*search.curve)
    assert list(seconds) == sorted(seconds)
    assert list(uppers) == sorted(uppers, reverse=True)
    assert uppers[-1] == pytest.approx(found[2].upper, rel=1e-12)
    assert found[2].upper >= best_seen(A, W)


@pytest.mark.parametrize("outputs", [1, 2])
def test_a_search_survives_in_a_file_to_the_last_bit(tmp_path, outputs):
    """The one that goes on from the file looks at the same cells as the one that was never stopped."""
    weights, file = normal((60, outputs), 8), StateFile(tmp_path / "search.safetensors", {"run": 1})
    search = Search(A, weights)
    kept = search.refine(60, tolerance=0.5)
    file.save(search.state())
    again = Search.restored(A, weights, file.load())
    same = again.maximum
    assert (same.lower, same.upper, same.cells, same.seconds) == (kept.lower, kept.upper, kept.cells, kept.seconds)
    assert again.curve == search.curve
    assert torch.equal(same.argmax, kept.argmax)
    whole, resumed = (each.refine(60, tolerance=0.4) for each in (search, again))
    assert (whole.lower, whole.upper, whole.cells) == (resumed.lower, resumed.upper, resumed.cells)
    assert torch.equal(search._branching.leaves.table(), again._branching.leaves.table())
    assert best_seen(A, weights) <= resumed.upper < kept.upper


def test_a_state_of_another_problem_is_refused():
    state = Search(A, W).state()
    other = A.clone()
    other[3, 2] *= 1 + 1e-15
    for given, what in (
        ((A[:, :5], W), r"is of another A, of shape \(60, 6\); here it is \(60, 5\)"),
        ((other, W), "is of another A, with other entries"),
        ((A, -W), "is of another W, with other entries"),
        ((A, torch.cat([W, W], 1)), r"is of another W, of shape \(60, 1\); here it is \(60, 2\)"),
    ):
        with pytest.raises(Misuse, match=what):
            Search.restored(*given, state)
    del state["of"], state["uppers"]  # as states of older versions
    with pytest.raises(Misuse, match="is not that of a search: it lacks of, uppers"):
        Search.restored(A, W, state)


def test_a_stop_in_a_step_leaves_a_search_that_goes_on(monkeypatch):
    threads, search = torch.get_num_threads(), Search(A, W)
    before = search.refine(60, tolerance=0.5)
    kept, calls = branching.improve, []

    def stopped(*given):
        calls.append(given)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return kept(*given)

    with monkeypatch.context() as patch:
        patch.setattr(branching, "improve", stopped)
        with pytest.raises(KeyboardInterrupt):
            search.refine(60)
    assert torch.get_num_threads() == threads
    assert best_seen(A, W) <= search.maximum.upper <= before.upper
    assert search.refine(60, tolerance=0.4).upper < before.upper


def covered(cells, points):
    """How many cells of either sign hold each direction."""
    scaled = points[:, None] / (points[:, None] * cells.middles.sign()).gather(
        2, cells.facets[None, :, None].expand(len(points), -1, 1)
    ).clamp_min(1e-300)
    return ((scaled - cells.middles).abs() <= cells.halves + 1e-12).all(2).sum(1)


def test_leaves_hold_every_direction():
    search = Search(A[:, :4], W)
    search.refine(60, tolerance=0.1)
    leaves = search._branching.leaves
    assert leaves is not None
    assert bool((covered(leaves, unit(normal((200, 4), 9))) == 2).all())


def test_other_weights_begin_with_the_leaves():
    search = Search(A, W)
    search.refine(60, tolerance=0.4)
    near, far = W + 0.01 * normal(W.shape, 9), normal(W.shape, 10)
    moved, leaves = search.moved(A, near), search._branching.leaves
    assert leaves is not None
    assert moved.maximum.cells == len(leaves)
    assert moved.maximum.upper < 0.95 * Search(A, near).maximum.upper
    for weights in (near, far, -W):
        assert search.moved(A, weights).maximum.upper >= best_seen(A, weights)
    flat = A * torch.tensor([1.0, 1, 1, 1, 1, 0])
    assert Search(flat, W).moved(A, W).maximum.upper >= best_seen(A, W)  # in another row space anew
    both = torch.cat([W, far], 1)
    assert search.moved(A, both).maximum.upper >= best_seen(A, both)
    back = Search(A, both).moved(A, W)  # cells of several outputs have no signs
    assert set(back._branching.leaves.signs.tolist()) == {1.0, -1.0}
    assert Search.restored(A, near, moved.state()).maximum.upper == moved.maximum.upper


def test_without_room_what_cannot_matter_is_dropped(monkeypatch):
    monkeypatch.setattr(branching, "room", lambda _: 200)
    search = Search(A[:, :3], W)
    found = search.refine(60)
    assert found.upper == pytest.approx(found.lower, rel=1e-6)
    assert found.cells > 400
    assert search._branching.leaves is None
    assert search.moved(A[:, :3], -W).maximum.upper >= found.lower
    assert best_seen(A[:, :3], W) <= found.upper
    search = Search(A[:, :5], W)
    coarse, dropped = search.refine(60, tolerance=0.1), search._branching._dropped
    assert dropped > 1.05 * coarse.lower
    assert search.refine(60).upper >= dropped  # whatever is dropped after it


def test_a_search_begun_in_inference_mode_goes_on_outside():
    with torch.inference_mode():
        search = Search(A, W)
        before = search.refine(60, tolerance=0.5)
    start = normal((2, 6), 1).requires_grad_()
    for other in (search, search.moved(A, W, start=start)):
        found = other.refine(60, tolerance=0.4)
        assert best_seen(A, W) <= found.upper < before.upper
        assert not found.argmax.requires_grad


def test_other_patches_have_as_many_entries():
    with pytest.raises(ValueError, match=r"A has shape \(60, 5\); expected \(60, 6\)"):
        Search(A, W).moved(A[:, :5], W)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_search_in_a_line_or_a_point(rank):
    rows = normal((5, 1), 1) @ normal((1, 3), 2) * rank
    found = Search(rows, W[:5]).refine(60)
    assert found.upper == pytest.approx(best_seen(rows, W[:5]), rel=1e-3, abs=1e-12)
    assert float(lengths(rows, W[:5], found.argmax[None])) == pytest.approx(found.lower)


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_change_no_bound(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        cells = bounded_cones(reduced(A, W), 6)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    torch.set_num_threads(1)
    torch.testing.assert_close(cells.uppers, bounded_cones(reduced(A, W), 6).uppers, rtol=1e-12, atol=0)
    torch.set_num_threads(before)
