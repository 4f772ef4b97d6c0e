"""Trained classifiers: what is kept, what is trained anew, what the descriptions decide."""

from __future__ import annotations

import json

import pytest
import safetensors.torch
import torch

from meanfield import data
from meanfield.bench import provenance
from meanfield.bench.classifiers import Classifier, layers_of
from meanfield.finite import fit
from meanfield.storage import tensors
from meanfield.validation import Misuse

TINY = Classifier(network="vgg8", width=2, samples=120, epochs=2, checkpoints=(0, 1, 2))


def test_a_description_travels_as_json():
    again = Classifier.from_dict({**json.loads(json.dumps(TINY.to_dict())), "images": "of a cell"})
    assert again == TINY
    assert hash(again) == hash(TINY)
    assert repr(TINY.variant(strength=1)) == repr(TINY)


def test_checkpoints_are_those_of_the_training(tmp_path):
    images = TINY.images()
    direct = fit(TINY.start(), images.inputs, images.labels, TINY.recipe, TINY.seed, checkpoints=(1, 2))
    for epoch in (1, 2):
        kept = TINY.at(epoch, tmp_path)
        assert not kept.training
        assert all(
            torch.equal(a, b) for a, b in zip(kept.state_dict().values(), direct.at(epoch).state_dict().values())
        )
    start = TINY.at(0, tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(start.state_dict().values(), TINY.start().state_dict().values()))
    (file,) = tmp_path.iterdir()  # one file for all epochs, no state left behind
    written = file.stat().st_mtime_ns
    TINY.at(2, tmp_path)
    assert file.stat().st_mtime_ns == written
    with pytest.raises(ValueError, match=r"epoch=7 is not one of checkpoints"):
        TINY.at(7, tmp_path)


def test_every_setting_is_another_network(tmp_path):
    others = [TINY.variant(seed=1), TINY.variant(labels="permuted"), TINY.variant(strength=2.0), TINY.variant(split=1)]
    weights = [each.at(2, tmp_path).state_dict()["conv3.weight"] for each in (TINY, *others)]
    assert all(not torch.equal(weights[0], other) for other in weights[1:])
    assert len(list(tmp_path.iterdir())) == len(weights)


@pytest.mark.parametrize(
    ("module", "name", "other"),
    [(provenance, "library", lambda: "another library"), (provenance, "versions", lambda packages: {"torch": "0.0"})],
)
def test_another_library_or_torch_trains_anew(tmp_path, monkeypatch, module, name, other):
    TINY.at(2, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(module, name, other)
        TINY.at(2, tmp_path)
        assert len(list(tmp_path.iterdir())) == 2
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    TINY.at(2, tmp_path)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before


def changed(path, change, about=lambda named: named):
    """A file of the store with other tensors or another description, and a checksum that fits."""
    kept, named = tensors.read(path)
    path.write_bytes(tensors.pack(change(kept), named.pop("kind"), about(named)))


def signs(kept):
    return {name: -tensor for name, tensor in kept.items()}


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(path.read_bytes()[:-9]),
        lambda path: path.write_bytes(path.read_bytes()[:-1] + b"\1"),
        lambda path: safetensors.torch.save_file(tensors.load_tensors(path), path),
        lambda path: tensors.save_tensors(signs(tensors.load_tensors(path)), path),
        lambda path: changed(path, signs, lambda named: {**named, "seed": 7}),
        lambda path: changed(path, signs, lambda named: {}),
    ],
    ids=["truncated", "a flipped bit", "no description", "tensors of others", "another seed", "no settings"],
)
def test_a_network_that_is_not_as_it_was_kept_is_named_and_trained_anew(tmp_path, damage):
    """NaN weights, other dtypes and flipped signs used to be believed."""
    before = TINY.at(2, tmp_path).state_dict()
    (path,) = tmp_path.iterdir()
    damage(path)
    with pytest.warns(UserWarning, match=rf"{path.name}.* trained anew"):
        again = TINY.at(2, tmp_path).state_dict()
    assert all(torch.equal(one, other) for one, other in zip(before.values(), again.values()))
    TINY.at(1, tmp_path)  # in peace


def test_a_damaged_state_is_named_and_the_run_starts_anew(tmp_path):
    before = TINY.at(2, tmp_path).state_dict()
    (path,) = tmp_path.iterdir()
    state = path.with_name(f"{path.stem}.state.safetensors")
    path.rename(state)
    with pytest.warns(UserWarning, match=rf"{state.name} .*trained anew"):
        again = TINY.at(2, tmp_path).state_dict()
    assert all(torch.equal(one, other) for one, other in zip(before.values(), again.values()))
    assert [each.name for each in tmp_path.iterdir()] == [path.name]


