"""Tensors that say what they are: a digest of all that counts, a header that fits."""

import pytest
import safetensors.torch
import torch
from strategies import normal

from meanfield.storage import tensors
from meanfield.storage.tensors import digest

TENSORS = {"weight": normal((3, 2), 0), "count": torch.arange(3), "single": normal((2,), 1).float()}


def test_a_digest_follows_entries_shapes_dtypes_and_order():
    a, b = normal((2, 3), 0), normal((3,), 1)
    same = digest([a, b])
    assert digest([a.clone(), b.clone()]) == same
    assert digest([a.T.contiguous().T, b]) == same  # memory layout is no entry
    moved = a.clone()
    moved[1, 2] = torch.nextafter(moved[1, 2], moved[1, 2] + 1)
    others = [[moved, b], [b, a], [a.reshape(3, 2), b], [a.float(), b], [a], [a, b, b], [a.view(torch.int64), b]]
    assert len({same, *map(digest, others)}) == len(others) + 1
    assert len(same) == 64


def test_what_is_packed_comes_back_to_the_bit():
    about = {"third": 1 / 3, "nested": {"list": [1, None, True, "na\u00efve"]}}
    kept, found = tensors.unpack(tensors.pack(TENSORS, "a kind", about), "here")
    assert found == {"kind": "a kind", **about}
    assert kept.keys() == TENSORS.keys()
    assert all(torch.equal(kept[name], each) and kept[name].dtype == each.dtype for name, each in TENSORS.items())
    assert tensors.pack(kept, "a kind", about) == tensors.pack(TENSORS, "a kind", about)


def test_files_of_other_origin_have_no_description():
    kept, found = tensors.unpack(safetensors.torch.save(TENSORS, {"format": "pt"}), "here")
    assert found is None
    assert kept.keys() == TENSORS.keys()


@pytest.mark.parametrize("text", ["", "null", "[]", "{}", '{"sha256": 1}', "[" * 10**6])
def test_descriptions_that_are_none_are_named(text):
    content = safetensors.torch.save(TENSORS, {tensors.KEY: text})
    with pytest.raises(ValueError, match="here"):
        tensors.unpack(content, "here")


def test_a_deep_header_is_named():
    header = b'{"a":' * 10**5
    with pytest.raises(ValueError, match="here is not a safetensors file"):
        tensors.unpack(len(header).to_bytes(8, "little") + header, "here")
