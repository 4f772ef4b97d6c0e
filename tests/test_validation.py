import numpy as np
import pytest
import torch

from meanfield import validation


def test_one_of_returns_the_option():
    assert validation.one_of("relu", "activation", ["relu", "tanh"]) == "relu"


def test_one_of_names_the_argument_and_the_nearest_option():
    with pytest.raises(
        ValueError, match=r"activation='rleu' is unknown: choose one of 'relu', 'tanh'; did you mean 'relu'\?"
    ):
        validation.one_of("rleu", "activation", ["relu", "tanh"])


@pytest.mark.parametrize("value", [3, None, ["identity"], "qqqqq"])
def test_one_of_without_a_near_option_gives_no_hint(value):
    with pytest.raises(ValueError, match=r"activation=.* is unknown: choose one of 'relu', 'tanh'$"):
        validation.one_of(value, "activation", ["relu", "tanh"])


def test_integer_accepts_numpy_integers():
    result = validation.integer(np.int64(3), "width")
    assert result == 3
    assert type(result) is int


@pytest.mark.parametrize("value", [0, -1, 2.0, "3", None, True])
def test_integer_refuses_what_is_not_a_positive_integer(value):
    with pytest.raises(ValueError, match=r"width=.* must be an integer of at least 1"):
        validation.integer(value, "width")


@pytest.mark.parametrize(("value", "expected"), [(2, (2, 2)), ((1, 3), (1, 3)), ([1, 3], (1, 3))])
def test_pair_accepts_an_integer_or_two(value, expected):
    assert validation.pair(value, "stride", 1) == expected


@pytest.mark.parametrize(
    ("value", "message"), [((1, 2, 3), "stride=.*one integer or a pair"), ((1, 0), "stride=0"), ("12", "stride='12'")]
)
def test_pair_names_the_argument(value, message):
    with pytest.raises(ValueError, match=message):
        validation.pair(value, "stride", 1)


@pytest.mark.parametrize("value", [-1e-9, float("nan"), float("inf"), "1", None, True])
def test_nonnegative_names_the_argument(value):
    with pytest.raises(ValueError, match=r"source=.* must be a finite number of at least 0"):
        validation.nonnegative(value, "source")


def test_nonnegative_accepts_zero_and_numpy_numbers():
    assert validation.nonnegative(0, "source") == 0.0
    assert validation.nonnegative(np.float32(0.5), "source") == 0.5


def test_positive_refuses_zero():
    with pytest.raises(ValueError, match="bound=0 must be greater than 0"):
        validation.positive(0, "bound")


def test_positive_returns_a_float():
    assert type(validation.positive(2, "bound")) is float


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (3, "widths=3 must be a sequence of 2"),
        ("34", "widths='34' must be a sequence"),
        ((3,), r"widths=\(3,\) has 1 entries.*2 layers"),
        ((3, 0), "widths=0"),
        ((3, 4, 5), "has 3 entries"),
    ],
)
def test_widths_name_the_argument(value, message):
    with pytest.raises(ValueError, match=message):
        validation.widths(value, 2)


def test_widths_accept_any_iterable_of_integers():
    assert validation.widths(iter([3, 4]), 2) == (3, 4)


def test_shaped_returns_the_tensor():
    tensor = torch.zeros(2, 3)
    assert validation.shaped(tensor, (2, 3), "readout") is tensor


def test_shaped_refuses_another_type():
    with pytest.raises(TypeError, match=r"readout must be a torch.Tensor of shape \(2, 3\), not ndarray"):
        validation.shaped(np.zeros((2, 3)), (2, 3), "readout")


def test_shaped_refuses_another_shape():
    with pytest.raises(ValueError, match=r"readout has shape \(3, 2\); expected \(2, 3\)"):
        validation.shaped(torch.zeros(3, 2), (2, 3), "readout")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_finite_names_the_first_bad_position(bad):
    tensor = torch.zeros(2, 3)
    tensor[1, 2] = bad
    with pytest.raises(ValueError, match=r"inputs\[1, 2\] is -?(nan|inf); every entry must be finite"):
        validation.finite(tensor, "inputs")


def test_finite_accepts_empty_and_integer_tensors():
    assert validation.finite(torch.zeros(0), "inputs").numel() == 0
    assert validation.finite(torch.ones(2, dtype=torch.int64), "inputs").sum() == 2


@pytest.mark.parametrize("wrap", [np.array, np.asarray, torch.tensor, np.float32, np.int64])
def test_numbers_may_come_in_arrays_and_tensors_without_dimensions(wrap):
    """As indexing and summing give them."""
    assert validation.integer(wrap(3) if wrap is not np.float32 else np.int8(3), "steps") == 3
    assert (
        validation.pair(np.array([3, 2]), "kernel_size", 1) == validation.pair(torch.tensor([3, 2]), "k", 1) == (3, 2)
    )
    assert validation.widths(torch.tensor([4, 3]), 2) == (4, 3)
    for rule in (validation.positive, validation.number, validation.seconds):
        assert rule(wrap(2), "value") == 2
        assert not hasattr(rule(wrap(2), "value"), "ndim")
    assert validation.seconds(np.float32("inf"), "max_seconds") == float("inf")


@pytest.mark.parametrize("value", [np.True_, np.array(True), torch.tensor(True)])
def test_booleans_of_arrays_are_booleans_and_no_numbers(value):
    assert validation.boolean(value, "masses") is True
    for rule in (validation.integer, validation.number, validation.nonnegative):
        with pytest.raises(ValueError, match="value="):
            rule(value, "value")


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.ones(2).to_sparse(), r"inputs has the layout torch.sparse_coo; give a dense tensor with entries"),
        (torch.ones(2, device="meta"), r"inputs has no entries \(it is on the device 'meta'\); give a dense tensor"),
    ],
)
def test_finite_refuses_tensors_whose_entries_cannot_be_read(tensor, message):
    with pytest.raises(ValueError, match=message):
        validation.finite(tensor, "inputs")


@pytest.mark.parametrize(
    ("value", "size"),
    [
        (3, 3.0),
        ("3", 3.0),
        ("3GiB", 3.0),
        ("1.5 g", 1.5),
        ("512MiB", 0.5),
        ("2e3MB", 2e9 / 2**30),
        (float("inf"), np.inf),
    ],
)
def test_an_amount_of_memory_is_gibibytes_or_says_its_unit(value, size):
    assert validation.gibibytes(value, "max_memory") == pytest.approx(size, rel=1e-15)


@pytest.mark.parametrize("value", [0, -1, "", "GiB", "3TiB", "-3", "3 4", "nan", "1e999", True, None])
def test_what_is_no_amount_of_memory_is_refused(value):
    with pytest.raises(ValueError, match="max_memory="):
        validation.gibibytes(value, "max_memory")
