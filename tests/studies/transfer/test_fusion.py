"""Networks made one, and reduced: what the rows are of, and figures and sentences from tables with known answers."""

from __future__ import annotations

import pytest
import torch

from meanfield import fusion as library
from meanfield.bench.classifiers import Classifier
from meanfield.bench.sweep import select
from meanfield.pages.plotting import png
from meanfield.studies.transfer import page, pictures, plan, summary
from meanfield.studies.transfer.fusion import error, every, fusion, outputs
from meanfield.studies.transfer.plan import SIZES, Subject, ended
from meanfield.studies.transfer.reduction import reduction

BASE = Classifier(network="cnn", penalty="none", strength=0.0, split=0, samples=120, pool=2)
TINY = ended(BASE.variant(width=3), 2)


def test_the_error_is_in_units_of_the_spread_over_images():
    wanted = torch.tensor([[3.0, 10.0], [5.0, 12.0]])
    assert error(wanted.mean(0).expand(2, 2), wanted) == pytest.approx(1)
    assert error(wanted + 1, wanted) == pytest.approx(1)
    assert error(wanted, wanted) == 0


def test_rows_of_two_parents_are_of_every_way(tmp_path):
    parents = [TINY, TINY.variant(seed=1)]
    cell = {"networks": [each.to_dict() for each in parents], "names": {"pair": 0}, "seed": 0}
    rows = fusion(cell, str(tmp_path))
    assert rows == fusion(cell, str(tmp_path))
    (ensemble,), (union,) = select(rows, way="ensemble"), select(rows, way="union")
    assert ensemble["error"] == 0
    assert 0 < union["difference"] < 1e-5
    assert union["held_out_accuracy"] == ensemble["held_out_accuracy"]
    assert {(row["way"], row["repaired"]) for row in rows if "kept" in row} == {
        (way, repaired) for way in ("weights", "activations", "transport") for repaired in (False, True)
    }
    assert all(row["kept"] < 1e-5 for row in rows if "kept" in row)
    a, b = select(rows, way="parent 1")[0], select(rows, way="parent 2")[0]
    assert a["error"] == pytest.approx(b["error"], rel=1e-3)  # both are as far from their mean
    assert select(rows, way="reduced union")[0]["error"] < select(rows, way="random channels")[0]["error"]


def test_a_matching_and_then_an_average_is_the_fusion_of_that_name():
    images = TINY.images().inputs
    parents = [TINY.variant(seed=seed).start().eval() for seed in range(3)]
    for made in every(parents, images, 0):
        if made.way in library.METHODS:
            repair = {"repair": True} if made.repaired else {}
            whole = library.fuse(*parents[:2], images, made.way, others=parents[2:], **repair)
            torch.testing.assert_close(outputs(made.network, images), outputs(whole, images), rtol=1e-4, atol=1e-5)


def test_a_wider_third_parent_leaves_the_ways_that_take_it():
    images = TINY.images().inputs
    parents = [TINY.variant(seed=seed, width=width).start().eval() for seed, width in enumerate((3, 3, 4))]
    found = {made.way: made for made in every(parents, images, 0)}
    ways = {"parent 1", "parent 2", "parent 3", "transport", "ensemble", "union", "reduced union", "random channels"}
    assert set(found) == ways
    assert found["transport"].kept is None  # it is another function
    widths = [library.Channels.of(found[way].network).widths for way in ("parent 1", "reduced union", "transport")]
    assert len(set(widths)) == 1


@pytest.mark.slow
def test_of_a_mixture_of_which_all_stays_nothing_changes_and_the_heaviest_are_not_any(tmp_path):
    (cell,) = plan.reduction(Subject(BASE, width=4), SIZES["quick"], 0)
    rows = reduction({**cell, "shares": [2.0, 1.0], "factors": [1.0]}, str(tmp_path))
    (whole,) = select(rows, way="ensemble")
    for row in select(rows, share=2.0)[1:]:
        assert row["held_out_error"] == row["validation_error"] == 0
        assert row["held_out_accuracy"] == whole["held_out_accuracy"]
    errors = {row["way"]: row["validation_error"] for row in select(rows, share=1.0)}
    assert 0 < errors["elimination"] < errors["random"]
    assert errors["masses"] < errors["random"]