def test_permuted_labels_are_those_of_other_training_images_and_held_out_ones_stay(tmp_path):
    permuted, images = TINY.variant(labels="permuted", seed=3), TINY.images()
    order = torch.randperm(120, generator=torch.Generator().manual_seed(3))
    direct = fit(permuted.start(), images.inputs, images.labels[order], permuted.recipe, 3, checkpoints=(2,))
    kept = permuted.at(2, tmp_path).state_dict()
    assert all(torch.equal(a, b) for a, b in zip(kept.values(), direct.at(2).state_dict().values()))
    assert permuted.images() is images


def test_the_split_is_random_or_in_file_order():
    digits = data.load("digits")
    ordered, drawn = TINY.variant(split=None).images(), TINY.images()
    assert torch.equal(ordered.inputs.double(), digits.inputs[:120])
    assert torch.equal(ordered.held_out_labels, digits.indices[120:])
    assert not torch.equal(drawn.labels, ordered.labels)
    assert (len(drawn.inputs), len(drawn.held_out), drawn.classes) == (120, 1797 - 120, 10)
    assert drawn.digest != ordered.digest


def test_presets():
    authors = Classifier(preset="authors", network="vgg16", strength=8.0, epochs=200)
    assert (authors.recipe.learning_rate, authors.recipe.milestones, authors.recipe.augment) == (
        0.002,
        (60, 120, 180),
        True,
    )
    assert [module.p for module in authors.variant(width=2).start() if isinstance(module, torch.nn.Dropout)] == [0.5]
    assert Classifier(epochs=30).recipe.milestones == (20, 26)
    names = layers_of(TINY.start())
    assert (names[0], names[-1], len(names)) == ("conv1", "linear1", 6)


@pytest.mark.parametrize(
    ("network", "names"),
    [
        ("mlp", ["flatten", "linear1", "tanh1", "linear2", "tanh2", "linear3"]),
        ("cnn", ["conv1", "tanh1", "pool1", "conv2", "tanh2", "flatten", "linear1"]),
        ("residual", ["conv1", "tanh1", "stage1", "stage2", "stage3", "pool", "flatten", "linear1"]),
        ("residual_bn", ["conv1", "norm1", "tanh1", "stage1", "stage2", "stage3", "pool", "flatten", "linear1"]),
    ],
)
def test_networks_by_name(network, names):
    found = TINY.variant(network=network, activation="tanh").start()
    assert [name for name, _ in found.named_children()] == names
    norms = [module for module in found.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    assert bool(norms) == (network == "residual_bn")
    assert found(TINY.images().inputs[:2]).shape == (2, 10)


def test_the_loss_is_that_of_the_recipe():
    assert Classifier(loss="squared").recipe.loss == "squared"
    assert Classifier(preset="authors", loss="squared").recipe.loss == "squared"
    with pytest.raises(Misuse, match=r"loss='hinge' is unknown"):
        Classifier(loss="hinge")
    with pytest.raises(Misuse, match=r"activation='relu6' is unknown"):
        Classifier(activation="relu6")


def test_errors_name_the_field():
    with pytest.raises(ValueError, match=r"network='vgg12' is unknown"):
        Classifier(network="vgg12")
    with pytest.raises(ValueError, match=r"strength=-1"):
        Classifier(strength=-1)
    with pytest.raises(ValueError, match=r"strength=0.5 needs a penalty"):
        Classifier(penalty="none", strength=0.5)
    for checkpoints in ((0, 31), (2, 0), (), (0, 0.5), (-1, 2)):
        with pytest.raises(ValueError, match=r"checkpoints="):
            Classifier(checkpoints=checkpoints)
    with pytest.raises(ValueError, match=r"labels='shuffled' is unknown"):
        Classifier(labels="shuffled")
    for name, value in (("samples", 1), ("width", 0), ("epochs", 0), ("seed", -1), ("split", -1), ("pool", 0)):
        with pytest.raises(Misuse, match=rf"^{name}={value} must be an integer of at least"):
            Classifier(**{name: value})
    with pytest.raises(Misuse, match=r"dtype='float16' is unknown"):
        Classifier(dtype="float16")
