import pytest
import torch
from stops import interrupt_at

from meanfield import limits
from meanfield.landscape.kept import Keeper, Kept
from meanfield.storage.states import StateFile
from meanfield.validation import Misuse

POINTS = torch.cartesian_prod(*[torch.linspace(-1, 1, 5, dtype=torch.float64)] * 2)


def product(points):
    """Exactly 0 on both axes, nan in one corner."""
    found = points.prod(1, keepdim=True)
    return torch.where((points == 1).all(1, keepdim=True), torch.nan, found)


def counted(function, seen):
    return lambda points: seen.extend(points.tolist()) or function(points)


def test_a_value_is_evaluated_once_also_where_it_is_0_or_nan():
    seen = []
    kept = Kept(counted(product, seen), ["loss"], block=7)
    first = kept(POINTS)
    assert torch.equal(first.nan_to_num(9.0), product(POINTS).nan_to_num(9.0))
    assert len(seen) == len(kept) == 25
    assert torch.equal(kept(POINTS.flip(0)).nan_to_num(9.0), first.flip(0).nan_to_num(9.0))
    kept(torch.zeros(3, 2, dtype=torch.float64))
    assert len(seen) == 25


def test_what_is_not_known_is_nan_and_not_made_up():
    kept = Kept(product, ["loss"], block=7)
    kept(POINTS[:3])
    assert kept.known(POINTS).isnan().sum() == 22


def test_an_interrupted_run_goes_on_with_the_same_blocks(tmp_path):
    def run(seen, moment=None):
        kept = Kept(counted(product, seen), ["loss"], block=4)
        keeper = Keeper(StateFile(tmp_path / "state.safetensors", {"of": "a test"}), {"all": kept})
        kept.after = keeper.glance
        with limits.watched(interrupt_at(moment)):
            return kept(POINTS)

    first, second = [], []
    with pytest.raises(KeyboardInterrupt):
        run(first, 3)
    found = run(second)
    assert first + second[1:] == POINTS.tolist()  # the first value was asked once more: whether it is still so
    assert second[0] == POINTS[0].tolist()
    assert torch.equal(found.nan_to_num(9.0), product(POINTS).nan_to_num(9.0))


def test_a_function_that_changed_is_refused(tmp_path):
    def keeper(function):
        kept = Kept(function, ["loss"], block=4)
        kept.after = Keeper(StateFile(tmp_path / "state.safetensors", {}), {"all": kept}).glance
        return kept

    keeper(lambda points: points[:, :1])(POINTS)
    with pytest.raises(Misuse, match=r"holds \[-1.0\] at \[-1.0, -1.0\], where \[-2.0\] is found now"):
        keeper(lambda points: 2 * points[:, :1])
    with pytest.raises(Misuse, match="its of is None"):
        Keeper(StateFile(tmp_path / "state.safetensors", {"of": "b"}), {})