def made(pair, way, accuracy, size, *, repaired=False, validation=0.5, **more):
    names = {"network": "cnn", "pair": pair, "parents": 2, "way": way, "repaired": repaired}
    scores = {"held_out_accuracy": accuracy, "held_out_loss": 0.1, "validation_accuracy": validation}
    return {**names, **scores, "error": size, "difference": size, **more}


def fused():
    """The matching that is best on validation images is another one in each pair, and not the best one held out."""
    rows = []
    for pair in range(2):
        shift = 0.01 * pair
        rows += [made(pair, "parent 1", 0.9, 0.04), made(pair, "ensemble", 0.95 + shift, 0.0)]
        rows += [made(pair, "union", 0.95 + shift, 1e-6), made(pair, "reduced union", 0.94, 0.001)]
        rows += [made(pair, "random channels", 0.9, 0.001 * 4 ** (pair + 1))]
        for index, way in enumerate(("weights", "activations", "transport")):
            best = index == pair
            accuracy = 0.8 if best else 0.85
            rows.append(made(pair, way, accuracy, 0.2, repaired=True, validation=0.9 if best else 0.5, kept=1e-7))
        rows.append(made(pair, "average", 0.99, 0.2, repaired=True, validation=1.0))
    return rows


def reduced():
    rows = []
    for pair in range(2):
        rows.append({"pair": pair, "way": "ensemble", "share": 2.0, "held_out_accuracy": 0.9})
        for share in (1.0, 0.5):
            for way, factor, size, validation in (
                ("elimination", None, 0.01, 0.01),
                ("masses", 0.1, 0.02, 0.03 - 0.02 * pair),
                ("masses", 1.0, 0.04, 0.02),
                ("random", None, 0.1, 0.1),
            ):
                row = {"pair": pair, "way": way, "factor": factor, "share": share, "held_out_accuracy": 0.9 - size}
                rows.append({**row, "held_out_error": size, "validation_error": validation})
    return rows


def test_differences_are_taken_pair_by_pair_and_matchings_chosen_on_validation_images():
    (row,) = summary.reduced_unions(fused())
    assert row["to_ensemble"].value == pytest.approx(-0.015)
    assert row["to_matching"].value == pytest.approx(0.14)
    assert row["to_random"].value == pytest.approx(1 / 8)
    (random,) = select(summary.fusion(fused()), way="random channels")
    assert (random["pairs"], random["error"].value) == (2, pytest.approx(0.008))


def test_the_penalty_is_chosen_pair_by_pair_on_validation_images():
    (chosen,) = select(summary.reduction(reduced()), share=1.0, factor="chosen")
    assert chosen["error"].value == pytest.approx((0.04 * 0.02) ** 0.5)
    assert chosen["to_elimination"].value == pytest.approx(8**0.5)
    assert chosen["to_ensemble"].value == pytest.approx(-0.03)
    (random,) = select(summary.reduction(reduced()), share=0.5, way="random")
    assert random["to_elimination"].value == pytest.approx(10)


def test_sections_say_the_figures_and_pictures_are_drawn():
    tables = {"fusion": fused(), "reduction": reduced()}
    found = {
        "fusion": summary.fusion(tables["fusion"]),
        "reduced_unions": summary.reduced_unions(tables["fusion"]),
        "reduction": summary.reduction(tables["reduction"]),
    }
    said = " ".join(item for item in page.fusion(found, tables).items if isinstance(item, str))
    assert "minus the ensemble's -1.5" in said
    assert "0.125 (" in said
    said = " ".join(item for item in page.reduction(found, tables).items if isinstance(item, str))
    assert "2 pairs" in said
    assert "not told from 1" in said
    for draw in (pictures.fusion, pictures.reduction):
        assert png(draw(tables)).startswith(b"\x89PNG")
